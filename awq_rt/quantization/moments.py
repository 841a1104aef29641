"""First and second moments of the inputs of linears, over the calibration text.

Where a norm makes the inputs, tokens count alike: the norm has made them equally large. Elsewhere (before o and down)
a token counts by the inverse of its residual stream's mean square, as what such linears add to the stream is seen
through the next norm, which divides by the stream's size. It matters: a few tokens (the first of a text, often) have
inputs there a thousand times those of others, and would be all that an unweighted second moment shows. Tokens that a
mixture sends to its experts count alike too, as it is not known there which they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NonFiniteActivations
from .streaming import Call


@dataclass(slots=True)
class Moments:
    """Of the inputs x of one or more linears: `second` [K, K] = E[u x x^T], `mean_abs` [K] = E|x|, and how many x.

    u is a token's weight, 1 in the mean.
    """

    second: Tensor
    mean_abs: Tensor
    tokens: int

    def scaled(self, scales: Tensor) -> Moments:
        """Of x / scales."""
        return Moments(self.second / (scales[:, None] * scales), self.mean_abs / scales, self.tokens)


@torch.no_grad()
def observe(
    block: nn.Module,
    call: Call,
    hidden: Tensor,
    sites: Mapping[str, Sequence[str]],
    name: str,
    *,
    normed: Collection[str] = (),
) -> dict[str, Moments]:
    """The moments at each of `sites` while `block` runs on `hidden` [samples, length, hidden].

    A site is a name for the linears (paths) whose inputs are counted together. One that no token reached, an
    expert's, has 0 tokens and zeros. `normed` are the sites whose inputs a norm makes. Raises `NonFiniteActivations`,
    naming the block `name`.
    """
    found: dict[str, Moments] = {}
    handles = []
    weights = token_weights(hidden)
    current = hidden.new_ones(hidden.shape[1])
    alike = torch.ones_like(current)
    for site, paths in sites.items():
        size = int(block.get_submodule(paths[0]).in_features)  # type: ignore[arg-type]
        found[site] = Moments(hidden.new_zeros(size, size), hidden.new_zeros(size), 0)
        adder = _adder(found[site], alike if site in normed else current)
        handles += [block.get_submodule(path).register_forward_pre_hook(adder) for path in paths]
    try:
        for sample, weight in zip(hidden, weights, strict=True):
            current.copy_(weight)
            call(block, sample[None])
    finally:
        for handle in handles:
            handle.remove()
    for site, moments in found.items():
        moments.second /= max(1, moments.tokens)
        moments.mean_abs /= max(1, moments.tokens)
        if not bool(torch.isfinite(moments.second).all()):
            raise NonFiniteActivations(
                f"the input of {name}.{site} holds NaN, infinity or values whose squares overflow; "
                "the model is broken in this layer or before it"
            )
    return found


def token_weights(hidden: Tensor) -> Tensor:
    """[samples, length], 1 in the mean: the inverse mean squares of `hidden` [samples, length, hidden]."""
    squares = hidden.square().mean(-1)
    floor = (1e-4 * squares.median()).clamp_min(torch.finfo(torch.float32).tiny)  # a padded token may have no stream
    inverse = squares.clamp_min(floor).reciprocal()
    return inverse / inverse.mean()


def _adder(moments: Moments, weights: Tensor) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        moments.mean_abs += x.abs().sum(0)
        moments.tokens += len(x)
        if len(x) == len(weights):
            x = x * weights.sqrt()[:, None]
        moments.second.addmm_(x.T, x)

    return add
