"""What loading does to the host's memory and to Python's collector."""

from __future__ import annotations

import gc
import sys

import pytest

from awq_rt import memory


class Knot:
    """An object in a cycle: only the collector frees it."""

    def __init__(self, freed: list[bool]):
        self.me, self.freed = self, freed

    def __del__(self) -> None:
        self.freed.append(True)


def tie(freed: list[bool]) -> None:
    """Leave a cycle behind, and make enough objects that the collector would begin."""
    Knot(freed)
    [[] for _ in range(10 * gc.get_threshold()[0])]


def test_the_collector_stands_still_inside_and_runs_after() -> None:
    freed: list[bool] = []
    with memory.collector_paused():
        tie(freed)
        assert not freed
    assert gc.isenabled()
    gc.collect()
    assert freed


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with memory.collector_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_lets_the_collector_run_again() -> None:
    with pytest.raises(KeyError), memory.collector_paused():
        raise KeyError
    assert gc.isenabled()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident_kb() -> int:
        with open("/proc/self/status") as status:
            return int(next(line for line in status if line.startswith("VmRSS")).split()[1])

    import torch

    memory.trim()
    before = resident_kb()
    kept = []
    for _ in range(640):  # of 100 KB: from the heap, with what stays between what goes
        gone = torch.ones(100 << 10, dtype=torch.uint8)
        kept.append(torch.ones(1 << 10, dtype=torch.uint8))
        kept.append(gone)
    kept = kept[::2]
    del gone
    held = resident_kb() - before
    memory.trim()
    assert resident_kb() - before < held / 2
