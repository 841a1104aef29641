"""Host half of fused_logits.cu: the linear that gives logits, for few rows; torch's BLAS serves more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..rtc import Program
from .launcher import HALF, Launcher, serves

ARGUMENTS = 5
THREADS, COLUMNS, AHEAD, BLOCKS = 256, 2, 4, 3
"""Of a block; columns of a wave, and loads in flight for each; blocks of a multiprocessor."""
ROW_STEPS = (1, 2, 4)
SHARED_BYTES = 48 * 1024
"""What every GPU gives a block without being asked: x lies there."""


def defines(depth: int, half: int, rows: int) -> dict[str, str | int]:
    """For `rows` of `ROW_STEPS`."""
    return {
        "DEPTH": depth,
        "ROWS": rows,
        "THREADS": THREADS,
        "COLUMNS": COLUMNS,
        "AHEAD": AHEAD,
        "MIN_BLOCKS": 1,
        "ACTIVATION_HALF": half,
    }


def fits(depth: int, rows: int, lanes: int) -> bool:
    """Whether a block's shared memory holds `rows` rows of x, each rounded up to a wave's loads."""
    step = 8 * lanes * AHEAD
    return depth % 8 == 0 and 2 * rows * -(-depth // step) * step <= SHARED_BYTES


class DenseLinear:
    """`awq_rt.ops.dense_linear`, or NotImplemented."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[int, int, torch.dtype, int], tuple[Any, int]] = {}

    def programs(self, depth: int, half: int, device_index: int) -> list[Program]:
        """Every program that a weight of this depth may need."""
        lanes = self._launcher.lanes(device_index)
        found = (defines(depth, half, rows) for rows in ROW_STEPS if fits(depth, rows, lanes))
        return [self._launcher.program("fused_logits", given, device_index) for given in found]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        index = self._launcher.device_index(x)
        rows = next((step for step in ROW_STEPS if step >= len(x)), 0)
        if index is None or x.dim() != 2 or bias is not None or not len(x) or not rows:
            return NotImplemented
        columns, depth = weight.shape
        lanes = self._launcher.lanes(index)
        if not fits(depth, rows, lanes) or not serves(x) or not serves(weight) or weight.dtype != x.dtype:
            return NotImplemented
        y = x.new_empty(len(x), columns)
        kernel, most = self._loaded.get((rows, depth, x.dtype, index)) or self._load(rows, depth, x.dtype, index)
        grid = (min(-(-columns // (COLUMNS * THREADS // lanes)), most), 1, 1)
        arguments = (x.data_ptr(), weight.data_ptr(), y.data_ptr(), len(x), columns)
        self._launcher.launch(kernel, index, grid, THREADS, *arguments)
        return y

    def _load(self, rows: int, depth: int, dtype: torch.dtype, index: int) -> tuple[Any, int]:
        program = self._launcher.program("fused_logits", defines(depth, HALF[dtype], rows), index)
        loaded = self._launcher.load(program, ARGUMENTS, index), self._launcher.multiprocessors(index) * BLOCKS
        self._loaded[rows, depth, dtype, index] = loaded
        return loaded
