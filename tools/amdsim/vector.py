"""Vector arithmetic: one value a lane, from a table of what each operation computes, and the few that need more.

Single precision fused operations are computed in double precision and rounded once more: with 24-bit factors the
product is exact, and the sum is off by a double rounding in rare cases. Reciprocals and square roots are the exact ones
rounded; the hardware's may differ by one unit in the last place.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .disassembly import Instruction
from .errors import Unmodelled
from .lanes import permutation
from .operands import DTYPES, Operand, Reader, Values, either, operand, spread, typed
from .state import ALL, Bits, Mask, Wavefronts

Step = Callable[[Wavefronts], None]
Table = dict[str, tuple[str, str, Callable[..., Any]]]

SUFFIX = re.compile(r"_(e32|e64|dpp|sdwa|e64_dpp|dpp8)$")
ALIASES = {
    "v_add_nc_u32": "v_add_u32", "v_sub_nc_u32": "v_sub_u32", "v_subrev_nc_u32": "v_subrev_u32",
    "v_add_nc_i32": "v_add_u32", "v_add_i32": "v_add_u32", "v_sub_i32": "v_sub_u32",
    "v_min_num_f32": "v_min_f32", "v_max_num_f32": "v_max_f32", "v_min_num_f16": "v_min_f16",
    "v_max_num_f16": "v_max_f16", "v_accvgpr_read_b32": "v_mov_b32", "v_accvgpr_write_b32": "v_mov_b32",
    "v_accvgpr_mov_b32": "v_mov_b32", "v_fmaak_f32": "v_fma_f32", "v_clz_i32_u32": "v_ffbh_u32",
    "v_add_nc_u16": "v_add_u16", "v_max3_num_f32": "v_max3_f32",
    "v_dot2acc_f32_f16": "v_dot2c_f32_f16",
}  # fmt: skip
"""One operation under several names."""


def _shift(amount: Values, bits: int) -> Values:
    return amount & amount.dtype.type(bits - 1)


def _high(a: Values, b: Values) -> Values:
    return (a.astype(np.uint64) * b.astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _fma(a: Values, b: Values, c: Values) -> Values:
    return (a.astype(np.float64) * b + c).astype(a.dtype)


def _to_integer(kind: type, low: int, high: int) -> Callable[[Values], Values]:
    return lambda a: np.clip(np.nan_to_num(np.trunc(a.astype(np.float64)), nan=0.0), low, high).astype(kind)


def _bfe(a: Values, offset: Values, width: Values) -> Values:
    width = width & np.uint32(31)
    return (a >> (offset & np.uint32(31))) & ((np.uint32(1) << width) - np.uint32(1))


def _bfe_signed(a: Values, offset: Values, width: Values) -> Values:
    width = width.view(np.int32) & np.int32(31)
    field = (a >> (offset & np.int32(31))) & ((np.int32(1) << width) - np.int32(1))
    sign = np.where(width > 0, np.int32(1) << np.maximum(width - 1, 0), np.int32(0))
    return ((field ^ sign) - sign).astype(np.int32)


def _perm(high: Values, low: Values, selector: Values) -> Values:
    both = high.astype(np.uint64) << np.uint64(32) | low
    result = np.zeros(np.broadcast_shapes(high.shape, low.shape, selector.shape), np.uint32)
    for byte in range(4):
        choice = selector >> np.uint32(8 * byte) & np.uint32(255)
        sign = both >> np.where(
            choice < 12, (choice.astype(np.uint64) & np.uint64(3)) * np.uint64(16) + np.uint64(15), 0
        )
        picked = (both >> (choice.astype(np.uint64) & np.uint64(7)) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        signs = (sign.astype(np.uint32) & np.uint32(1)) * np.uint32(255)
        value = np.where(choice < 8, picked, np.where(choice < 12, signs, np.where(choice == 12, 0, 255)))
        result |= value.astype(np.uint32) << np.uint32(8 * byte)
    return result


def _alignbit(high: Values, low: Values, amount: Values) -> Values:
    both = high.astype(np.uint64) << np.uint64(32) | low
    return (both >> (amount & np.uint32(31)).astype(np.uint64)).astype(np.uint32)


def _u24(a: Values) -> Values:
    return a & np.uint32(0xFFFFFF)


def _i24(a: Values) -> Values:
    return (a << np.int32(8)) >> np.int32(8)


def _ldexp(a: Values, exponent: Values) -> Values:
    return np.ldexp(a, exponent)


def _bitop3(a: Values, b: Values, c: Values, table: int) -> Values:
    shape = np.broadcast_shapes(a.shape, b.shape, c.shape)
    result = np.zeros(shape, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _leading_zeros(a: Values) -> Values:
    return np.where(a == 0, -1, 31 - np.log2(np.maximum(a, 1).astype(np.float64)).astype(np.int32)).astype(np.int32)


def _byte(number: int) -> Callable[[Values], Values]:
    place = np.uint32(8 * number)
    return lambda a: (a >> place & np.uint32(255)).astype(np.float32)


def _pair(low: Values, high: Values) -> Values:
    a, b = np.broadcast_arrays(low.view(np.uint16), high.view(np.uint16))
    return a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)


def _median(a: Values, b: Values, c: Values) -> Values:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


# name: (result, sources, what it computes)
TABLE: Table = {
    "v_mov_b32": ("u32", "u32", lambda a: a),
    "v_mov_b16": ("u16", "u16", lambda a: a),
    "v_not_b32": ("u32", "u32", lambda a: ~a),
    "v_and_b32": ("u32", "u32 u32", lambda a, b: a & b),
    "v_or_b32": ("u32", "u32 u32", lambda a, b: a | b),
    "v_xor_b32": ("u32", "u32 u32", lambda a, b: a ^ b),
    "v_xnor_b32": ("u32", "u32 u32", lambda a, b: ~(a ^ b)),
    "v_and_b16": ("u16", "u16 u16", lambda a, b: a & b),
    "v_or_b16": ("u16", "u16 u16", lambda a, b: a | b),
    "v_or3_b32": ("u32", "u32 u32 u32", lambda a, b, c: a | b | c),
    "v_xor3_b32": ("u32", "u32 u32 u32", lambda a, b, c: a ^ b ^ c),
    "v_and_or_b32": ("u32", "u32 u32 u32", lambda a, b, c: a & b | c),
    "v_bfi_b32": ("u32", "u32 u32 u32", lambda a, b, c: a & b | ~a & c),
    "v_lshlrev_b32": ("u32", "u32 u32", lambda a, b: b << _shift(a, 32)),
    "v_lshrrev_b32": ("u32", "u32 u32", lambda a, b: b >> _shift(a, 32)),
    "v_ashrrev_i32": ("i32", "i32 i32", lambda a, b: b >> _shift(a, 32)),
    "v_lshlrev_b16": ("u16", "u16 u16", lambda a, b: b << _shift(a, 16)),
    "v_lshrrev_b16": ("u16", "u16 u16", lambda a, b: b >> _shift(a, 16)),
    "v_lshlrev_b64": ("u64", "u32 u64", lambda a, b: b << _shift(a, 64).astype(np.uint64)),
    "v_lshrrev_b64": ("u64", "u32 u64", lambda a, b: b >> _shift(a, 64).astype(np.uint64)),
    "v_ashrrev_i64": ("i64", "u32 i64", lambda a, b: b >> _shift(a, 64).astype(np.int64)),
    "v_lshl_or_b32": ("u32", "u32 u32 u32", lambda a, b, c: a << _shift(b, 32) | c),
    "v_lshl_add_u32": ("u32", "u32 u32 u32", lambda a, b, c: (a << _shift(b, 32)) + c),
    "v_add_lshl_u32": ("u32", "u32 u32 u32", lambda a, b, c: a + b << _shift(c, 32)),
    "v_xad_u32": ("u32", "u32 u32 u32", lambda a, b, c: (a ^ b) + c),
    "v_lshl_add_u64": ("u64", "u64 u32 u64", lambda a, b, c: (a << (b & np.uint32(7)).astype(np.uint64)) + c),
    "v_alignbit_b32": ("u32", "u32 u32 u32", _alignbit),
    "v_alignbyte_b32": ("u32", "u32 u32 u32", lambda a, b, c: _alignbit(a, b, (c & np.uint32(3)) * np.uint32(8))),
    "v_bfe_u32": ("u32", "u32 u32 u32", _bfe),
    "v_bfe_i32": ("i32", "i32 i32 u32", _bfe_signed),
    "v_perm_b32": ("u32", "u32 u32 u32", _perm),
    "v_add_u32": ("u32", "u32 u32", lambda a, b: a + b),
    "v_sub_u32": ("u32", "u32 u32", lambda a, b: a - b),
    "v_subrev_u32": ("u32", "u32 u32", lambda a, b: b - a),
    "v_add3_u32": ("u32", "u32 u32 u32", lambda a, b, c: a + b + c),
    "v_mul_lo_u16": ("u16", "u16 u16", lambda a, b: a * b),
    "v_add_u16": ("u16", "u16 u16", lambda a, b: a + b),
    "v_add_nc_u64": ("u64", "u64 u64", lambda a, b: a + b),
    "v_mul_lo_u32": ("u32", "u32 u32", lambda a, b: a * b),
    "v_mul_hi_u32": ("u32", "u32 u32", _high),
    "v_mul_u32_u24": ("u32", "u32 u32", lambda a, b: _u24(a) * _u24(b)),
    "v_mad_i32_i24": ("i32", "i32 i32 i32", lambda a, b, c: _i24(a) * _i24(b) + c),
    "v_mad_u32_u24": ("u32", "u32 u32 u32", lambda a, b, c: _u24(a) * _u24(b) + c),
    "v_mad_u32_u16": ("u32", "u16 u16 u32", lambda a, b, c: a.astype(np.uint32) * b + c),
    "v_min_u32": ("u32", "u32 u32", np.minimum),
    "v_max_u32": ("u32", "u32 u32", np.maximum),
    "v_min_i32": ("i32", "i32 i32", np.minimum),
    "v_max_i32": ("i32", "i32 i32", np.maximum),
    "v_med3_i32": ("i32", "i32 i32 i32", _median),
    "v_ffbh_u32": ("i32", "u32", _leading_zeros),
    "v_add_f32": ("f32", "f32 f32", lambda a, b: a + b),
    "v_sub_f32": ("f32", "f32 f32", lambda a, b: a - b),
    "v_subrev_f32": ("f32", "f32 f32", lambda a, b: b - a),
    "v_mul_f32": ("f32", "f32 f32", lambda a, b: a * b),
    "v_min_f32": ("f32", "f32 f32", np.fmin),
    "v_max_f32": ("f32", "f32 f32", np.fmax),
    "v_max3_f32": ("f32", "f32 f32 f32", lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    "v_fma_f32": ("f32", "f32 f32 f32", _fma),
    "v_rcp_f32": ("f32", "f32", lambda a: (1 / a.astype(np.float64)).astype(np.float32)),
    "v_rcp_iflag_f32": ("f32", "f32", lambda a: (1 / a.astype(np.float64)).astype(np.float32)),
    "v_rsq_f32": ("f32", "f32", lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(np.float32)),
    "v_sqrt_f32": ("f32", "f32", lambda a: np.sqrt(a.astype(np.float64)).astype(np.float32)),
    "v_exp_f32": ("f32", "f32", lambda a: np.exp2(a.astype(np.float64)).astype(np.float32)),
    "v_log_f32": ("f32", "f32", lambda a: np.log2(a.astype(np.float64)).astype(np.float32)),
    "v_cvt_pk_f16_f32": ("u32", "f32 f32", lambda a, b: _pair(a.astype(np.float16), b.astype(np.float16))),
    "v_trunc_f32": ("f32", "f32", np.trunc),
    "v_floor_f32": ("f32", "f32", np.floor),
    "v_rndne_f32": ("f32", "f32", np.rint),
    "v_ldexp_f32": ("f32", "f32 i32", _ldexp),
    "v_add_f16": ("f16", "f16 f16", lambda a, b: a + b),
    "v_sub_f16": ("f16", "f16 f16", lambda a, b: a - b),
    "v_subrev_f16": ("f16", "f16 f16", lambda a, b: b - a),
    "v_mul_f16": ("f16", "f16 f16", lambda a, b: a * b),
    "v_min_f16": ("f16", "f16 f16", np.fmin),
    "v_max_f16": ("f16", "f16 f16", np.fmax),
    "v_fma_f16": ("f16", "f16 f16 f16", _fma),
    "v_cvt_f32_f16": ("f32", "f16", lambda a: a.astype(np.float32)),
    "v_cvt_f16_f32": ("f16", "f32", lambda a: a.astype(np.float16)),
    "v_cvt_f32_u32": ("f32", "u32", lambda a: a.astype(np.float32)),
    "v_cvt_f32_i32": ("f32", "i32", lambda a: a.astype(np.float32)),
    "v_cvt_u32_f32": ("u32", "f32", _to_integer(np.uint32, 0, 2**32 - 1)),
    "v_cvt_i32_f32": ("i32", "f32", _to_integer(np.int32, -(2**31), 2**31 - 1)),
    "v_cvt_f16_u16": ("f16", "u16", lambda a: a.astype(np.float16)),
    "v_cvt_f16_i16": ("f16", "i16", lambda a: a.astype(np.float16)),
    "v_cvt_u32_u16": ("u32", "u16", lambda a: a.astype(np.uint32)),
    "v_pack_b32_f16": ("u32", "u16 u16", lambda a, b: a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)),
}  # fmt: skip
TABLE |= {f"v_cvt_f32_ubyte{byte}": ("f32", "u32", _byte(byte)) for byte in range(4)}

KEEPS_BITS_APART = {
    "v_mov_b32", "v_mov_b16", "v_not_b32", "v_xor_b32", "v_xnor_b32", "v_xor3_b32", "v_pack_b32_f16", "v_cvt_u32_u16",
}  # fmt: skip
"""Each bit of the result depends on the same bit of the sources (a pack's: where it came from)."""

CARRIES_UPWARD = {"v_lshl_add_u64", "v_add_nc_u64", "v_lshlrev_b64"}
"""The low word of the result depends on the low words of the sources only."""

COMPARISONS: dict[str, Callable[[Values, Values], Mask]] = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "lg": lambda a, b: (a < b) | (a > b), "neq": lambda a, b: a != b, "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b), "ngt": lambda a, b: ~(a > b), "nge": lambda a, b: ~(a >= b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)), "u": lambda a, b: np.isnan(a) | np.isnan(b),
}  # fmt: skip


