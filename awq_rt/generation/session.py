"""One batch being decoded: its cache, and the tensors that a step reads and writes."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ..errors import OutOfMemory
from ..fusion import Decoder
from ..fusion.cache import KeyValueCache
from .graphs import Graphs
from .sampler import Past, Sampler

AHEAD = 2
"""Steps that a GPU is given before the host has seen the tokens of the first: it never waits for the host."""

SHORT_PROMPT = 512
"""Tokens up to which reading a prompt takes the host longer than the GPU, so that it is worth a graph."""

WIDTH_STEP = 16
"""Short prompts are padded to a multiple, so that few graphs serve all."""


class Session:
    """`batch` rows of up to `length` positions on one decoder.

    A step writes each row's next token to `tokens` and moves `positions` on; where it can be, it is captured once for
    each way of sampling and replayed.
    """

    def __init__(self, decoder: Decoder, batch: int, length: int):
        self.decoder = decoder
        self.cache = KeyValueCache(decoder.description, batch, length, decoder.dtype, decoder.device)
        decoder.reserve(length)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=decoder.device)
        self.positions = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
        self.made = torch.zeros((), dtype=torch.int64, device=decoder.device)  # new tokens a row, where it is asked for
        self.had: Tensor | None = None
        self.sampler = Sampler([], draw=False)
        self.graphs = Graphs(decoder.device, decoder.ops.capture)
        self._prompts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._prompt_in_graph = False
        self._seen = 0
        self._sent: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def start(self, ids: Tensor, lengths: list[int], sampler: Sampler) -> None:
        """Read the prompts of the first B rows, the last `lengths[b]` of `ids` [B, T], and sample a token for each."""
        rows = len(lengths)
        self.sampler = sampler
        self._sent.clear()
        ends = torch.tensor(lengths, device=ids.device)
        self.positions.zero_()  # rows past the batch stay at their first positions, where they harm nobody
        self.positions[:rows] = ends
        self.made.fill_(1)
        try:
            logits = self._read(_left_aligned(ids, lengths), ends - 1)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"{self.decoder.device} has no memory to read prompts of {rows} x {max(lengths)} tokens beside a cache "
                f"of {self.cache.batch} x {self.cache.length} positions ({error}); give fewer rows, or set max_seq_len"
            ) from error
        had = None
        if sampler.penalty is not None:
            had = self._remember(sampler.penalty.tokens_of(ids, logits.shape[-1]))
        self.tokens[:rows] = sampler(logits, Past(had), self.decoder.ops.argmax)
        self._note()
        self._seen = max(lengths)
        self._send()

    def advance(self) -> None:
        """One step, in the device's own time."""
        self._seen += 1
        seen = None if self.graphs.capturing else self._seen
        self.graphs.run(("step", self.sampler.key), lambda: self._step(seen))
        self._send()

    def receive(self) -> Tensor:
        """The oldest tokens not received yet, on the host."""
        tokens, event = self._sent.popleft()
        if event is not None:
            event.synchronize()
        return tokens

    def finish(self) -> None:
        """Wait for what was requested and is not wanted: the buffers may next be used from another stream."""
        while self._sent:
            self.receive()

    @property
    def outstanding(self) -> int:
        return len(self._sent)

    @property
    def ahead(self) -> int:
        """Steps to be outstanding before one is received."""
        return AHEAD if self.decoder.device.type == "cuda" else 0

    @property
    def ahead_of_first(self) -> int:
        """The same for the first tokens. With a step's graph launched behind the prompt's, the host had the first token
        of a prompt of 32 tokens 0.5 ms later (H100, driver 580, 2026-11-23; benchmarks/decode-h100.json)."""
        return 0 if self._prompt_in_graph else min(self.ahead, 1)

    def _read(self, prompts: Tensor, last: Tensor) -> Tensor:
        """Logits [B, V] after `prompts` [B, T], of which row b ends at position `last[b]`."""
        rows, count = prompts.shape
        cache = self.cache.rows(slice(rows))
        width = -(-count // WIDTH_STEP) * WIDTH_STEP
        fits = rows * width <= SHORT_PROMPT and not self.decoder.has_mixtures
        self._prompt_in_graph = self.graphs.on_device and self.graphs.capturing and fits
        if not self._prompt_in_graph:
            return self.decoder.prefill(prompts, last, cache)
        if (rows, width) not in self._prompts:
            self._prompts[rows, width] = (prompts.new_zeros(rows, width), last.clone())
        tokens, ends = self._prompts[rows, width]
        tokens[:, :count] = prompts
        ends.copy_(last)
        return self.graphs.run(("prompt", rows, width), lambda: self.decoder.prefill(tokens, ends, cache))

    def _step(self, seen: int | None) -> Tensor:
        logits = self.decoder.step(self.tokens, self.positions, self.cache, seen)
        self.tokens.copy_(self.sampler(logits, Past(self.had, self.made), self.decoder.ops.argmax))
        self._note()
        self.positions += 1
        if self.sampler.counts:
            self.made += 1
        return self.tokens

    def _remember(self, tokens: Tensor) -> Tensor:
        """Keep the tokens [B, V + 1] that rows have had where a captured step finds them; returns those of the rows."""
        if self.had is None:
            self.had = tokens.new_zeros(len(self.tokens), tokens.shape[1])
        self.had[: len(tokens)] = tokens
        return self.had[: len(tokens)]

    def _note(self) -> None:
        if self.sampler.penalty is not None:
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
