"""Host half of kernels/gemm.cuh on either matrix unit, and of kernels/sum_parts.cu: its variants and their launches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from awq_rt.packing import Kind
from awq_rt.rtc import Program

from .driver import Shape, tall
from .packing import STRIP, TILE_DEPTH

KERNELS = Path(__file__).parent / "kernels"
LANES = 32
BARRIER_BYTES = 16
"""Of a block whose cluster sends it sums; a multiple of what the sums are aligned to."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to cut the work; the words are those of kernels/gemm.cuh."""

    rows: int
    strips: int
    warps_n: int
    warps_k: int
    depth: int
    split: int = 1
    min_blocks: int = 1
    to_partials: bool = False
    unit: str = "mma"  # or "wgmma"
    reserved_bytes: int = 0  # shared memory asked for at least, which bounds the blocks that are resident

    def __str__(self) -> str:
        text = f"{self.unit}, rows {self.rows}, strips {self.strips}, warps {self.warps_n}x{self.warps_k}"
        text += f", depth {self.depth}"
        if self.split > 1:
            text += f", split {self.split}{' to partials' if self.to_partials else ''}"
        return text

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return f"gemm_{self.unit}"

    @property
    def arguments(self) -> int:
        """Slots of 8 bytes that a launch takes."""
        return 12

    @property
    def threads(self) -> int:
        return self.warps_n * self.warps_k * LANES

    @property
    def columns(self) -> int:
        return self.warps_n * self.strips * STRIP

    @property
    def shared_bytes(self) -> int:
        ring = self.warps_k * self.depth * self.rows * TILE_DEPTH * 2
        sums = self.warps_k * self.rows * (self.columns + 4) * 4
        own_quads = -(-self.rows * self.columns // 4 // self.split)
        received = self.split * own_quads * 16 + BARRIER_BYTES if self.split > 1 and not self.to_partials else 0
        return max(max(ring, sums) + received, self.reserved_bytes)

    def shape(self, m: int, n: int) -> Shape:
        """The launch for `m` rows of x and `n` columns of W."""
        blocks = -(-n // self.columns) * self.split
        cluster = 1 if self.to_partials else self.split
        return Shape((blocks, *tall(-(-m // self.rows))), self.threads, self.shared_bytes, cluster)

    def program(self, kind: Kind, arch: str) -> Program:
        defines = kind.defines() | {
            "ROWS": self.rows,
            "STRIPS": self.strips,
            "WARPS_N": self.warps_n,
            "WARPS_K": self.warps_k,
            "DEPTH": self.depth,
            "SPLIT": self.split,
            "MIN_BLOCKS": self.min_blocks,
            "SHARED_BYTES": replace(self, reserved_bytes=0).shared_bytes,
            "TO_PARTIALS": int(self.to_partials),
        }
        # wgmma is of compute capability 9.0 alone, which is what the "a" says.
        return Program.from_file(KERNELS / f"{self.entry}.cu", arch + ("a" if self.unit == "wgmma" else ""), defines)


def sum_program(kind: Kind, split: int, arch: str) -> Program:
    """The kernel that adds `split` partial results."""
    return Program.from_file(KERNELS / "sum_parts.cu", arch, kind.defines() | {"SPLIT": split})


def sum_shape(m: int, n: int) -> Shape:
    return Shape((min(-(-m * n // 4 // 256), 2048), 1, 1), 256)
