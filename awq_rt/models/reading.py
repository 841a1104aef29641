"""Packed weights read from files ahead of who packs them: a GPU waits neither for files nor for Python."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..linear import AwqLinear
from ..weights import AwqWeight

READERS = 3
"""Threads. A 7B model took 10.5 s to load with one and memory that was not page-locked, with these 1.2 (H100, its files
in the page cache, 2026-11-23)."""

AHEAD = 4
"""Linears that are read before they are asked for: their weights are on the device, a byte a code."""

Names = tuple[str, ...]
Weight = Callable[[], AwqWeight]


def weights_of(
    checkpoint: Checkpoint, linears: Iterable[tuple[AwqLinear, Names]]
) -> Iterator[tuple[AwqLinear, Names, AwqWeight]]:
    """Each of `linears` with the checkpoint's names that make it up and the weight of these, where the linear is.

    Those on a GPU are read by threads, on the stream that is current here. Raises what `Checkpoint.read` does.
    """
    with ThreadPoolExecutor(READERS, thread_name_prefix="awq_rt-read") as pool:
        waiting: deque[tuple[AwqLinear, Names, Weight]] = deque()
        try:
            for linear, names in linears:
                waiting.append((linear, names, _asked(pool, checkpoint, names, linear.packed_0.device)))
                if len(waiting) > AHEAD:
                    first, its_names, weight = waiting.popleft()
                    yield first, its_names, weight()
            while waiting:
                first, its_names, weight = waiting.popleft()
                yield first, its_names, weight()
        finally:
            pool.shutdown(cancel_futures=True)


def _asked(pool: ThreadPoolExecutor, checkpoint: Checkpoint, names: Names, device: torch.device) -> Weight:
    """What gives the weight when it is called; on a CPU it reads then, so that two weights are never there at once."""
    if device.type == "cpu":
        return lambda: _read(checkpoint, names, device, nullcontext())
    future: Future[AwqWeight] = pool.submit(_read, checkpoint, names, device, _current_stream(device))
    return future.result


def _current_stream(device: torch.device) -> Any:
    """What makes the stream that is current here current in another thread."""
    return torch.cuda.stream(torch.cuda.current_stream(device))


def _read(checkpoint: Checkpoint, names: Names, device: torch.device, stream: Any) -> AwqWeight:
    with torch.no_grad(), stream:
        weights = [checkpoint.read(name, device) for name in names]
        return weights[0] if len(weights) == 1 else AwqWeight.concatenate(weights)
