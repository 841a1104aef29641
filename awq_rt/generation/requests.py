"""Requests that transformers has prepared before.

`generate` takes transformers 2 ms of the host before the first token: it makes configurations, merges and checks them,
and asks for signatures. The GPU reads a prompt of 32 tokens in about that time. So what came of a request is kept under
everything that it came of, and the same request again, whatever its prompt, goes to the engine at once.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, StoppingCriteriaList
from transformers.generation import stopping_criteria as stopping

from .sampler import Sampler

MOST_KEPT = 64

PASSED_ON = {"inputs", "input_ids", "attention_mask", "streamer"}
"""Arguments that differ from one request to the next and are not part of what is kept."""

SIMPLE = (bool, int, float, str, type(None), torch.dtype)


class _NotPlain(Exception):
    """An object whose content cannot be compared."""


@dataclass(frozen=True, slots=True)
class Request:
    """`ids` [B, T] and the mask and streamer that came with them; `key` is all the rest."""

    ids: Tensor
    mask: Tensor | None
    streamer: Any
    key: Hashable


@dataclass(frozen=True, slots=True)
class Prepared:
    """What transformers made of a request: `new_tokens` at most, and the criteria beside that length."""

    sampler: Sampler
    new_tokens: int
    limit: int | None  # of positions, past which transformers' criterion on the length warns
    criteria: tuple[Any, ...]
    pad: Tensor | None  # on the CPU

    @staticmethod
    def of(sampler: Sampler, config: Any, criteria: Any, count: int) -> Prepared | None:
        """From a prompt of `count` tokens; None where anything else depends on that number, on the ids or the time."""
        lengths = [criterion for criterion in criteria if type(criterion) is stopping.MaxLengthCriteria]
        others = tuple(criterion for criterion in criteria if type(criterion) is not stopping.MaxLengthCriteria)
        absolute = config.max_new_tokens is None or (config.min_length and config.min_new_tokens is None)
        if absolute or [length.max_length for length in lengths] != [count + config.max_new_tokens]:
            return None
        if any(type(criterion) is not stopping.EosTokenCriteria for criterion in others) or sampler.holds_tensors:
            return None
        # Of the host, where the engine asks them; and a request that is kept holds no memory of the device.
        others = tuple(stopping.EosTokenCriteria(criterion.eos_token_id.cpu()) for criterion in others)
        pad = config._pad_token_tensor
        limit = lengths[0].max_position_embeddings
        return Prepared(sampler, config.max_new_tokens, limit, others, None if pad is None else pad.cpu())

    def criteria_for(self, count: int) -> StoppingCriteriaList:
        """Those of a prompt of `count` tokens."""
        length = stopping.MaxLengthCriteria(count + self.new_tokens, self.limit)
        return StoppingCriteriaList([length, *self.criteria])


class Requests:
    """What is kept, by key; of too many the oldest goes."""

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Prepared] = {}

    def get(self, key: Hashable) -> Prepared | None:
        return self._prepared.get(key)

    def keep(self, key: Hashable, prepared: Prepared) -> None:
        if len(self._prepared) >= MOST_KEPT:
            self._prepared.pop(next(iter(self._prepared)), None)
        self._prepared[key] = prepared


def request(model: Any, inputs: Any, config: Any, keywords: dict[str, Any]) -> Request | None:
    """The request that `model.generate(inputs, config, **keywords)` is.

    None where the prompt is not plain ids, or the rest is more than numbers and words.
    """
    ids = keywords.get("input_ids") if inputs is None else inputs
    mask = keywords.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or (inputs is not None and "input_ids" in keywords):
        return None
    if mask is not None and not isinstance(mask, Tensor):
        return None
    options = {name: value for name, value in keywords.items() if name not in PASSED_ON}
    if not options.keys() <= _settings():
        return None
    try:
        key = (
            ids.device,
            ids.dtype,
            mask is None,
            _plain(config),
            _plain(options),
            _plain(model.generation_config),
            _plain(model.config),
        )
    except _NotPlain:
        return None
    return Request(ids, mask, keywords.get("streamer"), key)


@functools.cache
def _settings() -> frozenset[str]:
    """The arguments of `generate` that set something, and are no objects to be called."""
    return frozenset(vars(GenerationConfig()))


def _plain(value: Any) -> Hashable:
    """What equals that of another object when their contents are equal. Raises `_NotPlain`."""
    kind = type(value)
    if kind in SIMPLE:
        return (kind, value)
    if kind is list or kind is tuple:
        return (kind, *map(_plain, value))
    if kind is dict:
        return tuple((name, _plain(part)) for name, part in value.items())
    if kind is GenerationConfig:
        return _plain(vars(value))
    if isinstance(value, PreTrainedConfig):  # how it was quantised, an object, is no setting of generation
        parts = ((name, part) for name, part in vars(value).items() if _is_setting(part))
        return tuple((name, _plain(part)) for name, part in parts)
    raise _NotPlain


def _is_setting(part: Any) -> bool:
    return type(part) in (*SIMPLE, list, tuple, dict) or isinstance(part, PreTrainedConfig)
