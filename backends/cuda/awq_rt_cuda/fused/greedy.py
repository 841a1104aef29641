"""Host half of kernels/fused_argmax.cu."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..driver import Kernel, Shape
from ..selection import Target
from ..tiled import target_of
from .launch import HALF, launch, load, serves

ARGUMENTS = 3
THREADS = 1024
PARTS = 8
"""Blocks of a row where they can meet in a cluster: one block reads 128,256 logits in 14 us (H100, 2026-11-23)."""


def parts_of(target: Target) -> int:
    return PARTS if target.clusters else 1


def defines(half: int, parts: int) -> dict[str, str | int]:
    return {"THREADS": THREADS, "PARTS": parts, "ACTIVATION_HALF": half}


@functools.cache
def _kernel(half: int, device_index: int) -> Kernel:
    return load("fused_argmax", defines(half, parts_of(target_of(device_index))), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=1024)
def _shape(rows: int, device_index: int) -> Shape:
    parts = parts_of(target_of(device_index))
    return Shape((rows * parts, 1, 1), THREADS, cluster=parts)


def argmax(logits: Tensor) -> Any:
    """`awq_rt.ops.argmax`, or NotImplemented."""
    if logits.dim() != 2 or logits.shape[1] % 8 or not logits.numel() or not serves(logits):
        return NotImplemented
    rows, count = logits.shape
    y = torch.empty(rows, dtype=torch.int64, device=logits.device)
    index = logits.get_device()
    launch(_kernel(HALF[logits.dtype], index), _shape(rows, index), index, logits.data_ptr(), y.data_ptr(), count)
    return y
