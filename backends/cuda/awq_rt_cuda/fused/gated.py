"""Host half of kernels/fused_gated.cu."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..driver import Kernel, Shape
from ..tiled import target_of
from .launch import HALF, launch, load, serves

ARGUMENTS = 3
THREADS = 128
BLOCKS_A_MULTIPROCESSOR = 16
"""As many as are resident; more rows are further turns of these."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def defines(width: int, half: int, activation: str) -> dict[str, str | int]:
    return {"WIDTH": width, "THREADS": THREADS, "ACTIVATION_HALF": half, "ACTIVATION": activation.upper()}


@functools.cache
def _kernel(width: int, half: int, activation: str, device_index: int) -> Kernel:
    return load("fused_gated", defines(width, half, activation), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=4096)
def _shape(vectors: int, device_index: int) -> Shape:
    most = target_of(device_index).multiprocessors * BLOCKS_A_MULTIPROCESSOR
    return Shape((min(-(-vectors // THREADS), most), 1, 1), THREADS)


def gated_activation(gate_up: Tensor, activation: str) -> Any:
    """`awq_rt.ops.gated_activation`, or NotImplemented."""
    fits = gate_up.dim() == 2 and gate_up.shape[-1] % 16 == 0 and gate_up.numel() < 1 << 34
    if not fits or activation not in ACTIVATIONS or not serves(gate_up):
        return NotImplemented
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    if y.numel():
        index = gate_up.get_device()
        vectors = rows * width // 8
        kernel = _kernel(width, HALF[gate_up.dtype], activation, index)
        launch(kernel, _shape(vectors, index), index, gate_up.data_ptr(), y.data_ptr(), vectors)
    return y
