"""Host half of kernels/*.hip: the variants of each kernel, what they are compiled with, and their launches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from awq_rt.packing import Kind
from awq_rt.rtc import Program

from .driver import Shape
from .packing import STRIP

KERNELS = Path(__file__).parent / "kernels"
DEQUANTIZE_THREADS, TILES_A_BLOCK = 256, 4
GEMM_ARGUMENTS, DEQUANTIZE_ARGUMENTS = 10, 7


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut a product; the words are those of kernels/gemv.hip and kernels/gemm.hip."""

    entry: str  # "gemv" on the vector units, "gemm" on the matrix unit
    rows: int
    waves: int
    depth: int = 0  # of gemv
    strips: int = 1  # of gemm

    def __str__(self) -> str:
        cut = f"depth {self.depth}" if self.entry == "gemv" else f"strips {self.strips}"
        return f"{self.entry} rows {self.rows}, waves {self.waves}, {cut}"

    def shape(self, m: int, n: int, wave_size: int) -> Shape:
        """The launch for `m` rows of x and `n` columns of W. Blocks that share weights are neighbours."""
        return Shape((-(-m // self.rows), -(-n // (self.strips * STRIP)), 1), self.waves * wave_size)

    def program(self, kind: Kind, arch: str) -> Program:
        defines = kind.defines() | {"ROWS": self.rows, "WAVES": self.waves}
        defines |= {"DEPTH": self.depth} if self.entry == "gemv" else {"STRIPS": self.strips}
        return Program.from_file(KERNELS / f"{self.entry}.hip", arch, defines)


def dequantize_program(kind: Kind, arch: str) -> Program:
    """The whole weight as activations, for large products by torch's BLAS."""
    return Program.from_file(KERNELS / "dequantize.hip", arch, kind.defines())


def dequantize_shape(strips: int, tiles: int) -> Shape:
    return Shape((-(-tiles // TILES_A_BLOCK), strips, 1), DEQUANTIZE_THREADS)
