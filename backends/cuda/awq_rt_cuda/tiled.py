"""A linear whose weight lies in tiles: what was decided when it was packed, and the launch for each number of rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.packing import Kind, Layout
from awq_rt.rtc import Builder, Program
from awq_rt.weights import AwqWeight

from . import dequantize, gemm, packing, selection, selection_ring, tensor_map
from .driver import Kernel, Shape, current_stream, shared_bytes_per_block
from .gemm import Variant
from .nvrtc import Nvrtc, target
from .packing import STRIP, TILE_DEPTH
from .ring import Ring

PREFIX = "tiles"
SUM_ARGUMENTS, DEQUANTIZE_ARGUMENTS = 5, 8


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the weight of a layout is cut. Its tensors: codes, zeros, scales and, with a bias, float32 bias."""

    strips: int
    tiles: int
    groups: int  # that the kernels see
    repeats: int  # of them, that share one of the weight's groups
    kind: Kind

    @staticmethod
    def of(layout: Layout) -> Tiling:
        group_size = packing.kernel_group_size(layout.in_features, layout.group_size)
        tiles = -(-layout.in_features // TILE_DEPTH)
        return Tiling(
            strips=-(-layout.out_features // STRIP),
            tiles=tiles,
            groups=tiles * TILE_DEPTH // group_size,
            repeats=max(1, layout.group_size // group_size),
            kind=Kind.of(layout, group_size),
        )


def pack(weight: AwqWeight, spec: LinearSpec) -> Packed:
    """`weight` in tiles, on its own device."""
    layout = Layout.of(PREFIX, weight, spec)
    cut = Tiling.of(layout)
    tensors = [
        packing.pack_codes(weight.codes),
        packing.pack_zeros(weight.zeros, cut.repeats, cut.groups),
        packing.pack_scales(weight.scales, cut.repeats, cut.groups),
    ]
    if weight.bias is not None:
        tensors.append(weight.bias.float().contiguous())
    return Packed(str(layout), tuple(tensors))


def unpack(packed: Packed) -> AwqWeight:
    """The exact inverse of `pack`."""
    layout = Layout.parse(packed.layout)
    codes, zeros, scales, *bias = packed.tensors
    repeats, groups = Tiling.of(layout).repeats, layout.in_features // layout.group_size
    return AwqWeight(
        packing.unpack_codes(codes, layout.in_features, layout.out_features),
        packing.unpack_zeros(zeros, repeats, groups, layout.out_features),
        packing.unpack_scales(scales, repeats, groups, layout.out_features),
        bias[0].to(layout.bias_dtype) if bias and layout.bias_dtype is not None else None,
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """A product's kernel, its launch, the sizes it is told, and the kernel that adds its parts where it leaves any."""

    variant: Variant | Ring
    kernel: Kernel
    shape: Shape
    sizes: tuple[int, ...]
    adder: Kernel | None


class TiledLinear:
    """The kernels of one layout on one device. Compiled all at once by `build`, never in the middle of a generation."""

    def __init__(self, layout: Layout, device_index: int) -> None:
        self.layout = layout
        self.tiling = Tiling.of(layout)
        self.kind = self.tiling.kind
        self.device_index = device_index
        self.target = target_of(device_index)
        self.arch = target(f"sm_{self.target.arch}")
        self._gemm: dict[int, tuple[Variant | Ring, Kernel, Kernel | None]] = {}
        self._launches: dict[int, Launch] = {}
        self._more_steps = selection_ring.row_steps(self.kind, self.target)
        self._dequantize_from = 1 << 62
        if layout.kernel == "auto" and not self._more_steps:
            self._dequantize_from = selection.DEQUANTIZE_FROM

    def variants(self) -> list[Variant | Ring]:
        """Every variant that `linear` may use."""
        return list(dict.fromkeys(self.variant(step) for step in self.steps()))

    def steps(self) -> list[int]:
        """The numbers of rows that this layout's family chooses a variant for."""
        return sorted({self.step(m) for m in selection.ROW_STEPS + self._more_steps})

    def step(self, m: int) -> int:
        """The number of rows that is chosen for where there are `m`."""
        return selection.row_step(m, self.layout.kernel, self._more_steps)

    def by_blas(self, m: int) -> bool:
        """Whether a product of `m` rows dequantises the weight for torch's BLAS."""
        return m >= self._dequantize_from

    def programs(self) -> list[Program]:
        """Every program that `linear` may need."""
        kind = self.kind
        found = [variant.program(kind, self.arch) for variant in self.variants()]
        found += [gemm.sum_program(kind, v.split, self.arch) for v in self.variants() if v.to_partials]
        if self.layout.kernel == "auto":
            found.append(dequantize.program(kind, self.arch))
        return found

    def build(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compile and load all that `linear` may need."""
        builder().machine_codes(self.programs(), progress)
        for step in self.steps():
            self._gemm_kernels(step)
        if self.layout.kernel == "auto":
            load_dequantize(self.kind, self.device_index)

    def linear(self, x: Tensor, packed: Packed) -> Tensor:
        """`x` [M, K], contiguous and 16-byte aligned -> [M, N]. The device is current."""
        m = x.shape[0]
        if self.by_blas(m):
            return self._by_blas(x, packed)
        y = torch.empty(m, self.layout.out_features, dtype=x.dtype, device=x.device)
        if m == 0:
            return y
        codes, zeros, scales, *bias = packed.tensors
        launch = self._launches.get(m) or self._launch(m)
        bias_pointer = bias[0].data_ptr() if bias else 0
        stream = current_stream(self.device_index)
        if isinstance(launch.variant, Ring):
            launch.kernel.launch(
                launch.shape,
                stream,
                scales.data_ptr(),
                zeros.data_ptr(),
                bias_pointer,
                y.data_ptr(),
                *launch.sizes,
                *tensor_map.of_tiles(codes, launch.variant.columns // STRIP),
                *tensor_map.of_rows(x, launch.variant.copied_rows),
                *tensor_map.of_rows(y, launch.variant.rows),
            )
            return y
        out = y
        if launch.adder is not None:
            out = torch.empty(launch.variant.split, *y.shape, dtype=torch.float32, device=x.device)
        launch.kernel.launch(
            launch.shape,
            stream,
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            bias_pointer,
            x.data_ptr(),
            out.data_ptr(),
            *launch.sizes,
        )
        if launch.adder is not None:
            quads = self.layout.out_features // 4
            shape = gemm.sum_shape(m, self.layout.out_features)
            launch.adder.launch(shape, stream, out.data_ptr(), bias_pointer, y.data_ptr(), quads, m * quads)
        return y

    def _launch(self, m: int) -> Launch:
        """What a product of `m` rows needs beside its tensors; kept, because finding it costs as much as a launch."""
        layout = self.layout
        variant, kernel, adder = self._gemm_kernels(self.step(m))
        depth = () if isinstance(variant, Ring) else (layout.in_features,)
        sizes = (m, layout.out_features, *depth, self.tiling.strips, self.tiling.tiles, self.tiling.groups)
        launch = Launch(variant, kernel, variant.shape(m, layout.out_features), sizes, adder)
        self._launches[m] = launch
        return launch

    def weight(self, packed: Packed, dtype: torch.dtype) -> Tensor:
        """W as `dtype` [N, K], each weight rounded once."""
        return self._dequantized(packed, packed.tensors[2], dtype)

    def _dequantized(self, packed: Packed, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """(codes - zeros) * `scales` as `dtype` [N, K]; `scales` as they are packed."""
        codes, zeros, *_ = packed.tensors
        layout = self.layout
        w = torch.empty(layout.out_features, layout.in_features, dtype=dtype, device=codes.device)
        load_dequantize(self.kind, self.device_index).launch(
            dequantize.shape(self.tiling.strips, self.tiling.tiles),
            current_stream(self.device_index),
            codes.data_ptr(),
            scales.data_ptr(),
            zeros.data_ptr(),
            w.data_ptr(),
            layout.out_features,
            layout.in_features,
            self.tiling.tiles,
            self.tiling.groups,
        )
        return w

    def _by_blas(self, x: Tensor, packed: Packed) -> Tensor:
        _, _, scales, *bias = packed.tensors
        if self.layout.group_size == self.layout.in_features:
            # A column has 16 different weights. Rounded, they would all err alike, and K errors add up to more than the
            # bound where x has a mean. Their integers are exact, and the one scale is applied to the sums.
            integers = self._dequantized(packed, torch.ones_like(scales), x.dtype)
            sums = torch.mm(x, integers.T, out_dtype=torch.float32)
            y = sums * packing.unpack_scales(scales, 1, 1, self.layout.out_features)
            return (y + bias[0] if bias else y).to(x.dtype)
        w = self.weight(packed, x.dtype)
        if not bias:
            return x @ w.T
        if self.layout.bias_dtype == x.dtype:
            return torch.addmm(bias[0].to(x.dtype), x, w.T)
        # A wider bias would be rounded before it is added: it is added to the float32 result instead.
        return (torch.mm(x, w.T, out_dtype=torch.float32) + bias[0]).to(x.dtype)

    def variant(self, step: int) -> Variant | Ring:
        """The variant that serves the number of rows `step`."""
        return selection.choose(step, self.tiling.strips, self.tiling.tiles, self.kind, self.target)

    def _gemm_kernels(self, step: int) -> tuple[Variant | Ring, Kernel, Kernel | None]:
        if step not in self._gemm:
            self._gemm[step] = load(self.variant(step), self.kind, self.device_index)
        return self._gemm[step]


@functools.cache
def load(variant: Variant | Ring, kind: Kind, device_index: int) -> tuple[Variant | Ring, Kernel, Kernel | None]:
    """`variant` compiled and loaded, with the kernel that adds its partial results where it leaves any."""
    arch = target(f"sm_{target_of(device_index).arch}")
    code = builder().machine_code(variant.program(kind, arch))
    kernel = Kernel(code, variant.entry, device_index, variant.arguments, variant.shared_bytes)
    if not variant.to_partials:
        return variant, kernel, None
    code = builder().machine_code(gemm.sum_program(kind, variant.split, arch))
    return variant, kernel, Kernel(code, "sum_parts", device_index, SUM_ARGUMENTS)


@functools.cache
def load_dequantize(kind: Kind, device_index: int) -> Kernel:
    """The kernel of dequantize.cu compiled and loaded."""
    arch = target(f"sm_{target_of(device_index).arch}")
    code = builder().machine_code(dequantize.program(kind, arch))
    return Kernel(code, "dequantize_tiles", device_index, DEQUANTIZE_ARGUMENTS)


@functools.cache
def plan(layout: str, device_index: int) -> TiledLinear:
    """The plan for a `Packed.layout`."""
    return TiledLinear(Layout.parse(layout), device_index)


@functools.cache
def builder() -> Builder:
    return Builder(Nvrtc())


@functools.cache
def target_of(device_index: int) -> selection.Target:
    properties = torch.cuda.get_device_properties(device_index)
    return selection.Target(
        properties.major * 10 + properties.minor,
        properties.multi_processor_count,
        shared_bytes_per_block(device_index),
        properties.shared_memory_per_multiprocessor,
        properties.max_threads_per_multi_processor,
    )
