"""Host half of kernels/fused_logits.cu: the linear that gives logits, for few rows; torch's BLAS serves more."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from awq_rt.rtc import Program

from ..driver import Kernel, Shape
from ..tiled import target_of
from .launch import HALF, launch, load, program, serves

ARGUMENTS = 5
ROW_STEPS = (1, 2, 4)
SHARED_BYTES = 48 * 1024
"""What every GPU gives a block without being asked: x lies there."""
THREADS, COLUMNS, AHEAD = 256, 2, 4
BLOCKS = {1: 3, 2: 2, 4: 2}
"""The best of 23 on an H100 (2026-11-23): 32000 x 4096 in 86.8 us for a row and 128256 x 4096 in 340, where BLAS takes
99 and 379, and reading the weight 84 and 337. BLOCKS are those of a multiprocessor, by the
number of rows: sums take registers."""
STEP = AHEAD * 256
"""Of the depth: it is rounded up to a multiple in shared memory."""


def defines(depth: int, half: int, rows: int) -> dict[str, str | int]:
    """For `rows` of `ROW_STEPS`."""
    return {
        "DEPTH": depth,
        "ROWS": rows,
        "THREADS": THREADS,
        "COLUMNS": COLUMNS,
        "AHEAD": AHEAD,
        "MIN_BLOCKS": BLOCKS[rows],
        "ACTIVATION_HALF": half,
    }


def fits(depth: int, rows: int) -> bool:
    """Whether a block's shared memory holds `rows` rows of x."""
    return depth % 8 == 0 and 2 * rows * -(-depth // STEP) * STEP <= SHARED_BYTES


def programs(depth: int, half: int, arch: str) -> list[Program]:
    """Every program that `dense_linear` may need for a weight of this depth."""
    return [program("fused_logits", arch, defines(depth, half, rows)) for rows in ROW_STEPS if fits(depth, rows)]


@functools.cache
def _kernel(depth: int, half: int, rows: int, device_index: int) -> Kernel:
    return load("fused_logits", defines(depth, half, rows), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=1024)
def _shape(columns: int, rows: int, device_index: int) -> Shape:
    resident = target_of(device_index).multiprocessors * BLOCKS[rows]
    return Shape((min(-(-columns // (COLUMNS * THREADS // 32)), resident), 1, 1), THREADS)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """`awq_rt.ops.dense_linear`, or NotImplemented."""
    count = x.shape[0]
    rows = next((step for step in ROW_STEPS if step >= count), 0)
    if x.dim() != 2 or bias is not None or not count or not rows or not fits(x.shape[1], rows):
        return NotImplemented
    if not serves(x) or not serves(weight) or weight.dtype != x.dtype or weight.device != x.device:
        return NotImplemented
    columns, depth = weight.shape
    y = x.new_empty(count, columns)
    index = x.get_device()
    launch(
        _kernel(depth, HALF[x.dtype], rows, index),
        _shape(columns, rows, index),
        index,
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        count,
        columns,
    )
    return y
