"""Scalar instructions: one value a wave. Values are computed in 64-bit integers and cut to their width."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .disassembly import Instruction
from .errors import Unmodelled
from .operands import Operand, operand
from .state import Wavefronts
from .vector import COMPARISONS, Step

Wide = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

IGNORED = re.compile(
    r"s_(nop|waitcnt\w*|wait_\w+|delay_alu|clause|code_end|setprio|sleep|set_inst_prefetch_distance|inst_prefetch|"
    r"barrier_signal|sendmsg|round_mode|denorm_mode|wait_alu|set_vgpr_msb)$|(buffer_(gl[01]_inv|inv|wbl2\w*|wbinvl1\w*)|"
    r"global_(inv|wb|wbinv))$"
)
"""Waits, hints and cache control: what they order is always in order here (the README says what that hides)."""

ALIASES = {
    "s_add_co_u32": "s_add_u32", "s_sub_co_u32": "s_sub_u32", "s_add_co_i32": "s_add_i32", "s_sub_co_i32": "s_sub_i32",
    "s_add_co_ci_u32": "s_addc_u32", "s_sub_co_ci_u32": "s_subb_u32", "s_addk_co_i32": "s_addk_i32",
    "s_and_not1_b32": "s_andn2_b32", "s_and_not1_b64": "s_andn2_b64", "s_or_not1_b32": "s_orn2_b32",
    "s_or_not1_b64": "s_orn2_b64", "s_and_not1_saveexec_b32": "s_andn2_saveexec_b32",
    "s_and_not1_saveexec_b64": "s_andn2_saveexec_b64", "s_ctz_i32_b32": "s_ff1_i32_b32",
    "v_s_exp_f32": "s_exp_f32", "v_s_log_f32": "s_log_f32", "v_s_rcp_f32": "s_rcp_f32", "v_s_rsq_f32": "s_rsq_f32",
    "v_s_sqrt_f32": "s_sqrt_f32",
}  # fmt: skip

U32 = np.uint64(0xFFFFFFFF)
BITS: dict[str, Callable[[Wide, Wide], Wide]] = {
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b, "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b, "nand": lambda a, b: ~(a & b), "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}  # fmt: skip


def signed(value: Wide) -> npt.NDArray[np.int64]:
    """The low 32 bits as a signed number."""
    return value.astype(np.uint32).view(np.int32).astype(np.int64)


class Scalars:
    """Builds what executes a scalar instruction, branches and barriers excepted."""

    def build(self, instruction: Instruction) -> Step | None:
        """None when this is no instruction of this module."""
        mnemonic = instruction.mnemonic
        if IGNORED.match(mnemonic):
            return lambda state: None
        name = ALIASES.get(mnemonic, mnemonic)
        if not name.startswith("s_"):
            return None
        texts = instruction.operands
        if match := re.fullmatch(r"s_(\w+?)_saveexec_b(32|64)", name):
            return _saveexec(texts, BITS[match[1]], int(match[2]) // 32)
        if (match := re.fullmatch(r"s_(and|or|xor|andn2|orn2|nand|nor|xnor)_b(32|64)", name)) is not None:
            return _computed(texts, BITS[match[1]], int(match[2]) // 32, scc=lambda a, b, r: r != 0)
        if match := re.fullmatch(r"s_cmpk?_(\w\w)_([ui])(32|64)", name):
            return _compared(texts, match[1], match[2] == "i", int(match[3]) // 32)
        if match := re.fullmatch(r"s_cmp_(\w+)_f32", name):
            return _compared_floats(texts, match[1])
        if match := re.fullmatch(r"s_bitcmp([01])_b32", name):
            wanted = np.uint64(int(match[1]))
            return _flag(texts, lambda a, b: (a >> (b & np.uint64(31)) & np.uint64(1)) == wanted)
        if match := re.fullmatch(r"s_cselect_b(32|64)", name):
            return _selected(texts, int(match[1]) // 32)
        if name in TWO_SOURCES:
            words, compute, scc = TWO_SOURCES[name]
            return _computed(texts, compute, words, scc=scc)
        if name in ONE_SOURCE:
            words, single, scc = ONE_SOURCE[name]
            return _computed((*texts, "0"), lambda a, b: single(a), words, scc=scc)
        if name in ("s_addk_i32", "s_mulk_i32"):
            _, compute, scc = TWO_SOURCES["s_add_i32" if "add" in name else "s_mul_i32"]
            return _computed((texts[0], texts[0], _extended(texts[1])), compute, 1, scc=scc)
        if name in ("s_movk_i32", "s_cmovk_i32"):
            if name == "s_cmovk_i32":
                raise Unmodelled(name)
            return _computed((texts[0], _extended(texts[1]), "0"), lambda a, b: a, 1, scc=None)
        if name in ("s_fmac_f32", "s_fmaak_f32", "s_fmamk_f32"):
            return _fused(texts[0], texts[1:] if len(texts) == 4 else (*texts[1:], texts[0]))
        if name in ("s_addc_u32", "s_subb_u32"):
            return _with_carry(texts, add=name == "s_addc_u32")
        if name == "s_getpc_b64":
            return _program_counter(texts[0], instruction.next)
        return None


def source(text: str, words: int) -> Callable[[Wavefronts], tuple[Wide, Flags]]:
    """A scalar source as an unsigned number of `words` words, [count], and where it is poisoned."""
    found = operand(text)
    if found.kind == "float":
        bits = np.float32(float(text)).view(np.uint32) if words == 1 else np.float64(float(text)).view(np.uint64)
        return lambda state: (np.full(state.count, bits, np.uint64), np.zeros(state.count, np.bool_))
    if found.kind in ("constant", "none"):
        value = np.uint64(found.value & (1 << 32 * words) - 1)
        return lambda state: (np.full(state.count, value), np.zeros(state.count, np.bool_))
    if found.kind != "scalar" or found.negative:
        raise Unmodelled(f"scalar source {text}")

    def read(state: Wavefronts) -> tuple[Wide, Flags]:
        value, poison = state.read_scalar(found.register)
        total = value.astype(np.uint64)
        if words == 2:
            high, high_poison = state.read_scalar(found.register + 1)
            total, poison = total | high.astype(np.uint64) << np.uint64(32), poison | high_poison
        return total, poison

    return read


def write(state: Wavefronts, destination: Operand, value: Wide, poison: Any, words: int) -> None:
    if destination.kind == "none":
        return
    if words == 2:  # the high word first: writing exec_lo alone would show a mask that never was
        state.scalar[destination.register + 1][state.selected] = (value >> np.uint64(32)).astype(np.uint32)
        state.scalar_poison[destination.register + 1][state.selected] = poison
    state.write_scalar(destination.register, (value & U32).astype(np.uint32), poison)


Flag = Callable[[Wide, Wide, Wide], Flags]


def _computed(texts: tuple[str, ...], compute: Callable[[Wide, Wide], Any], words: int, *, scc: Flag | None) -> Step:
    if len(texts) != 3:
        raise Unmodelled(f"{len(texts)} operands")
    destination = operand(texts[0])
    first, second = source(texts[1], words), source(texts[2], words)
    keep = np.uint64((1 << 32 * words) - 1)

    def step(state: Wavefronts) -> None:
        (a, a_poison), (b, b_poison) = first(state), second(state)
        result = np.asarray(compute(a, b)).astype(np.uint64) & keep
        poison = a_poison | b_poison
        if scc is not None:
            state.write_scc(scc(a, b, result), poison)
        write(state, destination, result, poison, words)

    return step


def _fused(result: str, texts: tuple[str, ...]) -> Step:
    """The first of `texts` times the second plus the third, in float32, rounded once."""
    destination = operand(result)
    sources = [source(text, 1) for text in texts]

    def step(state: Wavefronts) -> None:
        values, poisons = zip(*(read(state) for read in sources), strict=True)
        a, b, c = (_single(value).astype(np.float64) for value in values)
        write(state, destination, _bits(a * b + c).astype(np.uint64), poisons[0] | poisons[1] | poisons[2], 1)

    return step


def _saveexec(texts: tuple[str, ...], combine: Callable[[Wide, Wide], Wide], words: int) -> Step:
    """Save the mask of lanes that are on, and set it to `combine(source, mask)`."""
    saved, mask = operand(texts[0]), operand("exec" if words == 2 else "exec_lo")
    given, current = source(texts[1], words), source("exec" if words == 2 else "exec_lo", words)
    keep = np.uint64((1 << 32 * words) - 1)

    def step(state: Wavefronts) -> None:
        (a, poison), (old, old_poison) = given(state), current(state)
        result = combine(a, old) & keep
        write(state, saved, old, old_poison, words)
        state.write_scc(result != 0, poison)
        write(state, mask, result, poison, words)

    return step


def _compared(texts: tuple[str, ...], relation: str, is_signed: bool, words: int) -> Step:
    compare = COMPARISONS["ne" if relation == "lg" else relation]

    def flag(a: Wide, b: Wide) -> Flags:
        if not is_signed:
            return compare(a, b)
        return compare(signed(a), signed(b)) if words == 1 else compare(a.view(np.int64), b.view(np.int64))

    return _flag(texts, flag, words)


def _compared_floats(texts: tuple[str, ...], relation: str) -> Step:
    compare = COMPARISONS[relation]
    return _flag(texts, lambda a, b: compare(_single(a), _single(b)))


def _flag(texts: tuple[str, ...], flag: Callable[[Wide, Wide], Flags], words: int = 1) -> Step:
    first, second = (source(text, words) for text in texts)

    def step(state: Wavefronts) -> None:
        (a, a_poison), (b, b_poison) = first(state), second(state)
        state.write_scc(flag(a, b), a_poison | b_poison)

    return step


def _selected(texts: tuple[str, ...], words: int) -> Step:
    destination = operand(texts[0])
    first, second = source(texts[1], words), source(texts[2], words)

    def step(state: Wavefronts) -> None:
        (a, a_poison), (b, b_poison) = first(state), second(state)
        chosen, unknown = state.scc[state.selected], state.scc_poison[state.selected]
        write(state, destination, np.where(chosen, a, b), np.where(chosen, a_poison, b_poison) | unknown, words)

    return step


def _with_carry(texts: tuple[str, ...], *, add: bool) -> Step:
    destination = operand(texts[0])
    first, second = source(texts[1], 1), source(texts[2], 1)

    def step(state: Wavefronts) -> None:
        (a, a_poison), (b, b_poison) = first(state), second(state)
        carry = state.scc[state.selected].astype(np.uint64)
        poison = a_poison | b_poison | state.scc_poison[state.selected]
        total = a + b + carry if add else a - b - carry
        state.write_scc((total >> np.uint64(32) & np.uint64(1)).astype(np.bool_), poison)
        write(state, destination, total & U32, poison, 1)

    return step


def _program_counter(text: str, following: int) -> Step:
    """The address of the next instruction. The machine adds where the code object lies (`Wavefronts.code_base`)."""
    destination = operand(text)

    def step(state: Wavefronts) -> None:
        write(state, destination, np.full(state.count, state.code_base + following, np.uint64), False, 2)

    return step


def _extended(text: str) -> str:
    """A 16-bit immediate as the signed number it stands for."""
    value = int(text, 0) & 0xFFFF
    return str(value - 0x10000 if value & 0x8000 else value)


def _single(value: Wide) -> npt.NDArray[np.float32]:
    return value.astype(np.uint32).view(np.float32)


def _bits(value: Any) -> npt.NDArray[np.uint32]:
    return np.asarray(value, np.float32).view(np.uint32)


def _field(a: Wide, b: Wide, *, sign: bool) -> Any:
    offset, width = b & np.uint64(31), b >> np.uint64(16) & np.uint64(127)
    field = (a >> offset) & ((np.uint64(1) << width) - np.uint64(1))
    if not sign:
        return field
    top = np.where(width > 0, np.uint64(1) << np.maximum(width, np.uint64(1)) - np.uint64(1), np.uint64(0))
    return (field ^ top) - top


def _nonzero(a: Wide, b: Wide, result: Wide) -> Flags:
    return result != 0


def _carry_out(a: Wide, b: Wide, result: Wide) -> Flags:
    return a + b > U32


def _borrow(a: Wide, b: Wide, result: Wide) -> Flags:
    return a < b


def _overflow(a: Wide, b: Wide, result: Wide) -> Flags:
    return signed(a) + signed(b) != signed(result)


def _underflow(a: Wide, b: Wide, result: Wide) -> Flags:
    return signed(a) - signed(b) != signed(result)


def _shift_add(amount: int) -> tuple[int, Callable[[Wide, Wide], Any], Flag]:
    places = np.uint64(amount)
    return 1, lambda a, b: (a << places) + b, lambda a, b, r: (a << places) + b > U32


# name: (words, what it computes, what it says in SCC)
TWO_SOURCES: dict[str, tuple[int, Callable[[Wide, Wide], Any], Flag | None]] = {
    "s_add_u32": (1, lambda a, b: a + b, _carry_out),
    "s_sub_u32": (1, lambda a, b: a - b, _borrow),
    "s_add_i32": (1, lambda a, b: a + b, _overflow),
    "s_sub_i32": (1, lambda a, b: a - b, _underflow),
    "s_add_nc_u64": (2, lambda a, b: a + b, None),
    "s_add_u64": (2, lambda a, b: a + b, None),
    "s_sub_nc_u64": (2, lambda a, b: a - b, None),
    "s_mul_i32": (1, lambda a, b: a * b, None),
    "s_mul_u64": (2, lambda a, b: a * b, None),
    "s_mul_hi_u32": (1, lambda a, b: a * b >> np.uint64(32), None),
    "s_mul_hi_i32": (1, lambda a, b: signed(a) * signed(b) >> 32, None),
    "s_lshl_b32": (1, lambda a, b: a << (b & np.uint64(31)), _nonzero),
    "s_lshr_b32": (1, lambda a, b: a >> (b & np.uint64(31)), _nonzero),
    "s_ashr_i32": (1, lambda a, b: signed(a) >> (b & np.uint64(31)).astype(np.int64), _nonzero),
    "s_lshl_b64": (2, lambda a, b: a << (b & np.uint64(63)), _nonzero),
    "s_lshr_b64": (2, lambda a, b: a >> (b & np.uint64(63)), _nonzero),
    "s_ashr_i64": (2, lambda a, b: a.view(np.int64) >> (b & np.uint64(63)).astype(np.int64), _nonzero),
    "s_bfe_u32": (1, lambda a, b: _field(a, b, sign=False), _nonzero),
    "s_bfe_i32": (1, lambda a, b: _field(a, b, sign=True), _nonzero),
    "s_bfm_b32": (1, lambda a, b: ((np.uint64(1) << (a & np.uint64(31))) - np.uint64(1)) << (b & np.uint64(31)), None),
    "s_min_u32": (1, np.minimum, lambda a, b, r: a < b),
    "s_max_u32": (1, np.maximum, lambda a, b, r: a > b),
    "s_min_i32": (1, lambda a, b: np.minimum(signed(a), signed(b)), lambda a, b, r: signed(a) < signed(b)),
    "s_max_i32": (1, lambda a, b: np.maximum(signed(a), signed(b)), lambda a, b, r: signed(a) > signed(b)),
    "s_lshl1_add_u32": _shift_add(1),
    "s_lshl2_add_u32": _shift_add(2),
    "s_lshl3_add_u32": _shift_add(3),
    "s_lshl4_add_u32": _shift_add(4),
    "s_pack_ll_b32_b16": (1, lambda a, b: a & np.uint64(0xFFFF) | (b & np.uint64(0xFFFF)) << np.uint64(16), None),
    "s_mul_f32": (1, lambda a, b: _bits(_single(a) * _single(b)), None),
    "s_add_f32": (1, lambda a, b: _bits(_single(a) + _single(b)), None),
    "s_sub_f32": (1, lambda a, b: _bits(_single(a) - _single(b)), None),
    "s_max_num_f32": (1, lambda a, b: _bits(np.fmax(_single(a), _single(b))), None),
    "s_min_num_f32": (1, lambda a, b: _bits(np.fmin(_single(a), _single(b))), None),
}
ONE_SOURCE: dict[str, tuple[int, Callable[[Wide], Any], Flag | None]] = {
    "s_mov_b32": (1, lambda a: a, None),
    "s_mov_b64": (2, lambda a: a, None),
    "s_not_b32": (1, lambda a: ~a, _nonzero),
    "s_not_b64": (2, lambda a: ~a, _nonzero),
    "s_abs_i32": (1, lambda a: np.abs(signed(a)), _nonzero),
    "s_sext_i32_i16": (1, lambda a: a.astype(np.uint16).view(np.int16).astype(np.int64), None),
    "s_sext_i32_i8": (1, lambda a: a.astype(np.uint8).view(np.int8).astype(np.int64), None),
    "s_brev_b32": (1, lambda a: np.array([int(f"{int(v):032b}"[::-1], 2) for v in a], np.uint64), None),
    "s_exp_f32": (1, lambda a: _bits(np.exp2(_single(a).astype(np.float64))), None),
    "s_log_f32": (1, lambda a: _bits(np.log2(_single(a).astype(np.float64))), None),
    "s_rcp_f32": (1, lambda a: _bits(1 / _single(a).astype(np.float64)), None),
    "s_rsq_f32": (1, lambda a: _bits(1 / np.sqrt(_single(a).astype(np.float64))), None),
    "s_sqrt_f32": (1, lambda a: _bits(np.sqrt(_single(a).astype(np.float64))), None),
    "s_cvt_f32_u32": (1, lambda a: _bits(a.astype(np.float32)), None),
    "s_cvt_f32_i32": (1, lambda a: _bits(signed(a).astype(np.float32)), None),
    "s_cvt_u32_f32": (
        1,
        lambda a: np.clip(np.trunc(_single(a).astype(np.float64)), 0, 2.0**32 - 1).astype(np.uint64),
        None,
    ),
}
