"""Host half of kernels/gemm_ring.cu: many rows of x, on the warpgroup's matrix instruction of sm_90."""

from __future__ import annotations

from dataclasses import dataclass

from awq_rt.packing import Kind
from awq_rt.rtc import Program

from . import tensor_map
from .driver import Shape
from .gemm import KERNELS, LANES
from .packing import STRIP, TILE_DEPTH

WARPGROUP = 128
BARRIER_BYTES = 1024
BAND_ROWS = 1024
"""Rows of x that are worked through together: with K up to 14336 they stay in the L2 cache."""


@dataclass(frozen=True, slots=True)
class Ring:
    """One way to cut the work; the words are those of kernels/ring.cuh."""

    rows: int
    strips: int
    consumers: int
    stages: int
    split: int = 1
    share: int = 1
    take_registers: int = 0
    min_blocks: int = 1
    groups: int = 1  # of scales in a tile
    resident: int = 0  # blocks that the GPU holds at once
    to_partials: bool = False  # parts of the depth always meet in the cluster

    def __str__(self) -> str:
        text = f"ring, rows {self.rows}, strips {self.strips}, consumers {self.consumers}, stages {self.stages}"
        if self.split > 1:
            text += f", split {self.split}"
        if self.share > 1:
            text += f", share {self.share}"
        return text

    @property
    def entry(self) -> str:
        """The kernel's name in its source."""
        return "gemm_ring"

    @property
    def arguments(self) -> int:
        """Slots of 8 bytes that a launch takes."""
        return 9 + 3 * tensor_map.WORDS

    @property
    def copied_rows(self) -> int:
        """Of x, by each block, for itself and the others that share them."""
        return self.rows // self.share

    @property
    def cluster(self) -> int:
        return self.split * self.share

    @property
    def threads(self) -> int:
        return (self.consumers + 1) * WARPGROUP if self.take_registers else self.consumers * WARPGROUP + LANES

    @property
    def columns(self) -> int:
        return self.consumers * 4 * self.strips * STRIP

    @property
    def shared_bytes(self) -> int:
        strips = self.columns // STRIP
        scales_and_zeros = self.groups * (STRIP * 2 + STRIP // 2)
        stage = self.rows * TILE_DEPTH * 2 + strips * (STRIP * TILE_DEPTH // 2 + scales_and_zeros)
        output = self.rows * self.columns * 2 if self.split == 1 else 0
        pairs = self.strips * self.rows // 4  # of a consumer's thread, see kernels/output.cuh
        parts = self.split * -(-pairs // self.split) * self.consumers * WARPGROUP * 8 if self.split > 1 else 0
        return BARRIER_BYTES + max(self.stages * stage + output, parts)

    def clusters(self, m: int, n: int) -> int:
        """How many clusters' worth of work a product of `m` rows by `n` columns is."""
        return -(-m // self.rows) * -(-n // (self.columns * self.share))

    def shape(self, m: int, n: int) -> Shape:
        """The launch for `m` rows of x and `n` columns of W."""
        clusters = self.clusters(m, n)
        if self.split == 1:  # else each cluster has one output
            clusters = min(clusters, self.resident // self.cluster)
        return Shape((clusters * self.cluster, 1, 1), self.threads, self.shared_bytes, self.cluster)

    def program(self, kind: Kind, arch: str) -> Program:
        defines = kind.defines() | {
            "ROWS": self.rows,
            "STRIPS": self.strips,
            "CONSUMERS": self.consumers,
            "STAGES": self.stages,
            "SPLIT": self.split,
            "SHARE": self.share,
            "TAKE_REGISTERS": self.take_registers,
            "MIN_BLOCKS": self.min_blocks,
            "SHARED_BYTES": self.shared_bytes,
            "BAND": max(1, BAND_ROWS // self.rows),
        }
        return Program.from_file(KERNELS / "gemm_ring.cu", arch + "a", defines)
