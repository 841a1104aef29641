"""From logits to tokens on the device, by transformers' own processors, in operators that a graph can hold."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

from .. import ops

CAPTURABLE = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
)
"""Processors that look at nothing but the logits, and never wait for the device."""


class Unsupported(Exception):
    """A request that transformers' own loop has to serve; the message says why."""


@dataclass(frozen=True, slots=True)
class Past:
    """What a processor may know of the tokens before: which of them each row has had, bool [B, V + 1], where there is a
    `penalty`; and how many new ones every row has, a number or int64 []."""

    had: Tensor | None = None
    made: int | Tensor = 0


class Sampler:
    """`logits` [B, V] -> tokens int64 [B]: processors in their order, in float32, then a draw or the largest.

    `prompt_count` is the number of ids, padding included, that come before the first new token.
    """

    def __init__(self, processors: Any, draw: bool, prompt_count: int = 0):
        self.draw = draw
        steps = [_step(processor, prompt_count) for processor in processors]
        self.steps = [step for step in steps if step is not None]
        self.key: Hashable = (draw, *(_key(step) for step in self.steps))

    @property
    def penalty(self) -> RepetitionPenalty | None:
        """The processor that needs to know which tokens a row has had, if there is one."""
        return next((step for step in self.steps if isinstance(step, RepetitionPenalty)), None)

    @property
    def counts(self) -> bool:
        """Whether a processor needs to know how many new tokens there are."""
        return any(isinstance(step, NotBefore) for step in self.steps)

    @property
    def holds_tensors(self) -> bool:
        return any(isinstance(value, Tensor) for step in self.steps for value in vars(step).values())

    def __call__(self, logits: Tensor, past: Past, argmax: Callable[[Tensor], Tensor] = ops.argmax) -> Tensor:
        if self.steps or self.draw:
            logits = logits.float()
        for step in self.steps:
            logits = step(past, logits)
        if not self.draw:
            return argmax(logits)
        # What torch.multinomial does for one draw, without its check of the probabilities, which would wait.
        shares = logits.softmax(dim=-1)
        return (shares / torch.empty_like(shares).exponential_(1)).argmax(dim=-1)


class NotBefore:
    """transformers' processors of a least length: none of the tokens `ends` among the first `count` new ones."""

    def __init__(self, ends: tuple[int, ...], count: int):
        self.ends, self.count = ends, count

    def __call__(self, past: Past, logits: Tensor) -> Tensor:
        if isinstance(past.made, int):
            early = torch.full((), past.made < self.count, device=logits.device)
        else:
            early = past.made < self.count
        logits = logits.clone()
        for end in self.ends:
            if 0 <= end < logits.shape[-1]:
                logits[:, end].masked_fill_(early, -torch.inf)
        return logits


class RepetitionPenalty:
    """transformers' processor with the set of tokens kept up instead of read from all ids at every step.

    The first `ignored` ids of each row, a number or int [B], do not count.
    """

    def __init__(self, penalty: float, ignored: int | Tensor):
        self.penalty, self.ignored = penalty, ignored

    def tokens_of(self, ids: Tensor, vocabulary: int) -> Tensor:
        """The tokens bool [B, V + 1] in `ids` [B, T]; the last place takes what does not count."""
        at = torch.arange(ids.shape[1], device=ids.device)
        ignored = self.ignored.to(ids.device)[:, None] if isinstance(self.ignored, Tensor) else self.ignored
        counted = ids.clamp(max=vocabulary).masked_fill(at < ignored, vocabulary)
        return torch.zeros(len(ids), vocabulary + 1, dtype=torch.bool, device=ids.device).scatter_(1, counted, True)

    def __call__(self, past: Past, logits: Tensor) -> Tensor:
        assert past.had is not None
        had = past.had[:, : logits.shape[1]]
        return torch.where(had, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)


def _step(processor: Any, prompt_count: int) -> Any:
    """The processor itself, or what stands for it; None where it does nothing. Raises `Unsupported`."""
    if type(processor) in CAPTURABLE:
        return processor
    if type(processor) is logits_process.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        return RepetitionPenalty(processor.penalty, 0 if ignored is None else ignored)
    if type(processor) is logits_process.MinLengthLogitsProcessor:
        count = processor.min_length - prompt_count
    elif type(processor) is logits_process.MinNewTokensLengthLogitsProcessor:
        count = processor.prompt_length_to_skip + processor.min_new_tokens - prompt_count
    else:
        raise Unsupported(f"logits go through {type(processor).__name__}")
    return NotBefore(tuple(processor.eos_token_id.flatten().tolist()), count) if count > 0 else None


def _key(step: Any) -> Hashable:
    if isinstance(step, RepetitionPenalty):
        return ("RepetitionPenalty", step.penalty)
    return (type(step).__name__, *sorted((name, _plain(value)) for name, value in vars(step).items()))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
