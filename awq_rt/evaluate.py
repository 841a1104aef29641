"""Perplexity of a causal language model on a text that lies on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Perplexity:
    """`value` is exp of the mean negative log-likelihood of the `tokens` that were predicted, in `windows` windows."""

    value: float
    tokens: int
    windows: int


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    stride: int | None = None,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """The perplexity of `model` on `text`, read in windows of `window` tokens that begin `stride` apart.

    By default windows do not overlap, and each predicts all its tokens but the first. With a smaller stride every
    window but the first predicts its last `stride` tokens only, so that each has the longest context there is. What
    does not fill a window is dropped. Raises `InvalidInput` for a text shorter than a window.
    """
    step = window if stride is None else stride
    if window < 2 or not 1 <= step <= window:
        raise InvalidInput(
            f"window {window} and stride {step}: a window of 2 or more and a stride of 1 to it are needed"
        )
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    starts = range(0, len(ids) - window + 1, step)[:max_windows]
    if not starts:
        raise InvalidInput(
            f"the text has {len(ids)} tokens; one window needs {window}: give more text or a smaller window"
        )
    total, tokens = 0.0, 0
    for number, start in enumerate(starts):
        sample = ids[start : start + window].to(model.device)
        predicted = window - 1 if start == 0 or step == window else step
        total += float(_negative_log_likelihood(model, sample, predicted))
        tokens += predicted
        if progress is not None:
            progress(number + 1, len(starts))
    mean = total / tokens
    return Perplexity(math.exp(mean) if mean < 700 else math.inf, tokens, len(starts))


def _negative_log_likelihood(model: Any, sample: Tensor, predicted: int) -> Tensor:
    """Summed over the last `predicted` tokens of `sample` [window], in float32."""
    logits = model(sample[None], use_cache=False).logits[0, -predicted - 1 : -1].float()
    return torch.nn.functional.cross_entropy(logits, sample[-predicted:], reduction="sum")
