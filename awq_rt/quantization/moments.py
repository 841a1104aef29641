"""First and second moments of the inputs of linears, over the calibration text.

Where a norm makes the inputs, tokens count alike: the norm has made them equally large. Elsewhere (before o and down)
a token counts by the inverse of its residual stream's mean square, as what such linears add to the stream is seen
through the next norm, which divides by the stream's size. It matters: a few tokens (the first of a text, often) have
inputs there a thousand times those of others, and would be all that an unweighted second moment shows. Tokens that a
mixture sends to its experts count alike too, as it is not known there which they are.

What a short text shows of correlations is partly chance. The first and the second half of the text are therefore
counted apart: of the correlations' power, what the halves do not have in common is `noise`, and the correlations are
shrunk by that share towards none. It is the linear shrinkage with the least squared error, as in Schaefer and Strimmer,
"A shrinkage approach to large-scale covariance matrix estimation", 2005, with the variance taken from halves instead
of from tokens, as neighbouring tokens are not independent.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteActivations
from .streaming import Call


@dataclass(slots=True)
class Moments:
    """Of the inputs x of one or more linears: `second` [K, K] = E[u x x^T], `mean_abs` [K] = E|x|, and how many x.

    u is a token's weight, 1 in the mean. `second` is shrunk: `noise`, 0 to 1, of its correlations have been removed.
    """

    second: Tensor
    mean_abs: Tensor
    tokens: int
    noise: float = 0.0

    def scaled(self, scales: Tensor) -> Moments:
        """Of x / scales."""
        return Moments(self.second / (scales[:, None] * scales), self.mean_abs / scales, self.tokens, self.noise)


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
    sums: dict[str, _Sums] = {}
    handles = []
    weights = token_weights(hidden)
    current = hidden.new_ones(hidden.shape[1])
    alike = torch.ones_like(current)
    for site, paths in sites.items():
        size = int(block.get_submodule(paths[0]).in_features)  # type: ignore[arg-type]
        sums[site] = _Sums([hidden.new_zeros(size, size) for _ in range(2)], hidden.new_zeros(size))
        adder = _adder(sums[site], alike if site in normed else current)
        handles += [block.get_submodule(path).register_forward_pre_hook(adder) for path in paths]
    try:
        for number, (sample, weight) in enumerate(zip(hidden, weights, strict=True)):
            current.copy_(weight)
            for entry in sums.values():
                entry.half = int(2 * number >= len(hidden)) if len(hidden) > 1 else None
            call(block, sample[None])
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for site in list(sums):
        found[site] = _moments(sums.pop(site))
        if not bool(torch.isfinite(found[site].second).all()):
            raise NonFiniteActivations(
                f"the input of {name}.{site} holds NaN, infinity or values whose squares overflow; "
                "the model is broken in this layer or before it"
            )
    return found


@dataclass(slots=True)
class _Sums:
    """Sums over tokens: of u x x^T and of 1 apart for the two halves of the text, of |x| for both.

    `half` is the one that is being read; None where every sample has both.
    """

    second: list[Tensor]
    absolute: Tensor
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    half: int | None = None

    def add(self, half: int, x: Tensor, roots: Tensor | None) -> None:
        """Count `x` [tokens, K]; `roots` [tokens] are the square roots of the tokens' weights."""
        self.absolute += x.abs().sum(0)
        self.tokens[half] += len(x)
        weighted = x if roots is None else x * roots[:, None]
        self.second[half].addmm_(weighted.T, weighted)


def _moments(sums: _Sums) -> Moments:
    """The means of `sums`, shrunk. Uses up its tensors."""
    tokens = sum(sums.tokens)
    one, other = (second.div_(max(1, count)) for second, count in zip(sums.second, sums.tokens, strict=True))
    share = sums.tokens[0] / max(1, tokens)
    diagonal = torch.lerp(other.diagonal(), one.diagonal(), share)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
    agreed = _common_power(one, other, inverse)
    second = other.lerp_(one, share)
    sums.second.clear()
    power = _common_power(second, second, inverse)
    noise = 1 - min(max(agreed / power, 0.0), 1.0) if power else 0.0
    second.mul_(1 - noise).diagonal().copy_(diagonal)
    return Moments(second, sums.absolute / max(1, tokens), tokens, noise)


def _common_power(one: Tensor, other: Tensor, inverse: Tensor) -> float:
    """The sum of products of the correlations in both [K, K], diagonals apart; `inverse` [K] are inverse variances."""
    diagonals = (one.diagonal() * other.diagonal() * inverse.square()).sum()
    return float(inverse @ ((one * other) @ inverse) - diagonals)


def token_weights(hidden: Tensor) -> Tensor:
    """[samples, length], 1 in the mean: the inverse mean squares of `hidden` [samples, length, hidden]."""
    squares = hidden.square().mean(-1)
    floor = (1e-4 * squares.median()).clamp_min(torch.finfo(torch.float32).tiny)  # a padded token may have no stream
    inverse = squares.clamp_min(floor).reciprocal()
    return inverse / inverse.mean()


def _adder(sums: _Sums, weights: Tensor) -> Any:
    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        roots = weights.sqrt() if len(x) == len(weights) else None
        if sums.half is not None:
            sums.add(sums.half, x, roots)
            return
        middle = len(x) // 2
        sums.add(0, x[:middle], None if roots is None else roots[:middle])
        sums.add(1, x[middle:], None if roots is None else roots[middle:])

    return add
