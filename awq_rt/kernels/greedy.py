"""Host half of fused_argmax.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rtc import Program
from .launcher import HALF, Launcher, serves

ARGUMENTS = 3
THREADS = 1024


def defines(half: int) -> dict[str, str | int]:
    return {"THREADS": THREADS, "PARTS": 1, "ACTIVATION_HALF": half}


class Argmax:
    """`awq_rt.ops.argmax`, or NotImplemented."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[torch.dtype, int], Any] = {}

    def program(self, half: int, device_index: int) -> Program:
        return self._launcher.program("fused_argmax", defines(half), device_index)

    def __call__(self, logits: Tensor) -> Any:
        index = self._launcher.device_index(logits)
        fits = logits.dim() == 2 and logits.shape[1] % 8 == 0 and logits.numel() > 0
        if index is None or not fits or not serves(logits):
            return NotImplemented
        rows, count = logits.shape
        y = torch.empty(rows, dtype=torch.int64, device=logits.device)
        kernel = self._loaded.get((logits.dtype, index)) or self._load(logits.dtype, index)
        self._launcher.launch(kernel, index, (rows, 1, 1), THREADS, logits.data_ptr(), y.data_ptr(), count)
        return y

    def _load(self, dtype: torch.dtype, index: int) -> Any:
        loaded = self._launcher.load(self.program(HALF[dtype], index), ARGUMENTS, index)
        self._loaded[dtype, index] = loaded
        return loaded
