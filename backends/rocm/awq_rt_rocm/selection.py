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

GEMV_STEPS = (1, 2, 4)
GEMM_STEPS = (16, 32)
"""Numbers of rows that variants exist for, each for all below it; the last one for all above it too. Eight rows
of bfloat16 would spill on CDNA."""

GEMV_ROWS = {"mfma": 0, "wmma repeated": 2, "wmma split": 2, "": 4}
"""By matrix unit, up to how many rows the vector kernel is chosen."""

DEQUANTIZE_FROM = {"mfma": 256, "wmma repeated": 256, "wmma split": 256, "": 17}
"""By matrix unit, the rows from which the weight is dequantised for torch's BLAS."""

STRIPS = {
    # (matrix unit, rows): as many as their sums leave registers for
    ("mfma", 16): 4,
    ("mfma", 32): 2,
    ("wmma repeated", 16): 2,
    ("wmma repeated", 32): 1,
    ("wmma split", 16): 2,
    ("wmma split", 32): 1,
}


def matrix_unit(kind: Kind, kernel: str, architecture: Architecture) -> str:
    """The matrix unit that serves in the family `kernel`, or "".

    The lanes of an instruction hold 32 consecutive k. Where those have several groups, every weight must be scaled,
    which costs more than it brings for few rows: only who asks for the unit gets it there.
    """
    return architecture.matrix if kind.group_size % 32 == 0 or kernel == "gemm" else ""


def step(m: int, kernel: str, unit: str) -> int:
    """The member of `GEMV_STEPS` or `GEMM_STEPS` that serves `m` rows of x in the family `kernel`."""
    on_matrix = bool(unit) and kernel != "gemv" and (kernel == "gemm" or m > GEMV_ROWS[unit])
    steps: tuple[int, ...] = GEMM_STEPS if on_matrix else GEMV_STEPS
    return next((s for s in steps if s >= m), steps[-1])


def variant(rows: int, tiles: int, unit: str) -> Variant:
    """The variant for `rows` (a member of the steps) and a weight of `tiles` tiles a strip."""
    if rows in GEMV_STEPS:
        return Variant("gemv", rows, waves=_waves(8, tiles), depth=2)
    return Variant("gemm", rows, waves=_waves(4, tiles), strips=STRIPS[unit, rows])


def tiles_of(in_features: int) -> int:
    return -(-in_features // TILE_DEPTH)


def _waves(most: int, tiles: int) -> int:
    """The largest power of two that is at most `most` and not above `tiles`: a wave without a tile would only wait."""
    while most > tiles:
        most //= 2
    return max(1, most)
