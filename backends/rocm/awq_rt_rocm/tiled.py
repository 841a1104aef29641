"""A linear whose weight lies in tiles: what was decided when it was packed, and the launch for each number of rows."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed, Prepared
from awq_rt.errors import UnsupportedDevice
from awq_rt.rtc import Builder, Program
from awq_rt.weights import AwqWeight

from . import kernel, packing, selection, targets
from .driver import Kernel, Shape, current_stream
from .hiprtc import Hiprtc
from .kernel import Kind, Variant

PREFIX = "tiles"
SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Layout:
    """A tiled weight's `Packed.layout`, parsed. Tensors: codes, groups and, with a bias, float32 bias."""

    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    kernel: str

    def __str__(self) -> str:
        parts = [PREFIX, self.in_features, self.out_features, self.group_size]
        parts += [_name(self.dtype), _name(self.scale_dtype), _name(self.bias_dtype), self.kernel]
        return " ".join(map(str, parts))

    @staticmethod
    def parse(text: str) -> Layout:
        _, k, n, g, dtype, scale_dtype, bias_dtype, family = text.split()
        bias = DTYPES.get(bias_dtype)
        return Layout(int(k), int(n), int(g), DTYPES[dtype], DTYPES[scale_dtype], bias, family)

    @staticmethod
    def of(spec: LinearSpec, scale_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> Layout:
        sizes = (spec.in_features, spec.out_features, spec.group_size)
        return Layout(*sizes, spec.dtype, scale_dtype, bias_dtype, spec.kernel)

    @property
    def strips(self) -> int:
        return -(-self.out_features // packing.STRIP)

    @property
    def tiles(self) -> int:
        return selection.tiles_of(self.in_features)

    @property
    def groups(self) -> int:
        return packing.group_count(self.in_features, self.group_size)

    @property
    def kind(self) -> Kind:
        group_size = packing.kernel_group_size(self.in_features, self.group_size)
        return Kind(self.dtype == torch.float16, SCALE_KINDS[self.scale_dtype], group_size)


def pack(weight: AwqWeight, spec: LinearSpec) -> Packed:
    """`weight` in tiles, on its own device."""
    layout = Layout.of(spec, weight.scales.dtype, None if weight.bias is None else weight.bias.dtype)
    tensors = [
        packing.pack_codes(weight.codes, weight.zeros),
        packing.pack_groups(weight.scales, weight.zeros, layout.groups),
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
        self.architecture = architecture_of(device_index)
        self.unit = selection.matrix_unit(layout.kind, self.architecture)
        self._launches: dict[int, Launch] = {}

    def variants(self) -> list[Variant]:
        """Every variant that `linear` may use."""
        steps = selection.GEMV_STEPS + selection.GEMM_STEPS
        return list(dict.fromkeys(self._variant(m) for m in steps))

    def programs(self) -> list[Program]:
        """Every program that `linear` may need."""
        kind, arch = self.layout.kind, self.architecture.name
        found = [variant.program(kind, arch) for variant in self.variants()]
        if self.layout.kernel == "auto":
            found.append(kernel.dequantize_program(kind, arch))
        return found

    def build(self) -> None:
        """Compile and load all that `linear` may need."""
        builder().machine_codes(self.programs())
        for variant in self.variants():
            load(variant, self.layout.kind, self.architecture.name, self.device_index)
        if self.layout.kernel == "auto":
            load_dequantize(self.layout.kind, self.architecture.name, self.device_index)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [M, K], contiguous and 16-byte aligned -> [M, N]. The device is current."""
        m = x.shape[0]
        if selection.dequantizes(m, self.layout.kernel, self.unit):
            return self._by_blas(x, packed)
        y = torch.empty(m, self.layout.out_features, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        codes, constants, *bias = packed.tensors
        launch = self._launches.get(m) or self._launch(m)
        launch.kernel.launch(
            launch.shape,
            current_stream(self.device_index),
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
        load_dequantize(layout.kind, self.architecture.name, self.device_index).launch(
            kernel.dequantize_shape(layout.strips, layout.tiles),
            current_stream(self.device_index),
            codes.data_ptr(),
            constants.data_ptr(),
            w.data_ptr(),
            layout.out_features,
            layout.in_features,
            layout.tiles,
            layout.groups,
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

    def _variant(self, m: int) -> Variant:
        rows = selection.step(m, self.layout.kernel, self.unit)
        return selection.variant(rows, self.layout.tiles, self.unit)

    def _launch(self, m: int) -> Launch:
        """What a product of `m` rows needs beside its tensors; kept, because finding it costs as much as a launch."""
        layout, variant = self.layout, self._variant(m)
        shape = variant.shape(m, layout.out_features, self.architecture.wave_size)
        sizes = (m, layout.out_features, layout.in_features, layout.tiles, layout.groups)
        launch = Launch(load(variant, layout.kind, self.architecture.name, self.device_index), shape, sizes)
        self._launches[m] = launch
        return launch


def warmup(layouts: list[Layout], device_index: int) -> Iterator[Prepared]:
    """Compile all that `layouts` need on the device, each kernel once."""
    plans = [plan(str(layout), device_index) for layout in layouts]
    programs = list(dict.fromkeys(program for its in plans for program in its.programs()))
    for done, built in enumerate(builder().build(programs), start=1):
        yield Prepared(str(built.program), built.compiled, done, len(programs))


@functools.cache
def load(variant: Variant, kind: Kind, arch: str, device_index: int) -> Kernel:
    """`variant` compiled and loaded."""
    code = builder().machine_code(variant.program(kind, arch))
    return Kernel(code, variant.entry, device_index, kernel.GEMM_ARGUMENTS)


@functools.cache
def load_dequantize(kind: Kind, arch: str, device_index: int) -> Kernel:
    """The kernel of dequantize.hip compiled and loaded."""
    code = builder().machine_code(kernel.dequantize_program(kind, arch))
    return Kernel(code, "dequantize_tiles", device_index, kernel.DEQUANTIZE_ARGUMENTS)


@functools.cache
def plan(layout: str, device_index: int) -> TiledLinear:
    """The plan for a `Packed.layout`."""
    return TiledLinear(Layout.parse(layout), device_index)


@functools.cache
def builder() -> Builder:
    return Builder(Hiprtc())


@functools.cache
def architecture_of(device_index: int) -> targets.Architecture:
    """Raises `UnsupportedDevice` for a GPU that the kernels do not run on."""
    properties = torch.cuda.get_device_properties(device_index)
    found = targets.architecture(properties.gcnArchName)
    if found is None or properties.warp_size != found.wave_size:
        raise UnsupportedDevice(
            f"cuda:{device_index} is {properties.gcnArchName} with waves of {properties.warp_size} lanes, which the "
            f"kernels are not written for; use backend='reference' [{targets.OVERRIDE} may be set]"
        )
    return found


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
