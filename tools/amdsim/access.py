"""Instructions that touch memory: global and scalar loads, global stores, LDS."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from .disassembly import Instruction
from .errors import Unmodelled
from .memory import defined
from .operands import Operand, either
from .state import Bits, Wavefronts
from .vector import Decoder, Step

GLOBAL_SIZES = {
    "ubyte": 1, "u8": 1, "ushort": 2, "u16": 2, "short": 2, "b16": 2, "byte": 1, "b8": 1, "dword": 4, "b32": 4,
    "dwordx2": 8, "b64": 8, "dwordx3": 12, "b96": 12, "dwordx4": 16, "b128": 16,
    "short_d16": 2, "d16_b16": 2, "short_d16_hi": 2, "d16_hi_b16": 2, "ubyte_d16": 1, "d16_u8": 1,
    "ubyte_d16_hi": 1, "d16_hi_u8": 1, "sbyte": -1, "i8": -1, "sshort": -2, "i16": -2,
}  # fmt: skip
HINTS = {"offset", "glc", "slc", "dlc", "sc0", "sc1", "nt", "lds", "th", "scope", "offset0", "offset1", "gds"}


def build(decoder: Decoder, instruction: Instruction) -> Step | None:
    """What executes a memory instruction; None when this is none."""
    name = instruction.mnemonic
    if unknown := set(instruction.modifiers) - HINTS:
        if name.startswith(("global_", "ds_", "s_load_")):
            raise Unmodelled(f"modifier {unknown.pop()}")
        return None
    if match := re.fullmatch(r"global_(load|store)_(\w+)", name):
        if match[2] not in GLOBAL_SIZES:
            raise Unmodelled(f"{name}")
        return _global(decoder, instruction, match[1] == "load", match[2])
    if match := re.fullmatch(r"s_load_(?:dword|b)(x?)(\d*)", name):
        words = int(match[2] or 1) if name.startswith("s_load_dword") else int(match[2]) // 32
        return _scalar_load(decoder, instruction, words)
    if match := re.fullmatch(
        r"ds_(read|load|write|store)(2st64|_2addr_stride64|2|_2addr)?_([bui]\d+)(_d16)?(_hi)?", name
    ):
        return _lds(
            decoder, instruction, match[1] in ("read", "load"), match[2] or "", match[3], bool(match[4]), bool(match[5])
        )
    return None


def _offset(instruction: Instruction, name: str = "offset") -> int:
    return int(instruction.modifiers.get(name, "0"), 0)


def _global(decoder: Decoder, instruction: Instruction, load: bool, kind: str) -> Step:
    """`global_load_b32 v1, v[2:3], off` or `global_load_b32 v1, v2, s[4:5]`; stores have address and data exchanged."""
    size, offset = GLOBAL_SIZES[kind], _offset(instruction)
    texts = instruction.operands
    data = decoder.operand(texts[0] if load else texts[1])
    vector, scalar = decoder.operand(texts[1] if load else texts[0]), decoder.operand(texts[2])
    high = "hi" in kind or data.half == "h"
    keeps_other_half = "d16" in kind
    signed = size < 0
    size = abs(size)

    def addresses(state: Wavefronts) -> Any:
        low, poison = vector.words(state)
        if scalar.kind == "none":
            upper, upper_poison = vector.words(state, 1)
            address = low.astype(np.uint64) | upper.astype(np.uint64) << np.uint64(32)
        else:
            (base, base_poison), (top, upper_poison) = scalar.words(state), scalar.words(state, 1)
            address = low.astype(np.uint64) + (base.astype(np.uint64) | top.astype(np.uint64) << np.uint64(32))
            poison = either(poison, base_poison)
        defined(either(poison, upper_poison), state.active, "an address")
        address = np.broadcast_to(address + np.int64(offset).astype(np.uint64), (state.count, state.lanes))
        return address.reshape(-1) if state.active is None else address[state.active]

    def load_step(state: Wavefronts) -> None:
        words, poison = state.memory.load(addresses(state), size)
        if signed:
            words = (
                (words.astype(np.uint16 if size == 2 else np.uint8).view(np.int16 if size == 2 else np.int8))
                .astype(np.int32)
                .view(np.uint32)
            )
        _deliver(state, data, words, poison, keeps_other_half, high)

    def store_step(state: Wavefronts) -> None:
        where = addresses(state)
        content, poison = _collected(state, data, size, high)
        if poison is not None and poison.any():
            defined(poison, None, "a value that is stored")
        state.memory.store(where, content)

    return load_step if load else store_step


def _collected(state: Wavefronts, data: Operand, size: int, high: bool) -> tuple[Any, Any]:
    """The bytes [lanes on, size] that a store writes, and their poison or None."""
    words, poisons = [], []
    shape = (state.count, state.lanes)
    for index in range((size + 3) // 4):
        word, poison = data.words(state, index)
        if high:
            word, poison = word >> np.uint32(16), None if poison is None else poison >> np.uint32(16)
        words.append(np.broadcast_to(word, shape))
        poisons.append(np.broadcast_to(np.uint32(0) if poison is None else poison, shape))
    on = state.lanes_on
    content = np.ascontiguousarray(np.stack(words, -1)[on]).view(np.uint8)[:, :size]
    mask = np.ascontiguousarray(np.stack(poisons, -1)[on]).view(np.uint8)[:, :size]
    return content, mask if mask.any() else None


def _deliver(state: Wavefronts, data: Operand, words: Any, poison: Any, half: bool, high: bool) -> None:
    """Write loaded words [lanes on, n] to the registers from `data` on."""
    on = state.lanes_on
    for index in range(words.shape[1]):
        value = np.zeros(on.shape, np.uint32)
        value[on] = words[:, index]
        unknown: Bits | None = None
        if poison is not None:
            unknown = np.zeros(on.shape, np.uint32)
            unknown[on] = poison[:, index]
        if half or data.half:
            held, held_poison = state.read(data.register)
            shift, kept = (np.uint32(16), np.uint32(0xFFFF)) if high else (np.uint32(0), np.uint32(0xFFFF0000))
            value = (value & np.uint32(0xFFFF)) << shift | held & kept
            unknown = None if unknown is None else (unknown & np.uint32(0xFFFF)) << shift
            unknown = either(unknown, None if held_poison is None else held_poison & kept)
        state.write(data.register + index, value, unknown)


def _scalar_load(decoder: Decoder, instruction: Instruction, words: int) -> Step:
    destination, base, where = (decoder.operand(text) for text in instruction.operands)
    extra = _offset(instruction)

    def step(state: Wavefronts) -> None:
        (low, low_poison), (high, high_poison) = base.words(state), base.words(state, 1)
        address = (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)) + np.uint64(extra)
        poison = either(low_poison, high_poison)
        if where.kind == "constant":
            address = address + np.int64(where.value).astype(np.uint64)
        elif where.kind == "scalar":
            register, register_poison = where.words(state)
            address, poison = address + register, either(poison, register_poison)
        defined(poison, None, "an address")
        address = np.broadcast_to(address[:, 0] & ~np.uint64(3), (state.count,))
        loaded, unknown = state.memory.load(address, 4 * words)
        for index in range(words):
            state.write_scalar(
                destination.register + index, loaded[:, index], False if unknown is None else unknown[:, index] != 0
            )

    return step


def _lds(decoder: Decoder, instruction: Instruction, load: bool, pair: str, kind: str, d16: bool, high: bool) -> Step:
    size = int(kind[1:]) // 8
    if kind[0] == "i":
        raise Unmodelled("a signed load from LDS")
    stride = size * (64 if "64" in pair else 1)
    offsets = [_offset(instruction, f"offset{n}") * stride for n in (0, 1)] if pair else [_offset(instruction)]
    texts = instruction.operands
    place = decoder.operand(texts[1] if load else texts[0])
    data = [decoder.operand(texts[0])] if load else [decoder.operand(text) for text in texts[1:]]

    def step(state: Wavefronts) -> None:
        base, poison = place.words(state)
        defined(poison, state.active, "an address in LDS")
        on = state.lanes_on
        flat = np.broadcast_to(base, on.shape)[on].astype(np.int64)
        groups = np.broadcast_to(state.place.group[state.selected][:, None], on.shape)[on]
        waves = np.broadcast_to(state.place.wave[state.selected][:, None], on.shape)[on]
        if load:
            # All is read before anything is written: the result may take the address's register.
            loaded = [state.lds.load(groups, waves, flat + offset, size) for offset in offsets]
            for number, (words, unknown) in enumerate(loaded):
                target = replace(data[0], register=data[0].register + number * max(1, size // 4))
                _deliver(state, target, words, unknown, d16, high or target.half == "h")
            return
        for number, offset in enumerate(offsets):
            content, unknown = _collected(state, data[number], size, high or data[number].half == "h")
            state.lds.store(groups, waves, flat + offset, content, unknown)

    return step