def _is_of_class(value: Values, classes: Values) -> Mask:
    """Whether `value` is of one of the classes whose bits are set: NaNs, then from -infinity up to +infinity."""
    smallest = np.finfo(value.dtype).smallest_normal
    negative, size = np.signbit(value), np.abs(value)
    kind = np.where(size == 0, 2, np.where(size < smallest, 1, np.where(np.isinf(size), -1, 0)))
    bit = np.where(negative, np.choose(kind + 1, [2, 3, 4, 5]), np.choose(kind + 1, [9, 8, 7, 6]))
    bit = np.where(np.isnan(value), 1, bit)
    answer: Mask = (classes >> bit.astype(np.uint32) & np.uint32(1)).astype(np.bool_)
    return answer


def base_name(mnemonic: str) -> str:
    """The operation without its encoding: `v_dual_add_f32` and `v_add_f32_dpp` are `v_add_f32`."""
    name = SUFFIX.sub("", SUFFIX.sub("", mnemonic.replace("v_dual_", "v_")))
    return ALIASES.get(name, name)


def numbers(instruction: Instruction, modifier: str, count: int, default: int) -> list[int]:
    """A modifier such as `op_sel:[1,0,0]`, or `count` times its default."""
    text = instruction.modifiers.get(modifier)
    found = [int(value) for value in text[1:-1].split(",")] if text else [default] * count
    return found + [default] * (count - len(found))


