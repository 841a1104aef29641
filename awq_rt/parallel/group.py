"""The processes that hold one model between them, and what they say to each other."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import NotLaunched, PeerLost
from .inbox import Inbox

GATHER = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""The same under two names: torch 2.13 deprecates the older."""

GLOO_LOST = "gloo/transport"
"""Where gloo's own errors come from; they have no class."""


class Group:
    """This process's place among `size` processes of one model: `rank`, its `device`, and collective operations.

    Every process calls the same operations in the same order. Sums and gathers run on the device's current stream and
    give all processes the same bits. Raises `PeerLost` where torch notices that another process has gone.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.inbox: Inbox | None = None
        self._host = dist.new_group(backend="gloo")  # for what lies on the host, whatever the device's backend

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self  # a copied model is still one of these processes

    def all_reduce(self, partial: Tensor) -> Tensor:
        """The sum of every process's `partial`, in its memory."""
        if partial.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                "gradients do not pass between the processes of a model loaded with tp_plan; train it on one device, "
                "or with device_map='auto'"
            )
        with self._noticing_loss():
            dist.all_reduce(partial)
        return partial

    def all_gather(self, part: Tensor) -> Tensor:
        """Every process's `part` [..., N] side by side: [..., size N]."""
        parts = part.new_empty(self.size * part.numel())
        with self._noticing_loss():
            GATHER(parts, part.flatten())
        return parts.view(self.size, *part.shape).movedim(0, -2).flatten(-2)

    def gather_numbers(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every process's `numbers`, by rank; on the host."""
        mine = torch.tensor(numbers, dtype=torch.int64)
        all_of_them = [torch.empty_like(mine) for _ in range(self.size)]
        with self._noticing_loss():
            dist.all_gather(all_of_them, mine, group=self._host)
        return [found.tolist() for found in all_of_them]

    def share_random_state(self) -> None:
        """Continue the random numbers of the first process, on the host and on the device."""
        of_device = self.device.type == "cuda"
        states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if of_device else [])]
        with self._noticing_loss():
            for state in states:
                dist.broadcast(state, 0, group=self._host)
        torch.set_rng_state(states[0])
        if of_device:
            torch.cuda.set_rng_state(states[1], self.device)

    def open_inbox(self, row_bytes: int) -> None:
        """Let the other GPUs write rows of `row_bytes` into this one's memory, where every pair of them can."""
        self.inbox = Inbox.open(self, row_bytes)

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or GLOO_LOST in str(error):
                raise PeerLost(
                    f"process {self.rank} has lost another process of the model ({error}); the message of the one that "
                    "ended first says why, and all have to be started again"
                ) from error
            raise


def join(kind: str) -> Group:
    """This process's group, on its own device of `kind` ("cuda" or "cpu"). Raises `NotLaunched`.

    A process group that the program has initialised is used as it is; else one is made from what torchrun left in the
    environment.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        if dist.is_initialized() and dist.get_backend() == "gloo":
            local %= torch.cuda.device_count()  # gloo's sums go through the host, so that processes may share a GPU
        elif local >= torch.cuda.device_count():
            raise NotLaunched(
                f"process {local} of this host has no GPU of its own: {torch.cuda.device_count()} are visible; "
                f"start torchrun with --nproc-per-node={torch.cuda.device_count()} or less"
            )
        torch.cuda.set_device(local)
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if not dist.is_initialized():
        if not dist.is_available() or "RANK" not in os.environ:
            raise NotLaunched(
                "tp_plan='auto' needs one process for each device; start the program with "
                "torchrun --nproc-per-node=2 PROGRAM"
            )
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        atexit.register(_leave)
    return Group(device)


def _leave() -> None:
    """Leave together with the others. A process that ends with an error must not wait for them: torchrun ends them."""
    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.destroy_process_group()
