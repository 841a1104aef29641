"""A linear whose weight lies in tiles: what was decided when it was packed, and the launch for each number of rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.packing import Kind, Layout
from awq_rt.rtc import Program
from awq_rt.weights import AwqWeight

from . import device, driver, kernel, packing, selection
from .driver import Kernel, Shape
from .kernel import Variant

PREFIX = "tiles"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the weight of a layout is cut. Its tensors: codes, groups and, with a bias, float32 bias."""

    strips: int
    tiles: int
    groups: int  # that the kernels see
    kind: Kind

    @staticmethod
    def of(layout: Layout) -> Tiling:
        return Tiling(
            strips=-(-layout.out_features // packing.STRIP),
            tiles=selection.tiles_of(layout.in_features),
            groups=packing.group_count(layout.in_features, layout.group_size),
            kind=Kind.of(layout, packing.kernel_group_size(layout.in_features, layout.group_size)),
        )


def pack(weight: AwqWeight, spec: LinearSpec) -> Packed:
    """`weight` in tiles, on its own device."""
    layout = Layout.of(PREFIX, weight, spec)
    tensors = [
        packing.pack_codes(weight.codes, weight.zeros),
        packing.pack_groups(weight.scales, weight.zeros, Tiling.of(layout).groups),
    ]
    if weight.bias is not None:
        tensors.append(weight.bias.float().contiguous())
    return Packed(str(layout), tuple(tensors))


def unpack(packed: Packed) -> AwqWeight:
    """The exact inverse of `pack`."""
    layout = Layout.parse(packed.layout)
    codes, constants, *bias = packed.tensors
    groups = layout.in_features // layout.group_size
    scales, zeros = packing.unpack_groups(constants, layout.scale_dtype, groups, layout.out_features)
    return AwqWeight(
        packing.unpack_codes(codes, layout.in_features, layout.out_features),
        zeros,
        scales,
        bias[0].to(layout.bias_dtype) if bias and layout.bias_dtype is not None else None,
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """A product's kernel, its launch and the sizes it is told."""

    kernel: Kernel
    shape: Shape
    sizes: tuple[int, ...]


class TiledLinear:
    """The kernels of one layout on one device. Compiled all at once by `build`, never in the middle of a generation."""

    def __init__(self, layout: Layout, device_index: int) -> None:
        self.layout = layout
        self.device_index = device_index
        self.architecture = device.architecture_of(device_index)
        self.tiling = Tiling.of(layout)
        self.kind = self.tiling.kind
        self.unit = selection.matrix_unit(self.kind, layout.kernel, self.architecture)
        # Where a column has one group it has 16 different weights. Rounded, they would all err alike, and their errors
        # add up to more than the bound where x has a mean: the kernels multiply the integers instead.
        by_blas = layout.kernel == "auto" and layout.group_size != layout.in_features
        self._dequantize_from = selection.DEQUANTIZE_FROM[self.unit] if by_blas else 1 << 62
        self._launches: dict[int, Launch] = {}

    def variants(self) -> list[Variant]:
        """Every variant that `linear` may use."""
        return selection.variants(self.tiling.tiles, self.layout.kernel, self.unit)

    def programs(self) -> list[Program]:
        """Every program that `linear` may need."""
        kind, arch = self.kind, self.architecture.name
        found = [variant.program(kind, arch) for variant in self.variants()]
        if self.layout.kernel == "auto":
            found.append(kernel.dequantize_program(kind, arch))
        return found

    def build(self) -> None:
        """Compile and load all that `linear` may need."""
        device.builder().machine_codes(self.programs())
        for variant in self.variants():
            load(variant, self.kind, self.architecture.name, self.device_index)
        if self.layout.kernel == "auto":
            load_dequantize(self.kind, self.architecture.name, self.device_index)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [M, K], contiguous and 16-byte aligned -> [M, N]. The device is current."""
        m = x.shape[0]
        if m >= self._dequantize_from:
            return self._by_blas(x, packed)
        y = torch.empty(m, self.layout.out_features, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        codes, constants, *bias = packed.tensors
        launch = self._launches.get(m) or self._launch(m)
        launch.kernel.launch(
            launch.shape,
            driver.current_stream(self.device_index),
            codes.data_ptr(),
            constants.data_ptr(),
            bias[0].data_ptr() if bias else 0,
            x.data_ptr(),
            y.data_ptr(),
            *launch.sizes,
        )
        return y

    def weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """W as `dtype` [N, K], each weight rounded once."""
        codes, constants, *_ = packed.tensors
        layout = self.layout
        w = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=codes.device)
        load_dequantize(self.kind, self.architecture.name, self.device_index).launch(
            kernel.dequantize_shape(self.tiling.strips, self.tiling.tiles),
            driver.current_stream(self.device_index),
            codes.data_ptr(),
            constants.data_ptr(),
            w.data_ptr(),
            layout.out_features,
            layout.in_features,
            self.tiling.tiles,
            self.tiling.groups,
        )
        return w

    def _by_blas(self, x: Tensor, packed: Packed) -> Tensor:
        bias = packed.tensors[2] if len(packed.tensors) > 2 else None
        w = self.weight(packed, x.dtype)
        if bias is None:
            return x @ w.T
        if self.layout.bias_dtype == x.dtype:
            return torch.addmm(bias.to(x.dtype), x, w.T)
        return ((x @ w.T).float() + bias).to(x.dtype)

    def _launch(self, m: int) -> Launch:
        """What a product of `m` rows needs beside its tensors; kept, because finding it costs as much as a launch."""
        layout = self.layout
        variant = selection.variant(m, self.tiling.tiles, layout.kernel, self.unit)
        shape = variant.shape(m, layout.out_features, self.architecture.wave_size)
        sizes = (m, layout.out_features, layout.in_features, self.tiling.tiles, self.tiling.groups)
        launch = Launch(load(variant, self.kind, self.architecture.name, self.device_index), shape, sizes)
        self._launches[m] = launch
        return launch


@functools.cache
def load(variant: Variant, kind: Kind, arch: str, device_index: int) -> Kernel:
    """`variant` compiled and loaded."""
    code = device.builder().machine_code(variant.program(kind, arch))
    return Kernel(code, variant.entry, device_index, kernel.GEMM_ARGUMENTS)


@functools.cache
def load_dequantize(kind: Kind, arch: str, device_index: int) -> Kernel:
    """The kernel of dequantize.hip compiled and loaded."""
    code = device.builder().machine_code(kernel.dequantize_program(kind, arch))
    return Kernel(code, "dequantize_tiles", device_index, kernel.DEQUANTIZE_ARGUMENTS)


@functools.cache
def plan(layout: str, device_index: int) -> TiledLinear:
    """The plan for a `Packed.layout`."""
    return TiledLinear(Layout.parse(layout), device_index)
