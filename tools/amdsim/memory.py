"""Device memory and LDS, in which every access is checked.

Each byte of device memory knows whether it belongs to a buffer, may be written and has been. Each byte of LDS knows
which wave wrote and which read it since the last barrier. "Poison" is a mask of bits that nothing has set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutOfBounds, Race, ReadOnly, Uninitialised

Array = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]
Addresses = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

BASE = 0x7F02_FFFF_0000
"""64 KiB below a multiple of 4 GiB: a kernel that adds offsets to the low word only leaves its buffer."""
GAP = 4096
"""Bytes between buffers that belong to none."""
MAPPED, WRITABLE, WRITTEN = 1, 2, 4


class DeviceMemory:
    """Buffers with gaps between them, at addresses that a kernel can compute with."""

    def __init__(self, size: int) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.flags = np.zeros(size, np.uint8)
        self.top = GAP
        self.bytes_loaded = 0
        self.bytes_stored = 0

    def allocate(self, content: Array, *, writable: bool, written: int | None = None) -> int:
        """The address of a copy of `content`. Bytes from `written` on count as never written."""
        start, end = self.top, self.top + content.nbytes
        self.top = -(-(end + GAP) // 256) * 256
        self.bytes[start:end] = content
        self.flags[start:end] = MAPPED | (WRITABLE if writable else 0)
        self.flags[start : end if written is None else start + written] |= WRITTEN
        return BASE + start

    def content(self, address: int, size: int) -> Array:
        return self.bytes[address - BASE : address - BASE + size]

    def unwritten(self, address: int, size: int) -> int:
        """How many of `size` bytes have never been written."""
        flags = self.flags[address - BASE : address - BASE + size]
        return int(np.count_nonzero(flags & WRITTEN == 0))

    def load(self, addresses: Addresses, size: int) -> tuple[Words, Words | None]:
        """Words [lanes, ceil(size / 4)] and their poison; None where all was written. Raises `OutOfBounds`."""
        places = self._places(addresses, size)
        flags = self.flags[places]
        if not (flags & MAPPED).all():
            raise OutOfBounds(f"{size} bytes at {_first(addresses, (flags & MAPPED).all(1))} belong to no buffer")
        self.bytes_loaded += places.size
        words = _words(self.bytes[places])
        if (flags & WRITTEN).all():
            return words, None
        return words, _words(np.where(flags & WRITTEN, 0, 255).astype(np.uint8))

    def store(self, addresses: Addresses, content: Array) -> None:
        """Write `content` [lanes, bytes]. Raises `OutOfBounds` or `ReadOnly`."""
        places = self._places(addresses, content.shape[1])
        flags = self.flags[places]
        if not (flags & MAPPED).all():
            where = _first(addresses, (flags & MAPPED).all(1))
            raise OutOfBounds(f"a store of {content.shape[1]} bytes at {where} belongs to no buffer")
        if not (flags & WRITABLE).all():
            raise ReadOnly(f"a store to {_first(addresses, (flags & WRITABLE).all(1))}, which the kernel may only read")
        self.bytes_stored += places.size
        self.bytes[places] = content
        self.flags[places] = flags | WRITTEN

    def _places(self, addresses: Addresses, size: int) -> Indices:
        offsets = (addresses - np.uint64(BASE)).view(np.int64)
        inside = (offsets >= 0) & (offsets <= self.bytes.size - size)
        if not inside.all():
            raise OutOfBounds(f"{size} bytes at {_first(addresses, inside)} belong to no buffer")
        places: Indices = offsets[:, None] + np.arange(size)
        return places


class Lds:
    """The local memory of every workgroup: [workgroups, bytes]."""

    def __init__(self, workgroups: int, size: int) -> None:
        self.size = size
        self.bytes = np.zeros((workgroups, size), np.uint8)
        self.poison = np.full((workgroups, size), 255, np.uint8)
        self.writer = np.zeros((workgroups, size), np.int16)  # 1 + wave; 0 for none since the barrier
        self.reader = np.zeros((workgroups, size), np.int16)  # the same; -1 for several

    def barrier(self, workgroups: Indices) -> None:
        """All waves of `workgroups` have arrived: what was written is visible."""
        self.writer[workgroups] = 0
        self.reader[workgroups] = 0

    def load(self, groups: Indices, waves: Indices, offsets: Indices, size: int) -> tuple[Words, Words | None]:
        """Words [lanes, ceil(size / 4)] and their poison. `groups` and `waves` say who each lane is."""
        at = self._places(groups, offsets, size)
        own = waves[:, None].astype(np.int16) + np.int16(1)
        writer = self.writer[at]
        if (wrong := (writer != 0) & (writer != own)).any():
            place = _racing(offsets, wrong)
            raise Race(f"a load of LDS at {place} that another wave wrote since the last barrier")
        seen = self.reader[at]
        self.reader[at] = np.where(seen == 0, own, np.where(seen == own, seen, -1))
        kept = self.reader[at]  # where two waves read the same byte in this instruction, one of them was lost
        self.reader[at] = np.where(kept == own, kept, -1)
        poison = self.poison[at]
        return _words(self.bytes[at]), _words(poison) if poison.any() else None

    def store(self, groups: Indices, waves: Indices, offsets: Indices, content: Array, poison: Array | None) -> None:
        """Write `content` [lanes, bytes]."""
        at = self._places(groups, offsets, content.shape[1])
        own = waves[:, None].astype(np.int16) + np.int16(1)
        for other, did in ((self.writer[at], "wrote"), (self.reader[at], "read")):
            if (wrong := (other != 0) & (other != own)).any():
                place = _racing(offsets, wrong)
                raise Race(f"a store to LDS at {place} that another wave {did} since the last barrier")
        self.writer[at] = own
        if (wrong := self.writer[at] != own).any():
            raise Race(f"stores of two waves to LDS at {_racing(offsets, wrong)}")
        self.bytes[at] = content
        self.poison[at] = 0 if poison is None else poison

    def _places(self, groups: Indices, offsets: Indices, size: int) -> tuple[Indices, Indices]:
        inside = (offsets >= 0) & (offsets <= self.size - size)
        if not inside.all():
            place = int(offsets[np.argmin(inside)])
            raise OutOfBounds(f"{size} bytes of LDS at {place:#x}; the kernel has {self.size}")
        return groups[:, None], offsets[:, None] + np.arange(size)


def _words(content: Array) -> Words:
    """Bytes [lanes, n] as words, the last one filled up with zeros."""
    missing = -content.shape[1] % 4
    if missing:
        content = np.concatenate([content, np.zeros((content.shape[0], missing), np.uint8)], 1)
    return np.ascontiguousarray(content).view(np.uint32)


def _first(addresses: Addresses, right: Any) -> str:
    """The address of the first lane that is not right."""
    return hex(int(addresses[int(np.argmin(right))]))


def _racing(offsets: Indices, wrong: Mask) -> str:
    return hex(int(offsets[int(np.argmax(wrong.any(1)))]))


def defined(poison: Words | None, lanes: Mask | None, what: str) -> None:
    """Raise `Uninitialised` when a lane that counts is poisoned. `lanes` None: all count."""
    if poison is not None and (poison.any() if lanes is None else (poison * lanes).any()):
        raise Uninitialised(f"{what} was never written")
