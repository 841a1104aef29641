"""The registers of every wave of a launch, side by side: vector registers are [waves, lanes], scalar ones [waves].

An instruction executes for the waves in `selected` at once. Beside each register lies its poison: the bits that nothing
has set, so that a value may be copied and its defined half used, as compilers do, but never decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import Uninitialised
from .memory import DeviceMemory, Lds
from .targets import Target

Bits = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

SCALARS = {"vcc_lo": 106, "vcc_hi": 107, "m0": 124, "exec_lo": 126, "exec_hi": 127, "flat_scratch_lo": 102}
WIDE_SCALARS = {"vcc": 106, "exec": 126, "flat_scratch": 102}
TTMP = 108
EXEC = 126
ALL = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class Place:
    """Which workgroup a wave belongs to, and which wave of it it is."""

    group: Indices
    wave: Indices


class Wavefronts:
    """What `waves` waves of one launch hold, and which of them the current instruction is for."""

    def __init__(self, target: Target, place: Place, vgprs: int, memory: DeviceMemory, lds: Lds) -> None:
        waves = len(place.group)
        lanes = target.wave_size
        self.target = target
        self.place = place
        self.memory = memory
        self.lds = lds
        self.lanes = lanes
        self.code_base = 0  # where the code object lies in memory
        self.lane = np.arange(lanes)
        self.vector = np.zeros((vgprs, waves, lanes), np.uint32)
        self.vector_poison: list[Bits | None] = [np.full((waves, lanes), ALL) for _ in range(vgprs)]
        self.scalar = np.zeros((128, waves), np.uint32)
        self.scalar_poison = np.ones((128, waves), np.bool_)
        self.scc = np.zeros(waves, np.bool_)
        self.scc_poison = np.ones(waves, np.bool_)
        self.selected: Indices | slice = slice(None)
        self.count = waves
        self.waves = waves
        self.active: Mask | None = None  # lanes [count, lanes] of the selected waves; None when all are on
        self._exec = np.ones((waves, lanes), np.bool_)
        self._exec_full = np.ones(waves, np.bool_)

    def select(self, chosen: Mask) -> None:
        """The next instructions are for the waves `chosen`."""
        self.count = int(np.count_nonzero(chosen))
        self.selected = slice(None) if self.count == self.waves else np.nonzero(chosen)[0]
        self._refresh()

    def _refresh(self) -> None:
        full = self._exec_full[self.selected].all()
        self.active = None if full else self._exec[self.selected]

    @property
    def lanes_on(self) -> Mask:
        """Lanes that are on, [count, lanes], always as an array."""
        return np.ones((self.count, self.lanes), np.bool_) if self.active is None else self.active

    def read(self, register: int) -> tuple[Bits, Bits | None]:
        poison = self.vector_poison[register]
        return self.vector[register][self.selected], None if poison is None else poison[self.selected]

    def write(self, register: int, value: Any, poison: Bits | None = None, lanes: Mask | None = None) -> None:
        """Set `register` in the lanes that are on, or in `lanes` among them."""
        on = self.active if lanes is None else (lanes if self.active is None else self.active & lanes)
        held = self.vector_poison[register]
        everyone = isinstance(self.selected, slice)
        if on is None:
            if everyone:
                self.vector[register] = value
            else:
                self.vector[register][self.selected] = value
        else:
            self.vector[register][self.selected] = np.where(on, value, self.vector[register][self.selected])
        if held is None and poison is None:
            return
        if on is None and everyone:
            self.vector_poison[register] = (
                None if poison is None else np.broadcast_to(poison, (self.waves, self.lanes)).copy()
            )
            return
        if held is None:
            held = self.vector_poison[register] = np.zeros((self.waves, self.lanes), np.uint32)
        new = np.uint32(0) if poison is None else poison
        held[self.selected] = new if on is None else np.where(on, new, held[self.selected])
        if not held.any():
            self.vector_poison[register] = None

    def read_scalar(self, register: int) -> tuple[Bits, Mask]:
        return self.scalar[register][self.selected], self.scalar_poison[register][self.selected]

    def write_scalar(self, register: int, value: Any, poison: Any = False) -> None:
        self.scalar[register][self.selected] = value
        self.scalar_poison[register][self.selected] = poison
        if register >= EXEC:
            self._exec_written()

    def write_scc(self, value: Any, poison: Any = False) -> None:
        self.scc[self.selected] = value
        self.scc_poison[self.selected] = poison

    def _exec_written(self) -> None:
        if self.scalar_poison[EXEC : EXEC + self.lanes // 32, self.selected].any():
            raise Uninitialised("what decides which lanes are on was never written")
        self._exec[self.selected] = self.unpacked(EXEC)
        self._exec_full[self.selected] = self._exec[self.selected].all(1)
        self._refresh()

    def unpacked(self, register: int) -> Mask:
        """The mask that begins at `register`, as [count, lanes]."""
        words = self.scalar[register : register + self.lanes // 32, self.selected]
        return unpacked(np.ascontiguousarray(words.T), self.lanes)

    def write_mask(self, register: int, mask: Mask, poison: Any = False) -> None:
        """Set the mask that begins at `register`."""
        for number, word in enumerate(packed(mask).T):
            self.scalar[register + number][self.selected] = word
            self.scalar_poison[register + number][self.selected] = poison
        if register == EXEC:
            self._exec_written()

    def mask_poison(self, register: int) -> Mask:
        result: Mask = self.scalar_poison[register : register + self.lanes // 32, self.selected].any(0)
        return result


def unpacked(words: Bits, lanes: int) -> Mask:
    """Words [count, lanes / 32] -> bits [count, lanes]."""
    return np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=lanes).astype(np.bool_)


def packed(mask: Mask) -> Bits:
    """Bits [count, lanes] -> words [count, lanes / 32]."""
    return np.ascontiguousarray(np.packbits(mask, axis=1, bitorder="little")).view(np.uint32)
