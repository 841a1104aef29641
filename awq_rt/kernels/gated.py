"""Host half of fused_gated.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rtc import Program
from .launcher import HALF, Launcher, serves

ARGUMENTS = 3
THREADS = 128
BLOCKS_A_MULTIPROCESSOR = 16
"""As many as are resident; more rows are further turns of these."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def defines(width: int, half: int, activation: str) -> dict[str, str | int]:
    return {"WIDTH": width, "THREADS": THREADS, "ACTIVATION_HALF": half, "ACTIVATION": activation.upper()}


class GatedActivation:
    """`awq_rt.ops.gated_activation`, or NotImplemented."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[int, torch.dtype, str, int], tuple[Any, int]] = {}

    def program(self, width: int, half: int, activation: str, device_index: int) -> Program:
        return self._launcher.program("fused_gated", defines(width, half, activation), device_index)

    def __call__(self, gate_up: Tensor, activation: str) -> Any:
        index = self._launcher.device_index(gate_up)
        fits = gate_up.dim() == 2 and gate_up.shape[-1] % 16 == 0 and gate_up.numel() < 1 << 34
        if index is None or not fits or activation not in ACTIVATIONS or not serves(gate_up):
            return NotImplemented
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        y = gate_up.new_empty(rows, width)
        if y.numel():
            key = (width, gate_up.dtype, activation, index)
            kernel, most = self._loaded.get(key) or self._load(*key)
            vectors = rows * width // 8
            grid = (min(-(-vectors // THREADS), most), 1, 1)
            self._launcher.launch(kernel, index, grid, THREADS, gate_up.data_ptr(), y.data_ptr(), vectors)
        return y

    def _load(self, width: int, dtype: torch.dtype, activation: str, index: int) -> tuple[Any, int]:
        program = self.program(width, HALF[dtype], activation, index)
        most = self._launcher.multiprocessors(index) * BLOCKS_A_MULTIPROCESSOR
        loaded = self._launcher.load(program, ARGUMENTS, index), most
        self._loaded[width, dtype, activation, index] = loaded
        return loaded
