"""Memory of this GPU that the other processes' GPUs write to: how few rows are summed in one kernel."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .group import Group

log = logging.getLogger("awq_rt")

MOST_ROWS = 16
"""Rows that are summed so. More move enough data for a library's collective to be as fast."""


class Inbox:
    """`size` x `MOST_ROWS` rows of `row_bytes` in two halves, each word beside a word that says when it was written.

    Successive sums use the halves in turn: a process that writes for sum n + 2 has seen what the others sent for n + 1,
    which they did after they had read what was sent for n. `pointers` int64 [size] on the device are the addresses of
    every process's inbox, as this process's GPU reaches them; `counters` uint32 [MOST_ROWS] the sums so far, by row.
    """

    def __init__(self, row_bytes: int, memory: Tensor, pointers: Tensor):
        self.row_bytes = row_bytes
        self.memory = memory
        self.pointers = pointers
        self.counters = torch.zeros(MOST_ROWS, dtype=torch.int32, device=memory.device)

    @classmethod
    def open(cls, group: Group, row_bytes: int) -> Inbox | None:
        """All processes' inboxes, or None in all of them where some GPU cannot reach another's memory."""
        inbox, reason = None, ""
        try:
            inbox = cls(row_bytes, *_mapped(group, 2 * group.size * MOST_ROWS * 2 * row_bytes))
        except RuntimeError as error:  # other hosts, no link between two GPUs, a sandbox that forbids it
            reason = str(error)
        torch.cuda.synchronize(group.device)
        if all(opened for (opened,) in group.gather_numbers([inbox is not None])):  # all are zeroed before any is used
            return inbox
        log.info("sums between GPUs go through the collective library: %s", reason or "another process cannot")
        return None


def _mapped(group: Group, nbytes: int) -> tuple[Tensor, Tensor]:
    """(zeroed memory of this GPU, addresses of every process's as this GPU reaches them)."""
    import torch.distributed as dist
    from torch.distributed import _symmetric_memory as symmetric

    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not used here, so it need not be set up
    memory = symmetric.empty(nbytes, dtype=torch.uint8, device=group.device)
    handle = symmetric.rendezvous(memory, dist.group.WORLD.group_name)  # type: ignore[union-attr]
    memory.zero_()
    return memory, torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=group.device)
