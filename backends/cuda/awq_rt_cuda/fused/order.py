"""When decode attention may read the cache before the kernels ahead of it have ended.

With programmatic dependent launch a kernel's first part runs while several kernels ahead of it still do. Attention
reads cached positions there, which is right as long as the kernels that wrote them have ended: an ordinary launch,
which starts when all before it have ended, must stand between. A step of a model has one (looking up embeddings,
sampling, the start of a graph), but nothing says so of two calls in a row. So each stream remembers the caches written
since the last launch that was known to be ordinary, and a call that would read one of them is launched so itself. That
is the first attention layer of each step, once a step.
"""

from __future__ import annotations

from ..driver import current_stream

_written: dict[tuple[int, int], set[int]] = {}


def wrote(device_index: int, cache: int) -> None:
    """The cache at address `cache` is written by a kernel that is launched now."""
    _written.setdefault((device_index, current_stream(device_index)), set()).add(cache)


def may_read_early(device_index: int, cache: int) -> bool:
    """Whether a kernel that reads and writes `cache` may be launched to overlap those ahead; else it must not be."""
    caches = _written.setdefault((device_index, current_stream(device_index)), set())
    early = cache not in caches
    if not early:
        caches.clear()
    caches.add(cache)
    return early
