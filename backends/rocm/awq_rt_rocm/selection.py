"""Which variant serves which number of rows. Nothing here was measured: it is reckoned, and waits for a card.

What is reckoned is how much of the memory's time the vector units take too (benchmarks/rocm-simulated.json). On CDNA
they are the scarce part, and the matrix unit takes the products off them, even for one row. RDNA has twice as many for
its memory: there the vector kernel serves the fewest rows, because it computes none that are not there.
"""

from __future__ import annotations

from awq_rt.packing import Kind

from .kernel import Variant
from .packing import TILE_DEPTH
from .targets import Architecture

VECTOR_ROWS = (1, 2, 4)
"""Rows of x that the vector kernel is compiled for, each for all below it; more than the last are more blocks. Eight
rows of bfloat16 would spill on CDNA."""

CUTS: dict[str, dict[int, tuple[int, int]]] = {
    # by matrix unit and rows of x: waves at most, and strips, as many as their sums leave registers for. For the fewest
    # rows (kFewRows of matrix.h) fewer strips and more waves: more loads under way, and still 40 % of the time free
    "mfma": {4: (8, 2), 16: (4, 4), 32: (4, 2)},
    "wmma repeated": {16: (4, 2), 32: (4, 1)},
    "wmma split": {16: (4, 2), 32: (4, 1)},
}

VECTOR_UP_TO = {"mfma": 0, "wmma repeated": 2, "wmma split": 2}
"""By matrix unit, up to how many rows `auto` chooses the vector kernel."""

DEQUANTIZE_FROM = {"mfma": 256, "wmma repeated": 256, "wmma split": 256, "": 17}
"""By matrix unit, the rows from which the weight is dequantised for torch's BLAS."""


def matrix_unit(kind: Kind, kernel: str, architecture: Architecture) -> str:
    """The matrix unit that serves in the family `kernel`, or "".

    The family gemv is what decodes one row: on CDNA that is the matrix unit. The lanes of an instruction hold 32
    consecutive k. Where those have several groups, every weight must be scaled, which costs more than it brings for few
    rows: only who asks for the unit gets it there.
    """
    if kernel == "gemv" and architecture.matrix != "mfma":
        return ""
    return architecture.matrix if kind.group_size % 32 == 0 or kernel == "gemm" else ""


def variant(m: int, tiles: int, kernel: str, unit: str) -> Variant:
    """The variant for `m` rows of x and a weight of `tiles` tiles a strip, in the family `kernel`."""
    if not unit or (kernel == "auto" and m <= VECTOR_UP_TO[unit]):
        return Variant("gemv", _step(m, VECTOR_ROWS), waves=_waves(8, tiles), depth=2)
    cuts = CUTS[unit]
    rows = min(cuts) if kernel == "gemv" else _step(m, tuple(cuts))
    waves, strips = cuts[rows]
    return Variant("gemm", rows, waves=_waves(waves, tiles), strips=strips)


def variants(tiles: int, kernel: str, unit: str) -> list[Variant]:
    """Every variant that `variant` may choose."""
    steps = {*VECTOR_ROWS, *CUTS.get(unit, {})}
    return list(dict.fromkeys(variant(m, tiles, kernel, unit) for m in sorted(steps)))


def tiles_of(in_features: int) -> int:
    return -(-in_features // TILE_DEPTH)


def _step(m: int, steps: tuple[int, ...]) -> int:
    return next((step for step in steps if step >= m), steps[-1])


def _waves(most: int, tiles: int) -> int:
    """The largest power of two that is at most `most` and not above `tiles`: a wave without a tile would only wait."""
    while most > tiles:
        most //= 2
    return max(1, most)
