"""Which variant serves which number of rows. The only place that knows how fast anything is.

A memory-bound kernel is as fast as its loads are early and many. The rules, found by measuring about 400 variants on 7
shapes (NOTES.md): all blocks resident at once, a full wave of them, and some 32 KiB of loads in flight in each
multiprocessor. What a multiprocessor can hold follows from registers, which `REGISTERS` records for the variants.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

from awq_rt.packing import Kind

from . import selection_ring
from .gemm import LANES, Variant
from .packing import STRIP, TILE_DEPTH
from .ring import Ring
from .target import Target as Target

GEMV_ROWS = 8
"""Up to here the rows fill one matrix instruction and the family is gemv."""

ROW_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows that are chosen for, each for all below it; the last one for all above it too."""

MOST_ROWS = 64
"""Of a block. More rows are more blocks, which read the weight again, from the L2 cache."""

REGISTER_FILE = 65536
TILE_BYTES = STRIP * TILE_DEPTH // 2
KIB = 1024

REGISTERS = {
    # (rows, strips, depth): what NVRTC 13 needs to compile the variant without a spill, sm_80 to sm_90
    (8, 1, 2): 56,
    (8, 1, 3): 64,
    (8, 1, 4): 72,
    (8, 2, 2): 80,
    (8, 2, 3): 96,
    (8, 2, 4): 128,
    (8, 3, 2): 128,
    (16, 1, 2): 72,
    (16, 1, 3): 72,
    (16, 1, 4): 80,
    (16, 2, 2): 128,
    (16, 2, 3): 128,
    (32, 1, 2): 128,
    (32, 1, 3): 128,
    (32, 1, 4): 128,
    (32, 2, 2): 168,
    (32, 2, 3): 208,
    (64, 1, 2): 168,
    (64, 1, 3): 176,
    (64, 2, 2): 255,
}

WGMMA_REGISTERS = {
    (32, 1, 2): 96,
    (32, 1, 3): 96,
    (32, 1, 4): 104,
    (32, 2, 2): 168,
    (32, 2, 3): 168,
    (64, 1, 2): 128,
    (64, 1, 3): 128,
}
"""The same for wgmma. Two strips of 64 rows, or 128 rows, measured slower."""

BLACKWELL_MORE = 8
"""Registers that the compiler takes beyond these tables from sm_100 on."""

OLDER_MORE = 16
"""The same before sm_90, of variants for more than `GEMV_ROWS` rows."""

DEQUANTIZE_FROM = 384
"""Rows from which dequantising into a buffer and torch's BLAS win. H100, 2026-11-22, tools/bench_kernels.py."""


def row_step(m: int, kernel: str, more: tuple[int, ...] = ()) -> int:
    """The member of `ROW_STEPS`, or of `more`, that serves `m` rows of x in the family `kernel`."""
    steps = sorted({*ROW_STEPS, *more})
    allowed = [s for s in steps if kernel == "auto" or (s <= GEMV_ROWS) == (kernel == "gemv")]
    return next((s for s in allowed if s >= m), allowed[-1])


def uses_wgmma(rows: int, target: Target) -> bool:
    """Whether the matrix instruction of four warps, which 9.0 alone has, serves `rows` rows."""
    return rows > 16 and target.arch == 90


