"""The family `exllama`: host half of kernels/exllama.cu and exllama_dequantize.cu.

A layout of its own (awq_rt/packing/exllama.py), no matrix unit: few rows in one kernel, many by dequantising into a
buffer and torch's BLAS. For whoever pins it; `auto` never chooses it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_rt import kernels
from awq_rt.backend import Packed
from awq_rt.packing import Kind, Layout
from awq_rt.packing.exllama import STRIP, WORD_ROWS
from awq_rt.rtc import Program

from .driver import Kernel, Shape, current_stream
from .gemm import KERNELS
from .nvrtc import target
from .tiled import builder, target_of

COLUMNS = 32
"""Of W that a block computes."""

TILE_DEPTH = 128
"""Rows of W that a wave multiplies at a time."""

ROW_STEPS = (1, 2, 4, 8)
"""Rows of x that a block may compute. More than the last are more blocks, which read the weight again."""

RESIDENT = {1: 3, 2: 2, 4: 2, 8: 2}
"""Blocks of 8 waves, by their rows, that find registers in a multiprocessor without a spill."""

DEQUANTIZE_FROM = 17
"""Rows of x from which dequantising and torch's BLAS win. NVIDIA H100 80GB HBM3, 2026-11-22, three shapes."""

ARGUMENTS, DEQUANTIZE_ARGUMENTS = 9, 6
DEQUANTIZE_WAVES = 8
LANES = 32


