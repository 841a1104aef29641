"""What a model costs the host while it loads: memory that the C library holds on to, and time of Python's collector."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

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
            trim()


def trim() -> None:
    """Give free pages back to the system now."""
    _malloc_trim()(0)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of cycles stands still inside.

    torch, transformers and a model are a million objects that stay. The collector walks all of them each time that they
    are a quarter more: a third of the time of `awq-rt generate` with one token went there.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc
        return lambda _: None
    return found
