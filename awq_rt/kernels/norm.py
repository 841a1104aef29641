"""Host half of fused_norm.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rtc import Program
from .launcher import HALF, Launcher, bits, serves

ARGUMENTS = 5
MOST_THREADS = 1024
MOST_VECTORS = 4
"""Of 8 elements, in a thread's registers."""


def threads_of(hidden: int, lanes: int) -> int:
    """One vector a thread as long as a block holds the row; whole waves."""
    vectors = hidden // 8
    turns = -(-vectors // MOST_THREADS)
    return -(-vectors // turns // lanes) * lanes


def defines(hidden: int, half: int, add: int, lanes: int) -> dict[str, str | int]:
    return {"HIDDEN": hidden, "THREADS": threads_of(hidden, lanes), "ACTIVATION_HALF": half, "ADD": add}


class Norms:
    """`awq_rt.ops.rms_norm` and `add_rms_norm`."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[int, torch.dtype, int, int], tuple[Any, int]] = {}

    def programs(self, hidden: int, half: int, device_index: int) -> list[Program]:
        lanes = self._launcher.lanes(device_index)
        found = (defines(hidden, half, add, lanes) for add in (0, 1))
        return [self._launcher.program("fused_norm", given, device_index) for given in found]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Any:
        """`awq_rt.ops.rms_norm`, or NotImplemented."""
        index = self._launcher.device_index(x)
        if index is None or not _serves(x, weight):
            return NotImplemented
        return self._normed(x, 0, weight, eps, 0, index)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
        """`awq_rt.ops.add_rms_norm`, or NotImplemented."""
        index = self._launcher.device_index(x)
        fits = residual.shape == x.shape and residual.dtype == x.dtype
        if index is None or not fits or not _serves(x, weight) or not serves(residual):
            return NotImplemented
        return self._normed(x, residual.data_ptr(), weight, eps, 1, index)

    def _normed(self, x: Tensor, residual: int, weight: Tensor, eps: float, add: int, index: int) -> Tensor:
        rows, hidden = x.shape
        y = torch.empty_like(x)
        if rows:
            key = (hidden, x.dtype, add, index)
            kernel, threads = self._loaded.get(key) or self._load(*key)
            arguments = (x.data_ptr(), residual, weight.data_ptr(), y.data_ptr(), bits(eps))
            self._launcher.launch(kernel, index, (rows, 1, 1), threads, *arguments)
        return y

    def _load(self, hidden: int, dtype: torch.dtype, add: int, index: int) -> tuple[Any, int]:
        program = self.programs(hidden, HALF[dtype], index)[add]
        threads = threads_of(hidden, self._launcher.lanes(index))
        loaded = self._launcher.load(program, ARGUMENTS, index), threads
        self._loaded[hidden, dtype, add, index] = loaded
        return loaded


def _serves(x: Tensor, weight: Tensor) -> bool:
    hidden = x.shape[-1]
    fits = x.dim() == 2 and hidden % 8 == 0 and 0 < hidden <= MOST_THREADS * MOST_VECTORS * 8
    return fits and serves(x) and weight.dtype == torch.float32 and weight.is_contiguous()
