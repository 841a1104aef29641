"""One batch being decoded: its cache, the tensors that a step reads and writes, and the step captured as a graph."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Hashable

import torch
from torch import Tensor

from ..errors import OutOfMemory
from ..fusion import Decoder
from ..fusion.cache import KeyValueCache
from .sampler import Sampler

AHEAD = 2
"""Steps that a GPU is given before the host has seen the tokens of the first: it never waits for the host."""


class Session:
    """`batch` rows of up to `length` positions on one decoder.

    A step writes each row's next token to `tokens` and moves `positions` on. On a GPU it is captured once for each way
    of sampling and replayed; where capturing fails it runs as it is, with one warning.
    """

    def __init__(self, decoder: Decoder, batch: int, length: int):
        self.decoder = decoder
        self.cache = KeyValueCache(decoder.description, batch, length, decoder.dtype, decoder.device)
        decoder.reserve(length)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=decoder.device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
        self.had: Tensor | None = None
        self.sampler = Sampler([], draw=False)
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._captures = decoder.device.type == "cuda"
        self._seen = 0
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def start(self, ids: Tensor, lengths: list[int], sampler: Sampler) -> None:
        """Read the prompts of the first B rows, the last `lengths[b]` of `ids` [B, T], and sample a token for each."""
        rows = len(lengths)
        self.sampler = sampler
        self._sent.clear()
        try:
            logits = self.decoder.prefill(_left_aligned(ids, lengths), lengths, self.cache.rows(rows))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{self.decoder.device} has no memory to read prompts of {rows} x {max(lengths)} tokens beside a cache "
                f"of {self.cache.batch} x {self.cache.length} positions ({error}); give fewer rows, or set max_seq_len"
            ) from error
        if sampler.remembers:
            self._remember(ids, logits.shape[-1])
        had = None if self.had is None or not sampler.remembers else self.had[:rows]
        self.positions.zero_()  # rows past the batch stay at their first positions, where they harm nobody
        self.positions[:rows] = torch.tensor(lengths, dtype=torch.int32)
        self.tokens[:rows] = sampler(logits.float(), had)
        self._note()
        self._seen = max(lengths)
        self._send()

    def advance(self) -> None:
        """One step, in the device's own time."""
        self._seen += 1
        graph = self._graph() if self._captures else None
        if graph is not None:
            graph.replay()
        else:
            self._step(self._seen)
        self._send()

    def receive(self) -> Tensor:
        """The oldest tokens not received yet, on the host."""
        tokens, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        return tokens

    @property
    def outstanding(self) -> int:
        return len(self._sent)

    @property
    def ahead(self) -> int:
        """Steps to be outstanding before one is received."""
        return AHEAD if self.decoder.device.type == "cuda" else 0

    def _step(self, seen: int | None = None) -> None:
        logits = self.decoder.step(self.tokens, self.positions, self.cache, seen)
        self.tokens.copy_(self.sampler(logits.float(), self.had if self.sampler.remembers else None))
        self._note()
        self.positions += 1

    def _graph(self) -> torch.cuda.CUDAGraph | None:
        """The step as a graph; None when it cannot be one."""
        if self.sampler.key not in self._graphs:
            # Once as it is, to load kernels and make workspaces outside the graph: it writes what the next step will.
            self.decoder.step(self.tokens, self.positions, self.cache)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    self._step()
            except RuntimeError as error:
                self._captures = False
                warnings.warn(f"decoding runs without a graph, more slowly: capturing failed: {error}", stacklevel=2)
                return None
            self._graphs[self.sampler.key] = graph
        return self._graphs[self.sampler.key]

    def _remember(self, ids: Tensor, vocabulary: int) -> None:
        if self.had is None:
            self.had = torch.zeros(len(self.tokens), vocabulary, dtype=torch.bool, device=self.decoder.device)
        self.had.zero_()
        self.had[: len(ids)].scatter_(1, ids, True)  # padding too, as in transformers

    def _note(self) -> None:
        if self.sampler.remembers:
            assert self.had is not None
            self.had.scatter_(1, self.tokens[:, None], True)

    def _send(self) -> None:
        """Copy the tokens to the host, where `receive` will wait for them."""
        if self.decoder.device.type != "cuda":
            self._sent.append((self.tokens.clone(), None))
            return
        tokens = torch.empty(self.tokens.shape, dtype=self.tokens.dtype, pin_memory=True)
        tokens.copy_(self.tokens, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._sent.append((tokens, event))


def _left_aligned(ids: Tensor, lengths: list[int]) -> Tensor:
    """`ids` [B, T] padded on the left -> [B, longest] padded on the right."""
    longest = max(lengths)
    if min(lengths) == longest:
        return ids[:, ids.shape[1] - longest :]
    starts = ids.shape[1] - torch.tensor(lengths, device=ids.device)[:, None]
    at = starts + torch.arange(longest, device=ids.device)
    return ids.gather(1, at.clamp(max=ids.shape[1] - 1))
