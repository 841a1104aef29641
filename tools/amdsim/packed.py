"""Vector instructions on pairs: packed float16, packed float32, dot products, and float32 fused with float16 sources.

A dot product of two is computed unfused, left to right, each step rounded to float32, and float32 subnormals count as
zero on the way in and out, as LLVM documents for v_dot2_f32_f16; the hardware's order of rounding is not documented.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .disassembly import Instruction
from .errors import Unmodelled
from .operands import Operand, Values, either, float_constant, spread
from .state import Bits, Wavefronts
from .vector import Decoder, Step, base_name, numbers

LOW = np.uint32(0xFFFF)
SIXTEEN = np.uint32(16)
TINY = np.float32(2.0**-126)

PACKED_HALF: dict[str, Callable[..., Values]] = {
    "v_pk_add_f16": lambda a, b: a + b,
    "v_pk_mul_f16": lambda a, b: a * b,
    "v_pk_fma_f16": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float16),
    "v_pk_min_f16": np.fmin,
    "v_pk_max_f16": np.fmax,
}
PACKED_SHORT: dict[str, Callable[..., Values]] = {
    "v_pk_add_u16": lambda a, b: a + b,
    "v_pk_sub_u16": lambda a, b: a - b,
    "v_pk_sub_i16": lambda a, b: a - b,
    "v_pk_mul_lo_u16": lambda a, b: a * b,
    "v_pk_mad_u16": lambda a, b, c: a * b + c,
    "v_pk_lshlrev_b16": lambda a, b: b << (a & np.uint16(15)),
    "v_pk_lshrrev_b16": lambda a, b: b >> (a & np.uint16(15)),
}
PACKED_SINGLE: dict[str, Callable[..., Values]] = {
    "v_pk_add_f32": lambda a, b: a + b,
    "v_pk_mul_f32": lambda a, b: a * b,
    "v_pk_fma_f32": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "v_pk_mov_b32": None,  # type: ignore[dict-item]  # handled apart: its two results come from different sources
}


def build(decoder: Decoder, instruction: Instruction) -> Step | None:
    """What executes a packed instruction; None when this is none."""
    name = base_name(instruction.mnemonic)
    if name in PACKED_HALF or name in PACKED_SHORT:
        return _halves(decoder, instruction, name)
    if name in PACKED_SINGLE:
        return _singles(decoder, instruction, name)
    if match := re.fullmatch(r"v_dot2c?_f32_(f16|bf16)", name):
        return _dot(decoder, instruction, match[1], accumulates="2c" in name)
    if match := re.fullmatch(r"v_(?:fma|mad)_mix(|lo|hi)_f(?:32|16)", name):
        return _mix(decoder, instruction, match[1])
    return None


def half(source: Operand, high: int, *, integer: bool = False) -> Callable[[Wavefronts], tuple[Values, Bits | None]]:
    """One half of a packed source; an inline float constant has its value in the low half and zero in the high."""
    if source.kind == "float":
        constant = float_constant(source.text, "f16") * (0 if high else 1)
        return lambda state: (constant, None)

    def read(state: Wavefronts) -> tuple[Values, Bits | None]:
        words, poison = source.words(state)
        if high:
            words, poison = words >> SIXTEEN, None if poison is None else poison >> SIXTEEN
        bits = (words & LOW).astype(np.uint16)
        return bits if integer else bits.view(np.float16), None if poison is None else poison & LOW

    return read


def _halves(decoder: Decoder, instruction: Instruction, name: str) -> Step:
    integer = name in PACKED_SHORT
    compute = PACKED_SHORT[name] if integer else PACKED_HALF[name]
    destination, *sources = (decoder.operand(text) for text in instruction.operands)
    count = len(sources)
    choices = [numbers(instruction, "op_sel", count, 0), numbers(instruction, "op_sel_hi", count, 1)]
    if name == "v_pk_mov_b32":  # a word of each source, and `op_sel` alone says which
        choices[1] = choices[0]
    signs = [numbers(instruction, "neg_lo", count, 0), numbers(instruction, "neg_hi", count, 0)]
    readers = [
        [half(source, choices[part][index], integer=integer) for index, source in enumerate(sources)] for part in (0, 1)
    ]
    if "clamp" in instruction.modifiers:
        raise Unmodelled("clamp of a packed result")

    def step(state: Wavefronts) -> None:
        words: list[Values] = []
        poisons: list[Bits | None] = []
        for part in (0, 1):
            read = [reader(state) for reader in readers[part]]
            values = [-value if signs[part][i] else value for i, (value, _) in enumerate(read)]
            words.append(np.asarray(compute(*values)).view(np.uint16).astype(np.uint32))
            poison = spread(*(p for _, p in read))
            poisons.append(None if poison is None else poison & LOW)
        high = None if poisons[1] is None else poisons[1] << SIXTEEN
        state.write(destination.register, words[0] | words[1] << SIXTEEN, either(poisons[0], high))

    return step


def _singles(decoder: Decoder, instruction: Instruction, name: str) -> Step:
    """Two float32 results; `op_sel` says which word of each source feeds the first, `op_sel_hi` the second."""
    destination, *sources = (decoder.operand(text) for text in instruction.operands)
    count = len(sources)
    choices = [numbers(instruction, "op_sel", count, 0), numbers(instruction, "op_sel_hi", count, 1)]
    if name == "v_pk_mov_b32":  # a word of each source, and `op_sel` alone says which
        choices[1] = choices[0]
    signs = [numbers(instruction, "neg_lo", count, 0), numbers(instruction, "neg_hi", count, 0)]

    def source_word(state: Wavefronts, index: int, part: int) -> tuple[Values, Bits | None]:
        source = sources[index]
        if source.kind == "float":
            return float_constant(source.text, "f32"), None
        value, poison = source.words(state, choices[part][index] if source.size > 1 else 0)
        value = value.view(np.float32)
        return (-value if signs[part][index] else value), poison

    def step(state: Wavefronts) -> None:
        results = []
        for part in (0, 1):
            if name == "v_pk_mov_b32":
                results.append(source_word(state, part, part))
                continue
            read = [source_word(state, index, part) for index in range(count)]
            results.append((PACKED_SINGLE[name](*(v for v, _ in read)), spread(*(p for _, p in read))))
        for part, (value, poison) in enumerate(results):
            state.write(destination.register + part, np.asarray(value).view(np.uint32), poison)

    return step


def bfloat16(bits: Values) -> Values:
    """bfloat16 bits as the float32 of the same value."""
    wide: Values = (bits.astype(np.uint32) << SIXTEEN).view(np.float32)
    return wide


def _flushed(value: Values) -> Values:
    return np.where(np.abs(value) < TINY, np.copysign(np.float32(0), value), value)


def _dot(decoder: Decoder, instruction: Instruction, kind: str, *, accumulates: bool) -> Step:
    destination, first, second, *third = (decoder.operand(text) for text in instruction.operands)
    addend = destination if accumulates else third[0]
    if any(value for name in ("op_sel", "neg_lo", "neg_hi") for value in numbers(instruction, name, 3, 0)):
        raise Unmodelled("a dot product with a choice of halves")
    if "clamp" in instruction.modifiers or first.negative or second.negative:
        raise Unmodelled("a dot product with modifiers")
    integer = kind == "bf16"
    parts = [[half(source, high, integer=integer) for source in (first, second)] for high in (0, 1)]

    def single(state: Wavefronts) -> tuple[Values, Bits | None]:
        if addend.kind == "float":
            return float_constant(addend.text, "f32"), None
        value, poison = addend.words(state)
        return value.view(np.float32), poison

    def step(state: Wavefronts) -> None:
        total, poison = single(state)
        total = _flushed(total)
        for readers in parts:
            (a, a_poison), (b, b_poison) = (reader(state) for reader in readers)
            a, b = (bfloat16(a), bfloat16(b)) if integer else (a.astype(np.float32), b.astype(np.float32))
            total = total + a * b
            poison = spread(poison, a_poison, b_poison)
        state.write(destination.register, _flushed(total).view(np.uint32), poison)

    return step


def _mix(decoder: Decoder, instruction: Instruction, part: str) -> Step:
    """A float32 fused multiply-add whose sources may be float16: `op_sel_hi` says which are, `op_sel` which half."""
    destination, *sources = (decoder.operand(text) for text in instruction.operands)
    is_half, high = numbers(instruction, "op_sel_hi", 3, 0), numbers(instruction, "op_sel", 3, 0)
    if "clamp" in instruction.modifiers:
        raise Unmodelled("clamp of a mixed result")

    def reader(source: Operand, index: int) -> Callable[[Wavefronts], tuple[Any, Bits | None]]:
        read_half = half(source, high[index])

        def read(state: Wavefronts) -> tuple[Any, Bits | None]:
            if is_half[index]:
                value, poison = read_half(state)
                value = value.astype(np.float64)
            elif source.kind == "float":
                value, poison = float_constant(source.text.strip("-|") if source.negative else source.text, "f64"), None
            else:
                words, poison = source.words(state)
                value = words.view(np.float32).astype(np.float64)
            if source.absolute:
                value = np.abs(value)
            return (-value if source.negative else value), poison

        return read

    readers = [reader(source, index) for index, source in enumerate(sources)]

    def step(state: Wavefronts) -> None:
        (a, a_poison), (b, b_poison), (c, c_poison) = (read(state) for read in readers)
        result = (a * b + c).astype(np.float32)
        poison = spread(a_poison, b_poison, c_poison)
        if not part:
            state.write(destination.register, result.view(np.uint32), poison)
            return
        held, held_poison = state.read(destination.register)
        shift, kept = (SIXTEEN, LOW) if part == "hi" else (np.uint32(0), ~LOW)
        word = result.astype(np.float16).view(np.uint16).astype(np.uint32) << shift | held & kept
        new = None if poison is None else (poison & LOW) << shift
        state.write(destination.register, word, either(new, None if held_poison is None else held_poison & kept))

    return step
