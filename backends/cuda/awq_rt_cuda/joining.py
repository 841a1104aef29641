"""Several packed weights that read the same x as one: strips are the outermost dimension of every tensor in tiles."""

from __future__ import annotations

from collections.abc import Sequence

from awq_rt.backend import Packed
from awq_rt.packing import joining

from .packing import STRIP
from .tiled import PREFIX


def join(parts: Sequence[Packed]) -> tuple[Packed, tuple[Packed, ...]] | None:
    """`awq_rt.packing.joining.join` of weights in tiles."""
    return joining.join(parts, PREFIX, STRIP)
