"""Which lane each lane reads from in a DPP instruction."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from .disassembly import Instruction
from .errors import Unmodelled

Permutation = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]


def permutation(instruction: Instruction) -> Permutation:
    """The source lane of each of 64 lanes, and whether it lies inside the row."""
    names = [name for name in instruction.modifiers if name in CONTROLS]
    if len(names) != 1:
        raise Unmodelled(f"lane control {instruction.text!r}")
    return _permutation(names[0], instruction.modifiers[names[0]])


@functools.cache
def _permutation(name: str, value: str) -> Permutation:
    lane = np.arange(64)
    row, place = lane & ~15, lane & 15
    inside = np.ones(64, np.bool_)
    if name in ("quad_perm", "dpp8"):
        choice = np.array([int(number) for number in value.strip("[]").split(",")])
        source = lane // len(choice) * len(choice) + choice[lane % len(choice)]
    elif name == "row_half_mirror":
        source = lane ^ 7
    elif name == "row_mirror":
        source = lane ^ 15
    elif name == "row_ror":
        source = row | (place - int(value)) & 15
    elif name == "row_xmask":
        source = lane ^ int(value)
    elif name in ("row_share", "row_newbcast"):
        source = row | int(value)
    elif name == "row_shl":
        inside, source = place + int(value) < 16, row | (place + int(value)) & 15
    else:
        inside, source = place - int(value) >= 0, row | (place - int(value)) & 15
    return source, inside


CONTROLS = {
    "quad_perm", "dpp8", "row_half_mirror", "row_mirror", "row_ror", "row_xmask", "row_share", "row_newbcast",
    "row_shl", "row_shr",
}  # fmt: skip