@functools.lru_cache(maxsize=1024)
def choose(step: int, strips: int, tiles: int, kind: Kind, target: Target) -> Variant | Ring:
    """The variant for `step` (of `ROW_STEPS` or `selection_ring.row_steps`) and a weight of `strips` by `tiles`."""
    if step in selection_ring.row_steps(kind, target):
        ring = selection_ring.choose(step, strips, tiles, kind, target)
        if ring is not None:
            return ring
    rows = min(step, MOST_ROWS)
    best, best_score = None, 0.0
    for variant in _candidates(rows, kind, target):
        score = _score(variant, step // rows, strips, tiles, target)
        if score > best_score:
            best, best_score = variant, score
    assert best is not None
    return _alone(best, step // rows, strips, target)


def _alone(variant: Variant, row_blocks: int, strips: int, target: Target) -> Variant:
    """`variant`, resident no more often than one kernel needs where kernels start early.

    Else some of the next kernel's blocks start beside this one's and the rest find their places unevenly: 5.3 became
    6.6 us at 4096 x 6144 and one row. Its threads may have the registers of those that are not there.
    """
    each = -(-_blocks(variant, row_blocks, strips) // target.multiprocessors)
    if not target.clusters or each > variant.min_blocks:
        return variant
    reserved = target.multiprocessor_shared_bytes // (each + 1) // 1024 * 1024
    return replace(variant, min_blocks=each, reserved_bytes=min(reserved, target.shared_bytes))


def _blocks(variant: Variant, row_blocks: int, strips: int) -> int:
    return -(-strips // (variant.columns // STRIP)) * variant.split * row_blocks


def _candidates(rows: int, kind: Kind, target: Target) -> Iterator[Variant]:
    """Variants to choose from; of equals the first wins. Wide strips save reading x, which few rows do not mind."""
    widths: tuple[int, ...]
    cuts: tuple[tuple[int, int], ...]
    if rows <= GEMV_ROWS:
        widths = (3, 2, 1)
        cuts = ((1, 12), (1, 8), (1, 4))
    else:
        widths = (2, 1)
        cuts = tuple(itertools.product((1, 2, 3, 4, 6), (8, 4, 2, 1)))
    units: tuple[str, ...] = ("mma",)
    if uses_wgmma(rows, target):
        units = ("wgmma",) if rows > 32 else ("mma", "wgmma")
    for unit in units:
        shapes = ((8, 2), (4, 4), (4, 2), (8, 1), (4, 1)) if unit == "wgmma" else cuts
        for split, width, (warps_n, warps_k), depth in itertools.product((1, 2, 4, 8), widths, shapes, (3, 4, 2)):
            need = registers(rows, width, depth, kind, target, unit)
            variant = Variant(rows, width, warps_n, warps_k, depth, split, 1, split > 1 and not target.clusters, unit)
            if need is None or variant.shared_bytes > target.shared_bytes:
                continue
            if _blocks_by_registers(variant, need) and (split == 1 or warps_k * split <= 32):
                yield replace(variant, min_blocks=_resident(variant, need, target))


def registers(rows: int, strips: int, depth: int, kind: Kind, target: Target, unit: str) -> int | None:
    """What the variant needs of a thread's registers; None where it is not worth compiling."""
    table = WGMMA_REGISTERS if unit == "wgmma" else REGISTERS
    known = table.get((max(rows, GEMV_ROWS), strips, depth))
    if known is None:
        return None
    # Where a tile has several groups, or their scales are wide, each tile in flight holds more.
    pairs = max(1, TILE_DEPTH // kind.group_size) * (2 if kind.scale_kind == 2 else 1)
    need = known + -(-(pairs - 1) * strips * (4 * depth + 9) // 8) * 8
    if target.arch >= 100:
        need += BLACKWELL_MORE
    if target.arch < 90 and rows > GEMV_ROWS:
        need += OLDER_MORE
    return need if need <= 255 else None


def _resident(variant: Variant, need: int, target: Target) -> int:
    """How many blocks of `variant` a multiprocessor holds at once."""
    by_shared = target.multiprocessor_shared_bytes // (variant.shared_bytes + 1024)
    return max(1, min(_blocks_by_registers(variant, need), by_shared, target.threads // variant.threads))


def _blocks_by_registers(variant: Variant, need: int) -> int:
    """How many blocks find `need` registers a thread; they are dealt out to four warps at a time."""
    return REGISTER_FILE // (-(-variant.threads // 128) * 128 * need)


def _score(variant: Variant, row_blocks: int, strips: int, tiles: int, target: Target) -> float:
    """The larger the faster; fitted to NVIDIA H100 80GB HBM3, 2026-11-23, step 8 of NOTES.md."""
    blocks = _blocks(variant, row_blocks, strips)
    each = -(-blocks // target.multiprocessors)
    resident = min(each, variant.min_blocks)
    waves = -(-blocks // target.placed(variant.split, variant.min_blocks))
    fill = blocks / (target.multiprocessors * resident * waves)
    groups = variant.warps_k * variant.split
    even = tiles / (groups * -(-tiles // groups))
    in_flight = resident * variant.threads // LANES * variant.strips * min(variant.depth, tiles / groups) * TILE_BYTES
    halvings = variant.split.bit_length() - 1
    if variant.rows <= GEMV_ROWS:
        score: float = fill**1.2 * min(in_flight, 60 * KIB) ** 0.5 * even**0.75 * math.pow(0.65, halvings)
        score *= 1 - 0.4 / resident if waves > 1 else 1  # a block's start and end are bare where few others run
        return score / (1 + 2 * variant.rows / variant.columns)  # every block reads x
    score = fill**1.5 * min(in_flight, 32 * KIB) ** 0.8 * even**0.4 * variant.strips**0.11
    score /= (
        1 + 1.8 * min(variant.rows, 32) / variant.columns
    ) * variant.warps_n**0.2  # x, and the barriers of those who share it
    score *= 0.88 if resident == 1 else 1  # nothing else runs while the block starts and ends
    score *= 0.46 if waves > 1 else 1
    score *= 1.09 if variant.unit == "wgmma" else 1
    return score * math.pow(0.65 if variant.to_partials else 0.78, halvings)
