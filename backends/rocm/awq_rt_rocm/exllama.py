"""The family `exllama`: host half of awq_rt/kernels/exllama.cu and exllama_dequantize.cu.

A layout of its own (awq_rt/packing/exllama.py), no matrix unit: few rows in one kernel, many by dequantising into a
buffer and torch's BLAS. For whoever pins it; `auto` never chooses it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_rt.backend import Packed
from awq_rt.packing import Kind, Layout
from awq_rt.packing.exllama import STRIP, WORD_ROWS
from awq_rt.rtc import Program

from . import device
from .driver import Kernel
from .launcher import HipLauncher

COLUMNS = 32
"""Of W that a block computes."""

TILE_DEPTH = 128
"""Rows of W that a wave multiplies at a time."""

ROW_STEPS = (1, 2, 8)
"""Rows of x that a block may compute; more than the last are more blocks, which read the weight again. With 4 rows
waves of 32 would spill where a tile has several groups."""

MOST_WAVES = 8
"""Of a block: with 8 rows their x takes 32 KiB of shared memory."""

DEQUANTIZE_FROM = 17
"""Rows of x from which the weight is dequantised for torch's BLAS. Reckoned, not measured."""

ARGUMENTS, DEQUANTIZE_ARGUMENTS = 9, 6
DEQUANTIZE_WAVES = 8
LAUNCHER = HipLauncher()


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut the work; the words are those of exllama.cu."""

    rows: int
    waves: int

    @property
    def shared_bytes(self) -> int:
        """x in float32, and sums in its place."""
        return self.waves * self.rows * TILE_DEPTH * 4

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        return -(-n // COLUMNS), -(-m // self.rows), 1

    def defines(self, kind: Kind) -> dict[str, str | int]:
        return kind.defines() | {"ROWS": self.rows, "WAVES": self.waves, "MIN_BLOCKS": 1}


def choose(m: int, in_features: int) -> Variant:
    """The variant for `m` rows of x."""
    tiles = -(-in_features // TILE_DEPTH)
    waves = min(MOST_WAVES, 1 << (tiles - 1).bit_length())
    return Variant(next((step for step in ROW_STEPS if step >= m), ROW_STEPS[-1]), waves)


def dequantize_grid(n: int, k: int, lanes: int) -> tuple[int, int, int]:
    return -(-n // (lanes * STRIP)), -(-k // (DEQUANTIZE_WAVES * WORD_ROWS)), 1


class ExllamaLinear:
    """The kernels of one layout on one device."""

    def __init__(self, layout: Layout, device_index: int) -> None:
        self.layout = layout
        self.kind = Kind.of(layout, layout.group_size)
        self.device_index = device_index
        self.lanes = LAUNCHER.lanes(device_index)
        # Where a column has one group, rounded weights would all err alike (tiled.py): the kernel multiplies integers.
        self._dequantize_from = DEQUANTIZE_FROM if layout.group_size != layout.in_features else 1 << 62

    def programs(self) -> list[Program]:
        """Every program that `linear` may need."""
        found = [self._program(choose(step, self.layout.in_features)) for step in ROW_STEPS]
        return [*found, self._dequantize_program()]

    def build(self) -> None:
        """Compile and load all that `linear` may need."""
        device.builder().machine_codes(self.programs())
        for step in ROW_STEPS:
            load(self._program(choose(step, self.layout.in_features)), ARGUMENTS, self.device_index)
        load(self._dequantize_program(), DEQUANTIZE_ARGUMENTS, self.device_index)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [M, K], contiguous and 16-byte aligned -> [M, N]. The device is current."""
        m, k, n = x.shape[0], self.layout.in_features, self.layout.out_features
        if m >= self._dequantize_from:
            return self._by_blas(x, packed)
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        codes, zeros, scales, *bias = packed.tensors
        variant = choose(m, k)
        pointers = [codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), bias[0].data_ptr() if bias else 0]
        LAUNCHER.launch(
            load(self._program(variant), ARGUMENTS, self.device_index),
            self.device_index,
            variant.grid(m, n),
            variant.waves * self.lanes,
            *pointers,
            x.data_ptr(),
            y.data_ptr(),
            m,
            n,
            k,
            shared_bytes=variant.shared_bytes,
        )
        return y

    def weight(self, packed: Packed) -> Tensor:
        """W as activations [K, N], each weight rounded once."""
        codes, zeros, scales, *_ = packed.tensors
        k, n = self.layout.in_features, self.layout.out_features
        w = torch.empty(k, n, dtype=self.layout.dtype, device=codes.device)
        LAUNCHER.launch(
            load(self._dequantize_program(), DEQUANTIZE_ARGUMENTS, self.device_index),
            self.device_index,
            dequantize_grid(n, k, self.lanes),
            DEQUANTIZE_WAVES * self.lanes,
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            w.data_ptr(),
            n,
            k,
        )
        return w

    def _by_blas(self, x: Tensor, packed: Packed) -> Tensor:
        bias = packed.tensors[3] if len(packed.tensors) > 3 else None
        w = self.weight(packed)
        if bias is None:
            return x @ w
        if self.layout.bias_dtype == x.dtype:
            return torch.addmm(bias.to(x.dtype), x, w)
        return ((x @ w).float() + bias).to(x.dtype)

    def _program(self, variant: Variant) -> Program:
        return LAUNCHER.program("exllama", variant.defines(self.kind), self.device_index)

    def _dequantize_program(self) -> Program:
        return LAUNCHER.program("exllama_dequantize", self.kind.defines(), self.device_index)


@functools.cache
def load(program: Program, arguments: int, device_index: int) -> Kernel:
    """`program`'s kernel, loaded once."""
    return LAUNCHER.load(program, arguments, device_index)


@functools.cache
def plan(layout: str, device_index: int) -> ExllamaLinear:
    """The plan for a `Packed.layout`."""
    return ExllamaLinear(Layout.parse(layout), device_index)
