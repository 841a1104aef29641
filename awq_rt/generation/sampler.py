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
    def remembers(self) -> bool:
        """Whether a processor needs to know which tokens a row has had."""
        return any(isinstance(step, RepetitionPenalty) for step in self.steps)

    def __call__(self, logits: Tensor, had: Tensor | None) -> Tensor:
        """`had` bool [B, V]: the tokens that each row has had, where `remembers`."""
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
    """transformers' processor with the set of tokens kept up instead of read from all ids at every step."""

    def __init__(self, penalty: float):
        self.penalty = penalty

    def __call__(self, had: Tensor, logits: Tensor) -> Tensor:
        return torch.where(had, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)


def _step(processor: Any) -> Any:
    if type(processor) in CAPTURABLE:
        return processor
    penalises = type(processor) is logits_process.RepetitionPenaltyLogitsProcessor
    if penalises and not getattr(processor, "prompt_ignore_length", None):
        return RepetitionPenalty(processor.penalty)
    raise Unsupported(f"logits go through {type(processor).__name__}")


def _key(step: Any) -> Hashable:
    return (type(step).__name__, *sorted((name, _plain(value)) for name, value in vars(step).items()))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