class Decoder:
    """Builds what executes a vector instruction. `accumulators` is where AGPRs begin in the register file."""

    def __init__(self, generation: int, accumulators: int) -> None:
        self.generation = generation
        self.accumulators = accumulators

    def operand(self, text: str) -> Operand:
        return operand(text, self.accumulators)

    def build(self, instruction: Instruction) -> Step | None:
        """None when this is no instruction of this module."""
        name = base_name(instruction.mnemonic)
        if name in TABLE:
            result, sources, compute = TABLE[name]
            return self._plain(instruction, name, result, sources.split(), compute)
        if name in ("v_fmac_f32", "v_fmac_f16"):
            kind = name[-3:]
            return self._plain(instruction, name, kind, [kind] * 3, _fma, accumulates=True)
        if name in ("v_fmamk_f32", "v_madmk_f32"):
            return self._plain(instruction, name, "f32", ["f32"] * 3, _fma)
        if match := re.fullmatch(r"v_cmp(x?)_class_f(16|32)", name):
            return self._comparison(instruction, bool(match[1]), _is_of_class, "f" + match[2], "u32")
        if match := re.fullmatch(r"v_cmp(x?)_(\w+)_([uif])(16|32|64)", name):
            if match[2] not in COMPARISONS:
                raise Unmodelled(f"comparison {match[2]!r}")
            kind = match[3] + match[4]
            return self._comparison(instruction, bool(match[1]), COMPARISONS[match[2]], kind, kind)
        special = {
            "v_cndmask_b32": self._choice,
            "v_cndmask_b16": self._choice,
            "v_mbcnt_lo_u32_b32": self._mbcnt,
            "v_mbcnt_hi_u32_b32": self._mbcnt,
            "v_readfirstlane_b32": self._readfirstlane,
            "v_readlane_b32": self._readlane,
            "v_mad_co_u64_u32": self._mad_carry,
            "v_mad_u64_u32": self._mad_carry,
            "v_bitop3_b32": self._bitop3,
            "v_mov_b64": self._mov64,
            "v_nop": lambda _: lambda state: None,
        }
        if name in special:
            return special[name](instruction)
        if re.fullmatch(r"v_(add|addc|sub|subb|subrev|subbrev)(_co)?(_ci)?_u32", name):
            return self._carry(instruction, name)
        return None

    def _plain(
        self,
        instruction: Instruction,
        name: str,
        result: str,
        kinds: list[str],
        compute: Callable[..., Any],
        *,
        accumulates: bool = False,
    ) -> Step:
        texts = list(instruction.operands)
        if accumulates:
            texts.append(texts[0])
        if len(texts) != len(kinds) + 1:
            raise Unmodelled(f"{len(texts)} operands")
        destination, *sources = (self.operand(text) for text in texts)
        halves = numbers(instruction, "op_sel", len(kinds) + 1, 0)
        readers = self._readers(instruction, sources, kinds, halves)
        write = self._writer(
            instruction, destination, result, bool(halves[-1]) and "op_sel" in instruction.modifiers, name
        )
        finish = _output_modifiers(instruction, result)
        shadow = _shadow(name)

        def step(state: Wavefronts) -> None:
            values, poisons = zip(*(read(state) for read in readers), strict=True)
            poison: Any = None
            if any(p is not None for p in poisons):
                poison = shadow(values, poisons)
                if name in CARRIES_UPWARD:
                    poison = (spread(*(source.words(state)[1] for source in sources)), poison)
            write(state, finish(compute(*values)), poison)

        return step

    def _readers(
        self, instruction: Instruction, sources: list[Operand], kinds: list[str], halves: list[int]
    ) -> list[Reader]:
        readers = [
            typed(source, kind, high=bool(half), part=instruction.modifiers.get(f"src{index}_sel", "DWORD"))
            for index, (source, kind, half) in enumerate(zip(sources, kinds, halves, strict=False))
        ]
        if instruction.mnemonic.endswith(("_dpp", "_dpp8")):
            readers[0] = _permuted(readers[0], instruction)
        return readers

    def _writer(
        self, instruction: Instruction, destination: Operand, kind: str, high: bool, name: str
    ) -> Callable[[Wavefronts, Values, Bits | None], None]:
        register = destination.register
        if destination.kind != "vector":
            raise Unmodelled(f"a vector result in {destination.text}")
        lanes = _written_lanes(instruction)
        selection = instruction.modifiers.get("dst_sel", "DWORD")
        if selection != "DWORD":
            high, part = selection == "WORD_1", True
            if not selection.startswith("WORD"):
                raise Unmodelled(f"dst_sel:{selection}")
            preserve = instruction.modifiers["dst_unused"] == "UNUSED_PRESERVE"
        else:
            part = kind.endswith("16")
            high = high or destination.half == "h"
            preserve = high or bool(destination.half) or self.generation >= 10 or name == "v_fma_f16"
        if kind.endswith("64"):

            def write_wide(state: Wavefronts, value: Values, poison: Any) -> None:
                low, high = poison if isinstance(poison, tuple) else (poison, poison)
                bits = value.view(np.uint64)
                state.write(register, bits.astype(np.uint32), low, lanes(state))
                state.write(register + 1, (bits >> np.uint64(32)).astype(np.uint32), high, lanes(state))

            return write_wide
        if not part:
            return lambda state, value, poison: state.write(register, value.view(np.uint32), poison, lanes(state))
        shift = np.uint32(16 if high else 0)
        other = np.uint32(0xFFFF if high else 0xFFFF0000)

        def write_half(state: Wavefronts, value: Values, poison: Bits | None) -> None:
            word = (
                value.view(np.uint16) if value.dtype.itemsize == 2 else value.view(np.uint32) & np.uint32(0xFFFF)
            ).astype(np.uint32) << shift
            poisoned = None if poison is None else (poison & np.uint32(0xFFFF)) << shift
            if preserve:
                held, held_poison = state.read(register)
                word = word | held & other
                poisoned = either(poisoned, None if held_poison is None else held_poison & other)
            state.write(register, word, poisoned, lanes(state))

        return write_half

    def _comparison(
        self,
        instruction: Instruction,
        to_exec: bool,
        compare: Callable[[Values, Values], Mask],
        first_kind: str,
        second_kind: str,
    ) -> Step:
        texts = instruction.operands
        named = len(texts) == 3
        destination = self.operand(texts[0]).register if named else 126
        sources = [self.operand(text) for text in texts[1 if named else 0 :]]
        halves = numbers(instruction, "op_sel", 3, 0)
        first, second = self._readers(instruction, sources, [first_kind, second_kind], halves)

        def step(state: Wavefronts) -> None:
            (a, a_poison), (b, b_poison) = first(state), second(state)
            on = state.lanes_on
            poison = spread(a_poison, b_poison)
            unknown = False if poison is None else ((poison != 0) & on).any(1)
            answer = np.broadcast_to(compare(a, b), on.shape) & on
            state.write_mask(126 if to_exec else destination, answer, unknown)
            if to_exec and named and destination != 126 and self.generation < 10:
                state.write_mask(destination, answer, unknown)

        return step

    def _choice(self, instruction: Instruction) -> Step:
        texts = instruction.operands
        kind = "u16" if instruction.mnemonic.startswith("v_cndmask_b16") else "u32"
        destination = self.operand(texts[0])
        halves = numbers(instruction, "op_sel", 4, 0)
        kinds = [kind, kind]
        if any(operand(text).negative or operand(text).absolute for text in texts[1:3]):
            kinds = ["f32", "f32"]
        first, second = self._readers(instruction, [self.operand(text) for text in texts[1:3]], kinds, halves)
        mask = self.operand(texts[3]) if len(texts) > 3 else self.operand("vcc")
        write = self._writer(instruction, destination, kind, False, "")

        def step(state: Wavefronts) -> None:
            (a, a_poison), (b, b_poison) = first(state), second(state)
            if mask.kind == "constant":
                chosen = np.array([[mask.value >> lane & 1 for lane in range(state.lanes)]], np.bool_)
                unknown = np.zeros(state.count, np.bool_)
            else:
                chosen, unknown = state.unpacked(mask.register), state.mask_poison(mask.register)
            poison = None
            if a_poison is not None or b_poison is not None:
                zero = np.zeros((1, 1), np.uint32)
                poison = np.where(
                    chosen, zero if b_poison is None else b_poison, zero if a_poison is None else a_poison
                )
            if unknown.any():
                poison = either(poison, np.where(unknown, ALL, np.uint32(0))[:, None])
            value = np.where(chosen, b, a)
            write(state, value.view(np.uint16 if kind == "u16" else np.uint32), poison)

        return step

    def _carry(self, instruction: Instruction, name: str) -> Step:
        """Addition and subtraction with a carry out, and in where there is a fifth operand."""
        destination, out = self.operand(instruction.operands[0]), self.operand(instruction.operands[1])
        first, second = self._readers(
            instruction, [self.operand(t) for t in instruction.operands[2:4]], ["u32"] * 2, [0, 0]
        )
        carry = self.operand(instruction.operands[4]) if len(instruction.operands) > 4 else None
        write = self._writer(instruction, destination, "u32", False, name)
        one = np.uint64(1)

        def step(state: Wavefronts) -> None:
            (a, a_poison), (b, b_poison) = first(state), second(state)
            poison = spread(a_poison, b_poison)
            wide_a, wide_b = a.astype(np.uint64), b.astype(np.uint64)
            extra: Any = np.uint64(0)
            if carry is not None:
                extra = state.unpacked(carry.register).astype(np.uint64)
                unknown = state.mask_poison(carry.register)
                if unknown.any():
                    poison = either(poison, np.where(unknown, ALL, np.uint32(0))[:, None])
            if "rev" in name:
                total = wide_b - wide_a - extra
            elif "sub" in name:
                total = wide_a - wide_b - extra
            else:
                total = wide_a + wide_b + extra
            total = np.broadcast_to(total, (state.count, state.lanes))
            if out.kind == "scalar":
                on = state.lanes_on
                unknown_out = False if poison is None else ((poison != 0) & on).any(1)
                state.write_mask(out.register, (total >> np.uint64(32) & one).astype(np.bool_) & on, unknown_out)
            write(state, total.astype(np.uint32), poison)

        return step

    def _mad_carry(self, instruction: Instruction) -> Step:
        """`v_mad_u64_u32 v[0:1], carry, a, b, v[2:3]`; the carry is not modelled, so its register becomes unknown."""
        destination, out, *sources = (self.operand(text) for text in instruction.operands)
        readers = self._readers(instruction, sources, ["u32", "u32", "u64"], [0, 0, 0])
        write = self._writer(instruction, destination, "u64", False, "")

        def step(state: Wavefronts) -> None:
            (a, a_poison), (b, b_poison), (c, c_poison) = (read(state) for read in readers)
            total = a.astype(np.uint64) * b.astype(np.uint64) + c
            if out.kind == "scalar":
                state.write_mask(out.register, np.zeros((state.count, state.lanes), np.bool_), True)
            low = spread(a_poison, b_poison, sources[2].words(state)[1])
            write(state, total, (low, spread(a_poison, b_poison, c_poison)))  # type: ignore[arg-type]

        return step

    def _bitop3(self, instruction: Instruction) -> Step:
        table = int(instruction.modifiers.get("bitop3", "0"), 0)
        return self._plain(instruction, "v_bitop3_b32", "u32", ["u32"] * 3, lambda a, b, c: _bitop3(a, b, c, table))

    def _mov64(self, instruction: Instruction) -> Step:
        destination, source = (self.operand(text) for text in instruction.operands)

        def step(state: Wavefronts) -> None:
            words = [source.words(state, index, wide=source.kind == "constant") for index in (0, 1)]
            for index, (value, poison) in enumerate(words):
                state.write(destination.register + index, value, poison)

        return step

    def _mbcnt(self, instruction: Instruction) -> Step:
        """How many bits of a mask belong to lower lanes; the low and the high 32 lanes are two instructions."""
        upper = "_hi_" in instruction.mnemonic
        first, second = self._readers(
            instruction, [self.operand(t) for t in instruction.operands[1:]], ["u32"] * 2, [0, 0]
        )
        write = self._writer(instruction, self.operand(instruction.operands[0]), "u32", False, "")

        def step(state: Wavefronts) -> None:
            (mask, mask_poison), (base, base_poison) = first(state), second(state)
            below = np.clip(state.lane - (32 if upper else 0), 0, 32).astype(np.uint64)
            kept = mask & ((np.uint64(1) << below) - np.uint64(1)).astype(np.uint32)
            write(state, base + np.bitwise_count(kept).astype(np.uint32), spread(mask_poison, base_poison))

        return step

    def _readfirstlane(self, instruction: Instruction) -> Step:
        destination, source = (self.operand(text) for text in instruction.operands)

        def step(state: Wavefronts) -> None:
            value, poison = source.words(state)
            lane = np.argmax(state.lanes_on, axis=1)
            _take_lane(state, destination, value, poison, lane)

        return step

    def _readlane(self, instruction: Instruction) -> Step:
        destination, source, index = (self.operand(text) for text in instruction.operands)

        def step(state: Wavefronts) -> None:
            value, poison = source.words(state)
            lane, _ = index.words(state)
            _take_lane(state, destination, value, poison, (lane[:, 0] % state.lanes).astype(np.int64))

        return step


