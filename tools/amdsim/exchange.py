"""Instructions that move values between the lanes of a wave and touch no memory, DPP excepted (lanes.py)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .disassembly import Instruction
from .errors import Unmodelled
from .memory import defined
from .state import Wavefronts
from .vector import Decoder, Step, base_name, numbers


def build(decoder: Decoder, instruction: Instruction) -> Step | None:
    """What executes an exchange; None when this is none."""
    name = base_name(instruction.mnemonic)
    if name == "ds_bpermute_b32":
        return _bpermute(decoder, instruction)
    if name == "ds_swizzle_b32":
        return _swizzle(decoder, instruction)
    if name in ("v_permlane16_b32", "v_permlanex16_b32"):
        return _permlane(decoder, instruction, other_row="x16" in name)
    if name in ("v_permlane16_swap_b32", "v_permlane32_swap_b32"):
        return _swap(decoder, instruction, 16 if "16" in name else 32)
    return None


def _offset(instruction: Instruction) -> int:
    return int(instruction.modifiers.get("offset", "0"), 0)


def _permlane(decoder: Decoder, instruction: Instruction, *, other_row: bool) -> Step:
    """Lane i of a row of 16 reads lane `nibble i` of its own row, or of the other one of its 32 lanes."""
    destination, source, low, high = (decoder.operand(text) for text in instruction.operands)
    inactive_too, zero_fill = numbers(instruction, "op_sel", 2, 0)[:2]

    def step(state: Wavefronts) -> None:
        value, poison = source.words(state)
        nibbles = []
        for part in (low, high):
            words, unknown = part.words(state)
            defined(unknown, None, "the number of a lane")
            nibbles.append(words[:, :1] >> np.uint32(4) * np.arange(8, dtype=np.uint32) & np.uint32(15))
        choice = np.broadcast_to(np.concatenate(np.broadcast_arrays(*nibbles), 1), (state.count, 16)).astype(np.int64)
        row = state.lane // 16 ^ int(other_row)
        lane = row * 16 + choice[:, state.lane % 16]
        wave = np.arange(state.count)[:, None]
        on = np.ones(lane.shape, np.bool_) if inactive_too else state.lanes_on[wave, lane]
        moved = np.where(on, _spread_out(state, value)[wave, lane], np.uint32(0))
        unknown = None if poison is None else np.where(on, _spread_out(state, poison)[wave, lane], np.uint32(0))
        state.write(destination.register, moved, unknown, None if zero_fill else on)

    return step


def _swap(decoder: Decoder, instruction: Instruction, rows: int) -> Step:
    """Exchange the odd rows (of 16 or 32 lanes) of the first register with the even rows of the second."""
    first, second = (decoder.operand(text) for text in instruction.operands)

    def step(state: Wavefronts) -> None:
        if state.active is not None:
            raise Unmodelled("an exchange of rows with lanes switched off")
        odd = state.lane // rows % 2 == 1
        partner = state.lane ^ rows
        (a, a_poison), (b, b_poison) = first.words(state), second.words(state)
        new = []
        for kept, other, keeps in (((a, a_poison), (b, b_poison), ~odd), ((b, b_poison), (a, a_poison), odd)):
            value = np.where(keeps, _spread_out(state, kept[0]), _spread_out(state, other[0])[:, partner])
            zero = np.zeros((1, 1), np.uint32)
            held, came = (_spread_out(state, zero if p is None else p) for p in (kept[1], other[1]))
            new.append((value, np.where(keeps, held, came[:, partner])))
        for operand, (value, poison) in zip((first, second), new, strict=True):
            state.write(operand.register, value, poison if poison.any() else None)

    return step


def _spread_out(state: Wavefronts, words: Any) -> Any:
    return np.broadcast_to(words, (state.count, state.lanes))


def _bpermute(decoder: Decoder, instruction: Instruction) -> Step:
    """Each lane reads another lane's register; a lane that is off is read as 0."""
    destination, index, source = (decoder.operand(text) for text in instruction.operands)
    offset = _offset(instruction)

    def step(state: Wavefronts) -> None:
        chosen, index_poison = index.words(state)
        value, poison = source.words(state)
        defined(index_poison, state.active, "the number of a lane")
        shape = (state.count, state.lanes)
        lane = np.broadcast_to((chosen + np.uint32(offset) >> np.uint32(2)) % np.uint32(state.lanes), shape).astype(
            np.int64
        )
        wave = np.arange(state.count)[:, None]
        on = state.lanes_on[wave, lane]
        moved = np.where(on, np.broadcast_to(value, shape)[wave, lane], np.uint32(0))
        unknown = None if poison is None else np.where(on, np.broadcast_to(poison, shape)[wave, lane], np.uint32(0))
        state.write(destination.register, moved, unknown)

    return step


def _swizzle(decoder: Decoder, instruction: Instruction) -> Step:
    """Every lane reads lane ((lane & and) | or) ^ xor of its 32; LLVM has names for the usual patterns."""
    destination, source = (decoder.operand(text) for text in instruction.operands)
    keep, force, flip = _swizzle_masks(instruction.modifiers.get("offset", "0"))
    lane = np.arange(64)
    chosen = lane & ~31 | ((lane & 31 & keep) | force) ^ flip

    def step(state: Wavefronts) -> None:
        value, poison = source.words(state)
        place = chosen[: state.lanes]
        on = state.lanes_on[:, place]
        moved = np.where(on, _spread_out(state, value)[:, place], np.uint32(0))
        unknown = None if poison is None else np.where(on, _spread_out(state, poison)[:, place], np.uint32(0))
        state.write(destination.register, moved, unknown)

    return step


def _swizzle_masks(text: str) -> tuple[int, int, int]:
    if match := re.fullmatch(r"swizzle\((SWAP|REVERSE|BROADCAST),(\d+)(?:,(\d+))?\)", text):
        kind, size = match[1], int(match[2])
        if kind == "BROADCAST":
            return 31 & ~(size - 1), int(match[3]), 0
        return 31, 0, size if kind == "SWAP" else size - 1
    if text.startswith("swizzle") or int(text, 0) >> 15:
        raise Unmodelled(f"ds_swizzle_b32 offset:{text}")
    pattern = int(text, 0)
    return pattern & 31, pattern >> 5 & 31, pattern >> 10 & 31
