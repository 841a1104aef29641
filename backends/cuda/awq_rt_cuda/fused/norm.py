"""Host half of kernels/fused_norm.cu."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..driver import Kernel, Shape
from .launch import HALF, bits, launch, load, serves

ARGUMENTS = 5
MOST_THREADS = 1024
MOST_VECTORS = 4
"""Of 8 elements, in a thread's registers."""


def threads_of(hidden: int) -> int:
    """One vector a thread as long as a block holds the row."""
    vectors = hidden // 8
    turns = -(-vectors // MOST_THREADS)
    return -(-vectors // turns // 32) * 32


def defines(hidden: int, half: int, add: int) -> dict[str, str | int]:
    return {"HIDDEN": hidden, "THREADS": threads_of(hidden), "ACTIVATION_HALF": half, "ADD": add}


@functools.cache
def _kernel(hidden: int, half: int, add: int, device_index: int) -> Kernel:
    return load("fused_norm", defines(hidden, half, add), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=4096)
def _shape(rows: int, hidden: int) -> Shape:
    return Shape((rows, 1, 1), threads_of(hidden))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Any:
    """`awq_rt.ops.rms_norm`, or NotImplemented."""
    if not _serves(x, weight):
        return NotImplemented
    return _normed(x, 0, weight, eps, 0)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    """`awq_rt.ops.add_rms_norm`, or NotImplemented."""
    if not _serves(x, weight) or not serves(residual) or residual.shape != x.shape or residual.dtype != x.dtype:
        return NotImplemented
    return _normed(x, residual.data_ptr(), weight, eps, 1)


def _serves(x: Tensor, weight: Tensor) -> bool:
    hidden = x.shape[-1]
    fits = x.dim() == 2 and hidden % 8 == 0 and 0 < hidden <= MOST_THREADS * MOST_VECTORS * 8
    return fits and serves(x) and weight.dtype == torch.float32 and weight.is_contiguous()


def _normed(x: Tensor, residual: int, weight: Tensor, eps: float, add: int) -> Tensor:
    rows, hidden = x.shape
    y = torch.empty_like(x)
    if rows:
        index = x.get_device()
        kernel = _kernel(hidden, HALF[x.dtype], add, index)
        launch(
            kernel,
            _shape(rows, hidden),
            index,
            x.data_ptr(),
            residual,
            weight.data_ptr(),
            y.data_ptr(),
            bits(eps),
        )
    return y
