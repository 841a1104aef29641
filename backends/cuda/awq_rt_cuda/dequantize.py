"""Host half of kernels/dequantize.cu: the whole weight as activations, for large products by torch's BLAS."""

from __future__ import annotations

from awq_rt.packing import Kind
from awq_rt.rtc import Program

from .driver import Shape, tall
from .gemm import KERNELS

WARPS = 8
"""Of a block; each takes one tile."""


def program(kind: Kind, arch: str) -> Program:
    return Program.from_file(KERNELS / "dequantize.cu", arch, kind.defines())


def shape(strips: int, tiles: int) -> Shape:
    return Shape((-(-tiles // WARPS), *tall(strips)), WARPS * 32)
