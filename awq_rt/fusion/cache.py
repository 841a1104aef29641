"""Keys and values of every position so far, in one allocation that does not move while a generation lasts."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import OutOfMemory
from .description import Description

LENGTH_STEP = 256
"""Lengths are rounded up to a multiple, so that a captured step serves prompts of similar length."""


class KeyValueCache:
    """`keys[layer]` and `values[layer]` are [batch, kv_heads, length, head_dim]. Row b's position p is in slot p."""

    def __init__(self, description: Description, batch: int, length: int, dtype: torch.dtype, device: torch.device):
        self.batch, self.length = batch, length
        specs = [layer.attention.spec for layer in description.layers]
        shapes = [(2, batch, spec.kv_heads, length, spec.head_dim) for spec in specs]
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        with contextlib.suppress(torch.OutOfMemoryError):
            for shape in shapes:
                keys, values = torch.zeros(shape, dtype=dtype, device=device)
                self.keys.append(keys)
                self.values.append(values)
            return
        self.keys, self.values = [], []  # what was half made goes before what is free is asked
        raise OutOfMemory(_what_would_fit(shapes, dtype, device, batch, length))

    def rows(self, part: slice) -> KeyValueCache:
        """Some of the rows, in the same memory."""
        view = object.__new__(KeyValueCache)
        view.keys, view.values = [keys[part] for keys in self.keys], [values[part] for values in self.values]
        view.batch, view.length = len(view.keys[0]), self.length
        return view


def rounded_length(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _what_would_fit(
    shapes: list[tuple[int, int, int, int, int]], dtype: torch.dtype, device: torch.device, batch: int, length: int
) -> str:
    position = sum(2 * kv_heads * head_dim for _, _, kv_heads, _, head_dim in shapes) * dtype.itemsize
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    positions = free * 9 // 10 // position
    return (
        f"{device} has no memory for keys and values of batch {batch} x {length} positions "
        f"({batch * length * position / 1e9:.1f} GB; {free / 1e9:.1f} GB are free); what would fit: "
        f"batch {batch} x {positions // batch} positions, or batch {max(positions // length, 0)} x {length}"
    )
