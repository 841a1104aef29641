"""From logits to tokens on the device, by transformers' own processors, in operators that a graph can hold."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process

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


class Sampler:
    """`logits` [B, V] -> tokens int64 [B]: processors in their order, in float32, then a draw or the largest."""

    def __init__(self, processors: Any, draw: bool):
        self.draw = draw
        self.steps = [_step(processor) for processor in processors]
        self.key: Hashable = (draw, *(_key(step) for step in self.steps))

    @property
    def penalty(self) -> RepetitionPenalty | None:
        """The processor that needs to know which tokens a row has had, if there is one."""
        return next((step for step in self.steps if isinstance(step, RepetitionPenalty)), None)

    def __call__(self, logits: Tensor, had: Tensor | None) -> Tensor:
        """`had` bool [B, V + 1]: the tokens that each row has had, where there is a `penalty`."""
        if self.steps or self.draw:
            logits = logits.float()
        for step in self.steps:
            logits = step(had, logits)
        if not self.draw:
            return logits.argmax(dim=-1)
        # What torch.multinomial does for one draw, without its check of the probabilities, which would wait.
        shares = logits.softmax(dim=-1)
        return (shares / torch.empty_like(shares).exponential_(1)).argmax(dim=-1)


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

    def __call__(self, had: Tensor, logits: Tensor) -> Tensor:
        had = had[:, : logits.shape[1]]
        return torch.where(had, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)


def _step(processor: Any) -> Any:
    if type(processor) in CAPTURABLE:
        return processor
    if type(processor) is logits_process.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        return RepetitionPenalty(processor.penalty, 0 if ignored is None else ignored)
    raise Unsupported(f"logits go through {type(processor).__name__}")


def _key(step: Any) -> Hashable:
    if isinstance(step, RepetitionPenalty):
        return ("RepetitionPenalty", step.penalty)
    return (type(step).__name__, *sorted((name, _plain(value)) for name, value in vars(step).items()))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
