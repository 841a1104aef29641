"""The packed form: strips of 16 columns that a kernel reads from the first byte to the last.

`src/kernels.h` has it byte by byte. Eight codes of one column along k are a 32-bit word, sixteen columns' words a
line of 64 bytes, a strip all its lines, then its scales and zero points as the checkpoint has them. Zero points are
applied to sums: `scale * (x @ codes - zero * sum(x))` over each group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.errors import InvalidInput
from awq_rt.weights import AwqWeight

from . import _native

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""The native module's numbers. float64 is a bias's only."""

STRIP = 16
"""Columns of a strip."""

_BY_NAME = {str(dtype): dtype for dtype in DTYPES}


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything that the packed tensors (strips, perhaps bias) do not say of themselves; its text is theirs."""

    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype  # of activations
    scale_dtype: torch.dtype
    bias_dtype: torch.dtype | None
    mode: str  # "auto", "gemv" or "gemm"; "int8" for 8-bit activations

    def __str__(self) -> str:
        return " ".join(str(getattr(self, field.name)) for field in fields(self))

    @classmethod
    def of(cls, weight: AwqWeight, spec: LinearSpec, mode: str) -> Layout:
        bias = None if weight.bias is None else weight.bias.dtype
        sizes = (weight.in_features, weight.out_features, weight.group_size)
        return cls(*sizes, spec.dtype, weight.scales.dtype, bias, mode)

    @classmethod
    def parse(cls, text: str) -> Layout:
        in_features, out_features, group_size, dtype, scale_dtype, bias_dtype, mode = text.split()
        sizes = (int(in_features), int(out_features), int(group_size))
        return cls(*sizes, _BY_NAME[dtype], _BY_NAME[scale_dtype], _BY_NAME.get(bias_dtype), mode)

    def native(self) -> _native.Linear:
        sizes = (self.in_features, self.out_features, self.group_size)
        bias = None if self.bias_dtype is None else DTYPES[self.bias_dtype]
        return _native.Linear(*sizes, DTYPES[self.dtype], DTYPES[self.scale_dtype], bias, self.mode)


@functools.lru_cache(maxsize=4096)
def _of_text(text: str) -> tuple[Layout, _native.Linear]:
    layout = Layout.parse(text)
    return layout, layout.native()


def pack(weight: AwqWeight, layout: Layout) -> Packed:
    """`weight`, on the CPU, as strips."""
    text = str(layout)
    _, native = _of_text(text)
    strips = torch.empty(native.bytes, dtype=torch.uint8, device="cpu")
    codes, zeros, scales = (part.contiguous() for part in (weight.codes, weight.zeros, weight.scales))
    places = (codes.data_ptr(), zeros.data_ptr(), scales.data_ptr())
    native.pack(*places, strips.data_ptr(), torch.get_num_threads())
    return Packed(text, (strips,) if weight.bias is None else (strips, weight.bias.contiguous()))


def unpack(packed: Packed) -> AwqWeight:
    """The exact inverse of `pack`."""
    layout, native = _of_text(packed.layout)
    strips, *bias = packed.tensors
    k, n, groups = layout.in_features, layout.out_features, layout.in_features // layout.group_size
    codes = torch.empty(k, n, dtype=torch.uint8, device="cpu")
    zeros = torch.empty(groups, n, dtype=torch.uint8, device="cpu")
    scales = torch.empty(groups, n, dtype=layout.scale_dtype, device="cpu")
    places = (codes.data_ptr(), zeros.data_ptr(), scales.data_ptr())
    native.unpack(strips.data_ptr(), *places, torch.get_num_threads())
    return AwqWeight(codes, zeros, scales, *bias)


def join(parts: Sequence[Packed]) -> tuple[Packed, tuple[Packed, ...]] | None:
    """Weights that read the same x, side by side: their strips one after the other, and each part as a view of them.

    None where a strip would hold columns of two parts, or where what is not columns differs.
    """
    layouts = [_of_text(part.layout)[0] for part in parts]
    total = sum(layout.out_features for layout in layouts)
    if len({replace(layout, out_features=total) for layout in layouts}) > 1:
        return None
    if any(layout.out_features % STRIP for layout in layouts[:-1]):
        return None
    whole = [torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)]
    views = [torch.split(whole[0], [part.tensors[0].numel() for part in parts])]
    if len(whole) > 1:
        views.append(torch.split(whole[1], [layout.out_features for layout in layouts]))
    joined = Packed(str(replace(layouts[0], out_features=total)), tuple(whole))
    pieces = zip(parts, zip(*views, strict=True), strict=True)
    return joined, tuple(Packed(part.layout, tensors) for part, tensors in pieces)


def linear(x: Tensor, packed: Packed) -> Tensor:
    """`x` [..., K] -> [..., N]. Raises `InvalidInput` for what the kernels would read as something else."""
    layout, native = _of_text(packed.layout)
    tensors = packed.tensors
    bias = tensors[1].data_ptr() if layout.bias_dtype else 0
    y = native.run(x, tensors[0].data_ptr(), bias, torch.get_num_threads())
    if y is NotImplemented:
        raise InvalidInput(
            f"the input is {x.dtype} {list(x.shape)} on {x.device}; {layout.dtype} [..., {layout.in_features}] "
            "on the CPU is what the weight was packed for"
        )
    return y
