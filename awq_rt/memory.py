"""Host memory that the C library holds on to after it was freed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

TRIM_BYTES = 64 << 20


class Trimmer:
    """Gives free pages back to the system each time that `TRIM_BYTES` more were worked through.

    glibc keeps freed blocks of up to 32 MB in its heap. While a model loads, temporaries of just that size come and go
    between tensors that stay, and the holes would add up to half of the model again.
    """

    def __init__(self) -> None:
        self._pending = 0

    def worked_through(self, nbytes: int) -> None:
        self._pending += nbytes
        if self._pending >= TRIM_BYTES:
            self._pending = 0
            _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda _: None
    return trim
