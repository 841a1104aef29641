"""The search for the scales by which input channels are multiplied before rounding, AWQ's central idea.

Inputs x become x / s and weights W become W s, so nothing changes but what rounding does. A channel with large
activations gets a finer grid at the cost of its group's other channels. The loss of a candidate is exact for linears
that share an input: with H = E[x x^T], E|(Q(W s)/s - W) x|^2 = tr(D H D^T), no forward pass needed.

Candidates are two grids of exponents: AutoAWQ's, which weighs activations against weights, and the original one. A
bound ranks them all: rounding errors spread evenly over a grid step, so if they were independent the loss would be
the sum over rows and groups of step^2/12 * sum over k of H_kk / s_k^2, which needs no rounding and no product with H.
The leaders and the identity are then judged by the exact loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Scheme, extent, grid, grouped

GRID = 20
"""Exponents 0, 1/20, ... of AutoAWQ's and llm-awq's search."""

FINALISTS = 3
"""Of the ranked grid, how many are judged exactly."""

SEARCHED_ROWS, RANKED_ROWS = 256, 64
"""Rows of a linear, evenly spaced, on which candidates are compared exactly and ranked by the bound: a scale helps or
harms all rows alike."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """A linear to be rounded: `weight` float32 [N, K], `moments` [K, K] = E[x x^T] of its input, `share` of the
    loss."""

    weight: Tensor
    moments: Tensor
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Scales:
    """What the search found: `values` [R], one a producer's channel; `choice` in words; the exact losses."""

    values: Tensor
    choice: str
    loss_before: float
    loss: float


@dataclass(frozen=True, slots=True)
class Search:
    """Which grids are searched beside the identity."""

    autoawq: bool = True
    original: bool = True


def search_scales(
    consumers: list[Consumer],
    mean_abs: Tensor,
    channels: Tensor | None,
    scheme: Scheme,
    search: Search,
) -> Scales:
    """The scales with the least exact loss over the rows that are looked at, the identity among the candidates.

    `mean_abs` [K] is E|x|; `channels` int64 [K] names the producer's channel that each input channel is made from, None
    where they are the same. Input channels of one producer channel share a scale.
    """
    tied = _Tying(channels, len(mean_abs))
    few = [_sampled(consumer, RANKED_ROWS) for consumer in consumers]
    consumers = [_sampled(consumer, SEARCHED_ROWS) for consumer in consumers]
    identity = torch.ones(tied.rows, device=mean_abs.device)
    before = exact_loss(consumers, tied.expand(identity), scheme)
    best = Scales(identity, "identity", before, before)
    ranked = sorted(
        _grid(consumers, mean_abs, tied, scheme, search),
        key=lambda candidate: _bound(few, tied.expand(candidate[1]), scheme),
    )
    for name, values in ranked[:FINALISTS]:
        loss = exact_loss(consumers, tied.expand(values), scheme)
        if loss < best.loss:
            best = Scales(values, name, before, loss)
    return best


def exact_loss(consumers: Iterable[Consumer], scales: Tensor, scheme: Scheme) -> float:
    """The sum of tr(D H D^T) times shares, D being the error of nearest rounding of `weight * scales`, scaled back."""
    total = 0.0
    for consumer in consumers:
        groups = grouped(consumer.weight * scales, scheme.group_size)
        error = grid(*extent(groups), scheme).rounded(groups).flatten(1).div_(scales).sub_(consumer.weight)
        total += consumer.share * quadratic(error, consumer.moments)
    return total


def quadratic(error: Tensor, moments: Tensor) -> float:
    """tr(D H D^T) for D [N, K] and H [K, K]."""
    return float((error @ moments).mul_(error).sum())


class _Tying:
    """Between scales of a producer's channels [R] and of the consumers' input channels [K]."""

    def __init__(self, channels: Tensor | None, size: int):
        self.channels = channels
        self.rows = size if channels is None else int(channels.max()) + 1

    def expand(self, values: Tensor) -> Tensor:
        return values if self.channels is None else values[self.channels]

    def mean(self, inputs: Tensor) -> Tensor:
        """The geometric mean over the input channels of each producer's channel."""
        if self.channels is None:
            return inputs
        logs = inputs.new_zeros(self.rows).index_add_(0, self.channels, inputs.log())
        return (logs / torch.bincount(self.channels, minlength=self.rows).clamp_min(1)).exp()


def _grid(
    consumers: list[Consumer], mean_abs: Tensor, tied: _Tying, scheme: Scheme, search: Search
) -> Iterator[tuple[str, Tensor]]:
    """Both published grids: E|x|^r, and E|x|^r / E|w|^(1-r) with weights relative to their group's largest."""
    if search.original:
        for step in range(1, GRID + 1):
            yield f"x^{step / GRID:g}", _centred(tied.mean(mean_abs.pow(step / GRID).clamp_min(1e-4)))
    if search.autoawq:
        relative = _relative_weights(consumers, scheme)
        for step in range(GRID):
            ratio = step / GRID
            scales = mean_abs.pow(ratio) / (relative.pow(1 - ratio) + 1e-4)
            yield f"x^{ratio:g}/w^{1 - ratio:g}", _centred(tied.mean(scales.clamp_min(1e-4)))


def _relative_weights(consumers: list[Consumer], scheme: Scheme) -> Tensor:
    """[K]: the mean over all rows of |w| over the largest |w| of its group."""
    total, rows = consumers[0].weight.new_zeros(consumers[0].weight.shape[1]), 0
    for consumer in consumers:
        groups = grouped(consumer.weight, scheme.group_size).abs()
        total += (groups / (groups.amax(-1, keepdim=True) + 1e-6)).sum(0).flatten()
        rows += len(groups)
    return total / rows


def _centred(scales: Tensor) -> Tensor:
    """Scales with their largest and smallest value reciprocal; where they are not finite, 1."""
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite() & (scales > 0), scales, 1.0)


def _sampled(consumer: Consumer, rows: int) -> Consumer:
    """Some `rows` of the linear, each of which stands for several."""
    step = max(1, len(consumer.weight) // rows)
    return Consumer(consumer.weight[::step], consumer.moments, consumer.share * step)


def _bound(consumers: list[Consumer], scales: Tensor, scheme: Scheme) -> float:
    """12 * 15^2 times the expected loss of `scales` [K] if rounding errors were independent."""
    total = scales.new_zeros(())
    for consumer in consumers:
        low, high = extent(grouped(consumer.weight * scales, scheme.group_size))
        width = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
        noise = (consumer.moments.diagonal() / scales.square()).view(-1, scheme.group_size).sum(-1)
        total += consumer.share * (width.squeeze(-1).square_().sum(0) * noise).sum()
    return float(total)
