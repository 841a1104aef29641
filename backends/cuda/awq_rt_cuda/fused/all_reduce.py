"""Host half of kernels/fused_all_reduce.cu."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from awq_rt import ops
from awq_rt.parallel.group import Group
from awq_rt.parallel.inbox import MOST_ROWS

from ..driver import Kernel, Shape
from .launch import HALF, bits, launch, load, serves
from .norm import MOST_THREADS, MOST_VECTORS, add_rms_norm, threads_of

ARGUMENTS = 9
PATIENCE_NS = 600 * 10**9
"""As long as NCCL waits for another process by default."""


def defines(hidden: int, half: int, gpus: int) -> dict[str, str | int]:
    return {
        "HIDDEN": hidden,
        "THREADS": threads_of(hidden),
        "ACTIVATION_HALF": half,
        "GPUS": gpus,
        "MOST_ROWS": MOST_ROWS,
    }


@functools.cache
def _kernel(hidden: int, half: int, gpus: int, device_index: int) -> Kernel:
    return load("fused_all_reduce", defines(hidden, half, gpus), ARGUMENTS, device_index)


def all_reduce_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group) -> Any:
    """`awq_rt.ops.all_reduce_add_rms_norm`: in one kernel for few rows, else the sum by the group's own means."""
    inbox = group.inbox
    if inbox is None or not _serves(x, residual, weight) or inbox.row_bytes != x.shape[1] * x.itemsize:
        y = add_rms_norm(group.all_reduce(x), residual, weight, eps)
        return ops.add_rms_norm(x, residual, weight, eps) if y is NotImplemented else y
    rows, hidden = x.shape
    y = torch.empty_like(x)
    if rows:
        index = x.get_device()
        launch(
            _kernel(hidden, HALF[x.dtype], group.size, index),
            Shape((rows, 1, 1), threads_of(hidden)),
            index,
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            inbox.pointers.data_ptr(),
            inbox.counters.data_ptr(),
            group.rank,
            bits(eps),
            PATIENCE_NS,
        )
    return y


def _serves(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    return (
        x.dim() == 2
        and x.shape[0] <= MOST_ROWS
        and x.shape[1] % 8 == 0
        and x.shape[1] <= MOST_THREADS * MOST_VECTORS * 8
        and serves(x)
        and serves(residual)
        and (residual.shape, residual.dtype) == (x.shape, x.dtype)
        and weight.dtype == torch.float32
        and weight.is_contiguous()
    )
