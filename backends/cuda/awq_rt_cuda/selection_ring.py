"""Which variant of gemm_ring.cu serves how many rows, and where gemm.cuh is faster: what is predicted to take least.

A variant's time is that of its waves of blocks: each has a number of steps of 64 rows of W, and what a block costs
beside them. Times of gemm.cuh at few rows are those of the weight's bytes and a constant. All were fitted, by least
squares of the relative error, to times on seven shapes of 7B and 8B models: NVIDIA H100 80GB HBM3, 2026-11-22, step 7
of NOTES.md. Over these shapes the choice is within 1 % of the best of all variants that were measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from awq_rt.packing import Kind

from .packing import STRIP, TILE_DEPTH
from .ring import Ring
from .target import Target

TILE_MB = STRIP * TILE_DEPTH / 2 / 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a wave of blocks, one or more on every multiprocessor, in us."""

    step: float  # 64 rows of W
    block: float  # beside the steps: start, first copies, end


NARROW = Ring(128, 1, 2, 9)
THREE = Ring(128, 1, 3, 7, take_registers=160)
WIDE = Ring(128, 2, 2, 6, take_registers=232)
TALL = Ring(256, 1, 2, 4, take_registers=232)

COSTS: dict[int, dict[Ring, Cost]] = {
    32: {
        Ring(32, 1, 3, 16, share=2): Cost(0.351, 2.70),
        Ring(32, 2, 2, 10, share=2): Cost(0.370, 4.23),
    },
    64: {
        Ring(64, 1, 3, 8, share=2): Cost(0.407, 2.83),
        Ring(64, 1, 3, 8, split=2): Cost(0.378, 5.08),
        Ring(64, 1, 2, 7, split=4, min_blocks=2): Cost(0.450, 4.30),
        Ring(64, 2, 2, 6, share=2): Cost(0.456, 4.23),
    },
    128: {
        THREE: Cost(0.437, 3.94),
        replace(THREE, split=2): Cost(0.471, 8.30),
        replace(THREE, split=5): Cost(0.544, 10.0),
        WIDE: Cost(0.633, 5.72),
        replace(NARROW, split=2): Cost(0.376, 5.60),
    },
    256: {
        THREE: Cost(0.423, 6.32),
        WIDE: Cost(0.574, 5.72),
        replace(NARROW, split=2): Cost(0.409, 5.23),
        replace(NARROW, share=2): Cost(0.350, 4.27),
    },
    384: {
        THREE: Cost(0.433, 6.42),
        WIDE: Cost(0.574, 5.72),
        NARROW: Cost(0.421, 3.26),
        replace(NARROW, share=2): Cost(0.350, 4.27),
    },
    512: {
        THREE: Cost(0.443, 6.52),
        NARROW: Cost(0.421, 3.26),
        replace(TALL, share=2): Cost(0.561, 9.80),
        replace(TALL, stages=5, split=2): Cost(0.717, 8.32),
    },
    1024: {THREE: Cost(0.458, 4.54), TALL: Cost(0.641, 5.27)},
    2048: {THREE: Cost(0.520, 4.54), TALL: Cost(0.733, 0.75)},
}
"""By number of rows, each for all below it down to the one before; the last one for all above it too."""

OTHER_COSTS = {32: (0.47, 2.35), 64: (0.69, 2.9), 128: (1.444, 1.77)}
"""Of gemm.cuh at these numbers of rows: us a MB of weight, and us. It is never faster at more rows."""


LARGEST_GROUP = 256


def row_steps(kind: Kind, target: Target) -> tuple[int, ...]:
    """Numbers of rows that gemm_ring.cu may serve; none where it cannot.

    It needs wgmma, which 9.0 alone has, and scales of the activations' dtype, for it rounds weights to that: in a large
    group, which has 16 different ones, they would all err alike, and where x has a mean the errors add up.
    """
    rounds_well = kind.scale_kind == (0 if kind.half else 1) and kind.group_size <= LARGEST_GROUP
    return tuple(COSTS) if target.arch == 90 and rounds_well else ()


@functools.lru_cache(maxsize=1024)
def choose(step: int, strips: int, tiles: int, kind: Kind, target: Target) -> Ring | None:
    """The variant for `step` (a key of `COSTS`) and a weight of `strips` by `tiles`; None where gemm.cuh is faster."""
    best, best_us = None, float("inf")
    if step in OTHER_COSTS:
        a_mb, constant = OTHER_COSTS[step]
        best_us = constant + a_mb * strips * tiles * TILE_MB
    for variant, cost in COSTS[step].items():
        if variant.split > -(-tiles // 2):  # a part is whole pairs of tiles
            continue
        resident = target.multiprocessors * variant.min_blocks
        waves = -(
            -variant.clusters(step, strips * STRIP)
            * variant.cluster
            // target.placed(variant.cluster, variant.min_blocks)
        )
        us = waves * (cost.block + cost.step * tiles / variant.split)
        if us < best_us:
            best = replace(variant, groups=max(1, TILE_DEPTH // kind.group_size), resident=resident)
            best_us = us
    return best