def _take_lane(state: Wavefronts, destination: Operand, value: Values, poison: Bits | None, lane: Any) -> None:
    lane = np.broadcast_to(lane, (state.count,))
    wave = np.arange(state.count)
    shape = (state.count, state.lanes)
    unknown = False if poison is None else np.broadcast_to(poison, shape)[wave, lane] != 0
    state.write_scalar(destination.register, np.broadcast_to(value, shape)[wave, lane], unknown)


def _shadow(name: str) -> Callable[[tuple[Values, ...], tuple[Bits | None, ...]], Bits | None]:
    """How poison passes through the operation `name`: bit by bit where that is simple, else by whole lanes."""

    def pack(values: tuple[Values, ...], poisons: tuple[Bits | None, ...]) -> Bits | None:
        low, high = poisons
        return either(low, None if high is None else high << np.uint32(16))

    def conjunction(values: tuple[Values, ...], poisons: tuple[Bits | None, ...]) -> Bits | None:
        (a, b), (pa, pb) = values[:2], [np.uint32(0) if p is None else p for p in poisons[:2]]
        result = (pa | pb) & (a.view(np.uint32) | pa) & (b.view(np.uint32) | pb)
        return either(result, poisons[2] if len(poisons) > 2 else None)

    def shifted(values: tuple[Values, ...], poisons: tuple[Bits | None, ...]) -> Bits | None:
        if poisons[0] is not None or poisons[1] is None:
            return spread(*poisons)
        amount = values[0].view(np.uint32) & np.uint32(31)
        return poisons[1] << amount if "lshl" in name else poisons[1] >> amount

    def shifted_or(values: tuple[Values, ...], poisons: tuple[Bits | None, ...]) -> Bits | None:
        if poisons[1] is not None:
            return spread(*poisons)
        moved = None if poisons[0] is None else poisons[0] << (values[1] & np.uint32(31))
        return either(moved, poisons[2])

    def permuted(values: tuple[Values, ...], poisons: tuple[Bits | None, ...]) -> Bits | None:
        if poisons[2] is not None:
            return spread(*poisons)
        zero = np.zeros((1, 1), np.uint32)
        high, low = (zero if p is None else p for p in poisons[:2])
        # A constant byte (selector 12 and above) has no source: its poison is taken from nowhere.
        chosen = _perm(high, low, values[2])
        constant = np.zeros(values[2].shape, np.uint32)
        for byte in range(4):
            is_constant = (values[2] >> np.uint32(8 * byte) & np.uint32(255)) >= 12
            constant |= np.where(is_constant, np.uint32(255 << (8 * byte)), np.uint32(0))
        return chosen & ~constant

    if name == "v_pack_b32_f16":
        return pack
    if name in ("v_and_b32", "v_and_or_b32"):
        return conjunction
    if name in ("v_lshlrev_b32", "v_lshrrev_b32"):
        return shifted
    if name == "v_lshl_or_b32":
        return shifted_or
    if name == "v_perm_b32":
        return permuted
    if name in KEEPS_BITS_APART or name in ("v_or_b32", "v_or3_b32"):
        return lambda values, poisons: either(*poisons)
    return lambda values, poisons: spread(*poisons)


