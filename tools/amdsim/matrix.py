"""The matrix instructions: D = A B + C for one block, float16 or bfloat16 in, float32 out.

Where each element lies, `l` being the lane and `e` the element among a lane's own (halves of registers, in order):

    MFMA 16x16xK   A[i][k], B[k][i]   i = l % 16   k = E (l / 16) + e, E elements a lane (4 or 8)
                   D[i][j]            j = l % 16   i = 4 (l / 16) + register
    MFMA 32x32xK   A[i][k], B[k][i]   i = l % 32   k = E (l / 32) + e
                   D[i][j]            j = l % 32   i = 8 (register / 4) + 4 (l / 32) + register % 4
    WMMA, gfx11    A[i][k], B[k][i]   i = l % 16   k = e, of 16; lanes 16 to 31 hold the same again
                   D[i][j]            j = l % 16   i = 2 register + l / 16
    WMMA, gfx12    A[i][k], B[k][i]   i = l % 16   k = 8 (l / 16) + e
                   D[i][j]            j = l % 16   i = 8 (l / 16) + register

Sources: AMD's instruction set manuals (CDNA3, RDNA3, RDNA4) and AMD's matrix instruction calculator; checked against
code objects of the Triton compiler. The sum is formed in float64 and rounded once; the hardware's order is not
documented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .disassembly import Instruction
from .errors import BadOperand, Unmodelled
from .operands import Operand, Values, spread
from .packed import bfloat16
from .state import Bits, Wavefronts
from .targets import Target
from .vector import Decoder, Step, base_name

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """Where elements lie: `row` [lanes], `depth` [lanes, elements] of A and B; `result_row` [registers, lanes] of D."""

    size: int  # rows of A, columns of B
    row: Places
    depth: Places
    result_row: Places
    repeated: bool = False

    @property
    def elements(self) -> int:
        return int(self.depth.shape[1])

    @property
    def registers(self) -> int:
        return int(self.result_row.shape[0])


def mfma(size: int, depth: int) -> Shape:
    """The layout of v_mfma_f32_{size}x{size}x{depth}."""
    lane = np.arange(64)
    elements = depth * size // 64
    block = lane // size
    register = np.arange(size * size // 64)[:, None]
    row = 4 * block + register if size == 16 else 8 * (register // 4) + 4 * block + register % 4
    return Shape(size, lane % size, elements * block[:, None] + np.arange(elements), row)


def wmma() -> Shape:
    """The layout of gfx11, whose operands lie in both halves of a wave."""
    lane = np.arange(32)
    depth = np.broadcast_to(np.arange(16), (32, 16))
    return Shape(16, lane % 16, depth, 2 * np.arange(8)[:, None] + lane // 16, repeated=True)


def wmma12() -> Shape:
    """The layout of gfx12."""
    lane = np.arange(32)
    return Shape(16, lane % 16, 8 * (lane // 16)[:, None] + np.arange(8), 8 * (lane // 16) + np.arange(8)[:, None])


def build(decoder: Decoder, instruction: Instruction, target: Target) -> Step | None:
    """What executes a matrix instruction; None when this is none."""
    name = base_name(instruction.mnemonic)
    if not name.startswith(("v_mfma_", "v_wmma_", "v_smfmac_", "v_swmmac_")):
        return None
    if instruction.modifiers:
        raise Unmodelled(f"modifiers {dict(instruction.modifiers)} of a matrix instruction")
    if match := re.fullmatch(r"v_mfma_f32_(16x16x16|16x16x32|32x32x8|32x32x16)_?(f16|bf16)(_1k)?", name):
        size, _, depth = map(int, match[1].split("x"))
        shape, kind = mfma(size, depth), match[2]
    elif match := re.fullmatch(r"v_wmma_f32_16x16x16_(f16|bf16)", name):
        shape, kind = (wmma12() if target.matrix == "wmma12" else wmma()), match[1]
    else:
        raise Unmodelled(f"matrix instruction {name}")
    destination, *sources = (decoder.operand(text) for text in instruction.operands)
    needs_all_lanes = name.startswith("v_wmma")

    def step(state: Wavefronts) -> None:
        if needs_all_lanes and state.active is not None:
            raise BadOperand("a WMMA instruction with lanes switched off")
        a, a_unknown = _gathered(state, sources[0], shape, kind, target)
        b, b_unknown = _gathered(state, sources[1], shape, kind, target)
        product = a @ b.transpose(0, 2, 1)  # [count, row, column]
        on = state.active
        state.active = None  # MFMA takes no notice of which lanes are on
        results = []
        for register in range(shape.registers):
            value = product[:, shape.result_row[register], shape.row]
            addend, addend_poison = _addend(state, sources[2], register)
            total = (value + addend).astype(np.float32)
            poison = spread(addend_poison, a_unknown, b_unknown)
            results.append((total.view(np.uint32), poison))
        for register, (words, poison) in enumerate(results):
            state.write(destination.register + register, words, poison)
        state.active = on

    return step


def _gathered(
    state: Wavefronts, source: Operand, shape: Shape, kind: str, target: Target
) -> tuple[npt.NDArray[np.float64], Bits | None]:
    """An operand as matrices float64 [count, size, depth], and whether a wave's operand has poison in it [count, 1]."""
    if not source.is_vector:
        raise Unmodelled(f"matrix operand {source.text}")
    halves, poisons = [], []
    for register in range(shape.elements // 2):
        words, poison = source.words(state, register)
        halves += [words & np.uint32(0xFFFF), words >> np.uint32(16)]
        poisons.append(poison)
    bits = np.stack(halves, -1).astype(np.uint16)  # [count, lanes, elements]
    if shape.repeated and not np.array_equal(bits[:, :16], bits[:, 16:]):
        raise BadOperand("lanes 16 to 31 of a WMMA operand differ from lanes 0 to 15; gfx11 needs them twice")
    values = bits.view(np.float16) if kind == "f16" else bfloat16(bits)
    values = values.astype(np.float64)
    if target.flushes_matrix_inputs:
        smallest = 2.0**-14 if kind == "f16" else 2.0**-126
        values = np.where(np.abs(values) < smallest, 0.0, values)
    depth = int(shape.depth.max()) + 1
    matrix = np.zeros((state.count, shape.size, depth))
    matrix[:, shape.row[:, None], shape.depth] = values
    poison = spread(*poisons)
    return matrix, None if poison is None else poison.max(axis=1, keepdims=True)


def _addend(state: Wavefronts, source: Operand, register: int) -> tuple[Values, Bits | None]:
    if source.kind == "constant" and source.value == 0:
        return np.zeros((1, 1)), None
    if not source.is_vector:
        raise Unmodelled(f"matrix addend {source.text}")
    words, poison = source.words(state, register)
    return words.view(np.float32).astype(np.float64), poison
