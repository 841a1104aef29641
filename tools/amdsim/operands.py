"""Where an instruction's operand comes from and where its result goes, decoded once from LLVM's text.

A source is read as 32-bit words with their poison, broadcast from scalars; `typed` views them as a number type. Input
modifiers (negation, absolute value, a choice of halves or bytes) are applied there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import Unmodelled
from .state import ALL, SCALARS, TTMP, WIDE_SCALARS, Bits, Mask, Wavefronts

Values = npt.NDArray[Any]

FLOATS = {
    "0.5",
    "-0.5",
    "1.0",
    "-1.0",
    "2.0",
    "-2.0",
    "4.0",
    "-4.0",
    "0.15915494",
    "0.15915494309189532",
    "0.15915494309189533",
}
VECTOR = re.compile(r"([va])(?:(\d+)(\.[lh])?|\[(\d+):(\d+)\])$")
SCALAR = re.compile(r"(s|ttmp)(?:(\d+)|\[(\d+):(\d+)\])$")
INTEGER = re.compile(r"-?(\d+|0x[0-9a-f]+)$")


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand. `kind` is "vector", "scalar", "constant", "float" or "none" (`off`, `null`)."""

    kind: str
    register: int = 0
    size: int = 1  # registers
    value: int = 0
    text: str = ""
    half: str = ""  # "l" or "h" of a 16-bit register
    negative: bool = False
    absolute: bool = False

    @property
    def is_vector(self) -> bool:
        return self.kind == "vector"

    def words(self, state: Wavefronts, index: int = 0, *, wide: bool = False) -> tuple[Values, Bits | None]:
        """Word `index`, [count, lanes] or [count, 1] or [1, 1], and its poison. `wide`: of a 64-bit constant."""
        if self.kind == "vector":
            return state.read(self.register + index)
        if self.kind == "scalar":
            value, poison = state.read_scalar(self.register + index)
            return value[:, None], np.where(poison, ALL, np.uint32(0))[:, None] if poison.any() else None
        if self.kind == "constant":
            word = self.value >> (32 * index) if wide else self.value
            return np.full((1, 1), word & 0xFFFFFFFF, np.uint32), None
        if self.kind == "float":
            raise Unmodelled(f"{self.text} where the instruction reads plain bits")
        return np.zeros((1, 1), np.uint32), None


def operand(text: str, accumulators: int = 0) -> Operand:
    """The operand that LLVM wrote as `text`. AGPRs follow `accumulators` VGPRs in the register file."""
    negative = absolute = False
    bare = text
    if bare.startswith("-") and not INTEGER.match(bare) and bare not in FLOATS:
        negative, bare = True, bare[1:]
    if bare.startswith("|") and bare.endswith("|"):
        absolute, bare = True, bare[1:-1]
    found = _bare(bare, accumulators)
    return replace(found, negative=negative, absolute=absolute, text=text)


def _bare(text: str, accumulators: int) -> Operand:
    if match := VECTOR.match(text):
        letter, single, half, first, last = match.groups()
        base = accumulators if letter == "a" else 0
        if single:
            return Operand("vector", base + int(single), half=(half or "")[1:])
        return Operand("vector", base + int(first), int(last) - int(first) + 1)
    if match := SCALAR.match(text):
        letter, single, first, last = match.groups()
        base = TTMP if letter == "ttmp" else 0
        if single:
            return Operand("scalar", base + int(single))
        return Operand("scalar", base + int(first), int(last) - int(first) + 1)
    if text in SCALARS:
        return Operand("scalar", SCALARS[text])
    if text in WIDE_SCALARS:
        return Operand("scalar", WIDE_SCALARS[text], 2)
    if text in FLOATS:
        return Operand("float", value=0)
    if INTEGER.match(text):
        return Operand("constant", value=int(text, 0))
    if text in ("off", "null"):
        return Operand("none")
    raise Unmodelled(f"operand {text!r}")


def float_constant(text: str, kind: str) -> Values:
    """The inline constant `text` in a number type; an integer of the same width has the same bits."""
    as_float = DTYPES["f" + kind[1:]]
    return np.full((1, 1), float(text), as_float).view(DTYPES[kind])


Permutation = tuple[npt.NDArray[np.int64], Mask]
Reader = Callable[[Wavefronts], tuple[Values, Bits | None]]

DTYPES = {
    "u32": np.uint32, "i32": np.int32, "f32": np.float32, "u16": np.uint16, "i16": np.int16, "f16": np.float16,
    "u64": np.uint64, "i64": np.int64, "f64": np.float64,
}  # fmt: skip


def typed(source: Operand, kind: str, *, high: bool = False, part: str = "DWORD", signed_part: bool = False) -> Reader:
    """How `source` is read as `kind`: `high` takes the upper half for a 16-bit type, `part` is an SDWA selection."""
    if source.kind == "float":
        constant = float_constant(source.text.strip("-|") if source.negative or source.absolute else source.text, kind)
        constant = _signed(constant, source)
        return lambda state: (constant, None)
    if kind in ("u64", "i64", "f64"):
        return _wide(source, kind)
    bits16 = kind.endswith("16")
    high = high or source.half == "h"
    shift, mask = _selection(part, high and bits16)
    dtype = DTYPES[kind]

    def read(state: Wavefronts) -> tuple[Values, Bits | None]:
        words, poison = source.words(state)
        if shift:
            words = words >> np.uint32(shift)
            poison = None if poison is None else poison >> np.uint32(shift)
        if mask != 0xFFFFFFFF or bits16:
            keep = np.uint32(mask & 0xFFFF if bits16 else mask)
            words = words & keep
            poison = None if poison is None else poison & keep
        values = words.astype(np.uint16).view(dtype) if bits16 else words.view(dtype)
        return _signed(values, source), poison

    if signed_part:
        raise Unmodelled("sign extension of a selected part")
    return read


def _selection(part: str, high: bool) -> tuple[int, int]:
    if part.startswith("WORD"):
        return 16 * int(part[-1]), 0xFFFF
    if part.startswith("BYTE"):
        return 8 * int(part[-1]), 0xFF
    return (16, 0xFFFF) if high else (0, 0xFFFFFFFF)


def _wide(source: Operand, kind: str) -> Reader:
    if source.kind == "constant":
        constant = np.full((1, 1), source.value & (1 << 64) - 1, np.uint64).view(DTYPES[kind])
        return lambda state: (constant, None)

    def read(state: Wavefronts) -> tuple[Values, Bits | None]:
        low, low_poison = source.words(state)
        high, high_poison = source.words(state, 1)
        value = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
        return _signed(value.view(DTYPES[kind]), source), either(low_poison, high_poison)

    return read


def _signed(values: Values, source: Operand) -> Values:
    if source.absolute:
        values = np.abs(values)
    return -values if source.negative else values


def either(*poisons: Bits | None) -> Bits | None:
    """All bits that are poisoned in any of them."""
    total = None
    for poison in poisons:
        if poison is not None:
            total = poison if total is None else total | poison
    return total


def spread(*poisons: Bits | None) -> Bits | None:
    """All bits of a lane in which any bit of any of them is poisoned: what arithmetic makes of poison."""
    total = either(*poisons)
    return None if total is None or not total.any() else np.where(total != 0, ALL, np.uint32(0))