def _output_modifiers(instruction: Instruction, kind: str) -> Callable[[Values], Values]:
    scale = {"mul:2": 2.0, "mul:4": 4.0, "div:2": 0.5}
    factors = [scale[f"{name}:{value}"] for name, value in instruction.modifiers.items() if f"{name}:{value}" in scale]
    clamps = "clamp" in instruction.modifiers
    if not factors and not clamps:
        return lambda value: value
    if kind[0] != "f":
        raise Unmodelled("clamp of an integer result")
    dtype = DTYPES[kind]

    def finish(value: Values) -> Values:
        for factor in factors:
            value = value * dtype(factor)
        return np.clip(value, dtype(0), dtype(1)) if clamps else value

    return finish


def _permuted(read: Reader, instruction: Instruction) -> Reader:
    """`read` with its lanes exchanged. A lane whose source is off or outside its row reads 0 (`bound_ctrl:1`)."""
    source, inside = permutation(instruction)
    zero_fill = instruction.modifiers.get("bound_ctrl") == "1"

    def permuted(state: Wavefronts) -> tuple[Values, Bits | None]:
        values, poison = read(state)
        shape = (state.count, state.lanes)
        values = np.broadcast_to(values, shape)[:, source[: state.lanes]]
        valid = inside[: state.lanes] & state.lanes_on[:, source[: state.lanes]]
        if poison is not None:
            poison = np.broadcast_to(poison, shape)[:, source[: state.lanes]]
        if not valid.all() and zero_fill:
            values = np.where(valid, values, values.dtype.type(0))
            poison = None if poison is None else np.where(valid, poison, np.uint32(0))
        return values, poison

    return permuted


def _written_lanes(instruction: Instruction) -> Callable[[Wavefronts], Mask | None]:
    """Which lanes a DPP instruction may write: those of its rows and banks, and with a source unless it reads 0."""
    if not instruction.mnemonic.endswith(("_dpp", "_dpp8")):
        return lambda state: None
    source, inside = permutation(instruction)
    rows, banks = (int(instruction.modifiers.get(name, "0xf"), 0) for name in ("row_mask", "bank_mask"))
    lanes = np.arange(64)
    allowed = (rows >> (lanes // 16) & 1).astype(np.bool_) & (banks >> (lanes % 16 // 4) & 1).astype(np.bool_)
    zero_fill = instruction.modifiers.get("bound_ctrl") == "1"

    def written(state: Wavefronts) -> Mask:
        count = state.lanes
        answer = np.broadcast_to(allowed[:count], (state.count, count))
        return answer if zero_fill else answer & inside[:count] & state.lanes_on[:, source[:count]]

    return written