def kind_of(layout: Layout) -> Kind:
    return Kind.of(layout, layout.group_size)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut the work; the words are those of kernels/exllama.cu."""

    rows: int
    waves: int
    min_blocks: int  # that a multiprocessor shall hold, which bounds a thread's registers

    def __str__(self) -> str:
        return f"exllama, rows {self.rows}, waves {self.waves}"

    @property
    def shared_bytes(self) -> int:
        """x in float32, and sums in its place."""
        return self.waves * self.rows * TILE_DEPTH * 4

    def shape(self, m: int, n: int) -> Shape:
        return Shape((-(-n // COLUMNS), -(-m // self.rows), 1), self.waves * LANES, self.shared_bytes)

    def program(self, kind: Kind, arch: str) -> Program:
        defines = kind.defines() | {"ROWS": self.rows, "WAVES": self.waves, "MIN_BLOCKS": self.min_blocks}
        return kernels.program("exllama", arch, defines, KERNELS)


def dequantize_program(kind: Kind, arch: str) -> Program:
    """The kernel that writes the whole weight as activations."""
    return kernels.program("exllama_dequantize", arch, kind.defines(), KERNELS)


def dequantize_shape(n: int, k: int) -> Shape:
    columns, rows = LANES * STRIP, DEQUANTIZE_WAVES * WORD_ROWS
    return Shape((-(-n // columns), -(-k // rows), 1), DEQUANTIZE_WAVES * LANES)


def choose(rows: int, layout: Layout, multiprocessors: int) -> Variant:
    """The variant for `rows` (one of `ROW_STEPS`): a full device, by many waves where blocks are few."""
    tiles, blocks = -(-layout.in_features // TILE_DEPTH), -(-layout.out_features // COLUMNS)
    each = -(-blocks // multiprocessors)
    waves = min(16 if each == 1 else 8, 1 << (tiles - 1).bit_length())
    resident = RESIDENT[rows]
    if layout.group_size % TILE_DEPTH:  # a lane holds the scales of several groups
        resident = min(2, resident)
    return Variant(rows, waves, min(each, resident))


def programs(layout: Layout, multiprocessors: int, arch: str) -> list[Program]:
    """Every program that a linear of `layout` may need on a device of so many multiprocessors."""
    kind = kind_of(layout)
    found = [choose(rows, layout, multiprocessors).program(kind, arch) for rows in ROW_STEPS]
    return [*found, dequantize_program(kind, arch)]


class ExllamaLinear:
    """The kernels of one layout on one device."""

    def __init__(self, layout: Layout, device_index: int) -> None:
        self.layout = layout
        self.kind = kind_of(layout)
        self.device_index = device_index
        self.target = target_of(device_index)
        self.arch = target(f"sm_{self.target.arch}")
        self._launches: dict[int, tuple[Kernel, Shape]] = {}

    def variant(self, step: int) -> Variant:
        """The variant that serves the number of rows `step`, one of `ROW_STEPS`."""
        return choose(step, self.layout, self.target.multiprocessors)

    def programs(self) -> list[Program]:
        """Every program that `linear` may need."""
        return programs(self.layout, self.target.multiprocessors, self.arch)

    def build(self) -> None:
        """Compile and load all that `linear` may need."""
        builder().machine_codes(self.programs())
        for step in ROW_STEPS:
            load(self.variant(step), self.kind, self.device_index)
        load_dequantize(self.kind, self.device_index)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [M, K], contiguous and 16-byte aligned -> [M, N]. The device is current."""
        m = x.shape[0]
        if m >= DEQUANTIZE_FROM:
            return self._by_blas(x, packed)
        k, n = self.layout.in_features, self.layout.out_features
        y = torch.empty(m, n, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        codes, zeros, scales, *bias = packed.tensors
        kernel, shape = self._launches.get(m) or self._launch(m)
        kernel.launch(
            shape,
            current_stream(self.device_index),
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            bias[0].data_ptr() if bias else 0,
            x.data_ptr(),
            y.data_ptr(),
            m,
            n,
            k,
        )
        return y

    def _launch(self, m: int) -> tuple[Kernel, Shape]:
        """What a product of `m` rows needs beside its tensors; kept, because finding it costs as much as a launch."""
        variant = self.variant(next((step for step in ROW_STEPS if step >= m), ROW_STEPS[-1]))
        kernel = load(variant, self.kind, self.device_index)
        self._launches[m] = kernel, variant.shape(m, self.layout.out_features)
        return self._launches[m]

    def weight(self, packed: Packed) -> Tensor:
        """W as activations [K, N], each weight rounded once."""
        return self._dequantized(packed, packed.tensors[2])

    def _dequantized(self, packed: Packed, scales: Tensor) -> Tensor:
        """(codes - zeros) * `scales` as activations [K, N]; `scales` as they are packed."""
        codes, zeros, *_ = packed.tensors
        k, n = self.layout.in_features, self.layout.out_features
        w = torch.empty(k, n, dtype=self.layout.dtype, device=codes.device)
        load_dequantize(self.kind, self.device_index).launch(
            dequantize_shape(n, k),
            current_stream(self.device_index),
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            w.data_ptr(),
            n,
            k,
        )
        return w

    def _by_blas(self, x: Tensor, packed: Packed) -> Tensor:
        _, _, scales, *bias = packed.tensors
        if self.layout.group_size == self.layout.in_features:
            # A column has 16 different weights. Rounded, they would all err alike, and K errors add up to more than the
            # bound where x has a mean. Their integers are exact, and the one scale is applied to the sums.
            sums = torch.mm(x, self._dequantized(packed, torch.ones_like(scales)), out_dtype=torch.float32)
            y = sums * scales.flatten()
            return (y + bias[0] if bias else y).to(x.dtype)
        w = self.weight(packed)
        if not bias:
            return x @ w
        if self.layout.bias_dtype == x.dtype:
            return torch.addmm(bias[0].to(x.dtype), x, w)
        # A wider bias would be rounded before it is added: it is added to the float32 result instead.
        return (torch.mm(x, w, out_dtype=torch.float32) + bias[0]).to(x.dtype)


@functools.cache
def load(variant: Variant, kind: Kind, device_index: int) -> Kernel:
    """`variant` compiled and loaded."""
    arch = target(f"sm_{target_of(device_index).arch}")
    code = builder().machine_code(variant.program(kind, arch))
    return Kernel(code, "exllama", device_index, ARGUMENTS, variant.shared_bytes)


@functools.cache
def load_dequantize(kind: Kind, device_index: int) -> Kernel:
    """The kernel of exllama_dequantize.cu compiled and loaded."""
    arch = target(f"sm_{target_of(device_index).arch}")
    code = builder().machine_code(dequantize_program(kind, arch))
    return Kernel(code, "exllama_dequantize", device_index, DEQUANTIZE_ARGUMENTS)


@functools.cache
def plan(layout: str, device_index: int) -> ExllamaLinear:
    """The plan for a `Packed.layout`."""
    return ExllamaLinear(Layout.parse(layout), device_index)
