"""How fast a device reads its memory, and how fast it multiplies: what decoding and prompts are measured against."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

GPU_BYTES = 4 << 30
"""Far more than any cache holds, and long enough that starting a kernel counts for nothing."""

CPU_BYTES = 512 << 20
REPEATS = 10
ROW = 1 << 16
SIDE, PRODUCTS = 8192, 50

WAYS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda data: data.view(-1, ROW).sum(1),
    lambda data: data.amax(),
    lambda data: data.sum(),
)
"""On an H100 (torch 2.11): 3.123, 3.100 and 3.087 TB/s, where a kernel made for nothing but reading has 3.135."""


def read_bandwidth(device: torch.device, repeats: int = REPEATS) -> float:
    """Bytes/s of the fastest of a few reductions over memory that no cache holds.

    None of torch's reductions reads fastest on every device, so the best one counts, at its best: a limit set too low
    would flatter. Takes 4 GB of a GPU's memory for the time, less where less is free.
    """
    if device.type == "cpu":
        data, reads = torch.ones(CPU_BYTES // 4), 1
    else:
        free, _ = torch.cuda.mem_get_info(device)
        data = torch.ones(min(GPU_BYTES, free // 2) // 4 // ROW * ROW, device=device)
        reads = 16  # waiting for a GPU takes some 10 us, which must not count
    return max(data.nbytes / _seconds(way, data, reads, repeats) for way in WAYS)


def matmul_flops(device: torch.device) -> float | None:
    """Operations/s of torch's product of two random float16 matrices of SIDE x SIDE; None on a CPU.

    At the rate that it keeps up, not its best: what limits it is power.
    """
    if device.type == "cpu":
        return None
    a, b = (torch.randn(SIDE, SIDE, dtype=torch.float16, device=device) for _ in range(2))
    out = a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(PRODUCTS):
        torch.mm(a, b, out=out)
    end.record()
    end.synchronize()
    return 2 * SIDE**3 * PRODUCTS / float(start.elapsed_time(end) / 1e3)


def _seconds(read: Callable[[Tensor], Tensor], data: Tensor, reads: int, repeats: int) -> float:
    """The least time of one of `reads` in a row."""
    read(data)
    times = []
    for _ in range(repeats):
        synchronize(data.device)
        started = time.perf_counter()
        for _ in range(reads):
            read(data)
        synchronize(data.device)
        times.append((time.perf_counter() - started) / reads)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait for all that `device` was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)
