"""The search for the range that each group's grid covers, AWQ's clipping, and what can be had beyond it.

A smaller range means finer steps and a few clipped weights. The loss of one row's group is d^T H_g d, where d is the
error of its weights and H_g the block of H = E[x x^T] that its inputs are in: exact if other groups had no error.
Both ends are shrunk together, then each alone. At last the scale is fitted to the codes by least squares, which has a
closed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid, Scheme, extent, grid, grouped

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
"""Shares of the whole range that are tried: AutoAWQ's steps of 1/20, and coarser where hardly any group ends."""

SIDES = tuple((move, 0.0) for move in (-0.3, -0.1, 0.05)) + tuple((0.0, move) for move in (-0.3, -0.1, 0.05))
"""What is then added to the shares of the lower and of the upper end."""

FITS = 2
"""Least-squares fits of the scale, each to the codes that the one before gave."""

CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 256 << 20}
"""Temporaries of one step are this large: what a core's cache holds, or what keeps a GPU busy."""


@dataclass(frozen=True, slots=True)
class Ranges:
    """`grid` [N, K/G, 1] for the whole weight; `clipped` bool [N, K/G] says whose range was shrunk."""

    grid: Grid
    clipped: Tensor


def whole_ranges(weight: Tensor, scheme: Scheme) -> Ranges:
    """Every group's own range."""
    whole = grid(*extent(grouped(weight, scheme.group_size)), scheme)
    return Ranges(whole, torch.zeros_like(whole.scales[..., 0], dtype=torch.bool))


def search_ranges(weight: Tensor, moments: Tensor, scheme: Scheme) -> Ranges:
    """For `weight` float32 [N, K] and `moments` [K, K] = E[x x^T], the grid with the least loss of each group alone."""
    size = scheme.group_size
    blocks = torch.stack([moments[k : k + size, k : k + size] for k in range(0, len(moments), size)])
    rows = max(1, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"]) // (4 * weight.shape[1]))
    parts = [_search(grouped(part, size), blocks, scheme) for part in torch.split(weight, rows)]
    chosen = Grid(*(torch.cat([getattr(best.grid, name) for best in parts]) for name in ("scales", "zeros")))
    shrunk = torch.cat([best.shares.amin(-1) < 1 for best in parts])
    return Ranges(chosen, shrunk)


@dataclass(slots=True)
class _Best:
    """The best so far of every group [n, K/G]: its loss, its grid, and its shares of the lower and upper end [..,
    2]."""

    loss: Tensor
    grid: Grid
    shares: Tensor

    def take(self, loss: Tensor, other: Grid, shares: Tensor) -> None:
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.grid = Grid(
            torch.where(better, other.scales, self.grid.scales), torch.where(better, other.zeros, self.grid.zeros)
        )
        self.shares = torch.where(better, shares, self.shares)


def _search(groups: Tensor, blocks: Tensor, scheme: Scheme) -> _Best:
    """`groups` [n, K/G, G], `blocks` [K/G, G, G]."""
    low, high = extent(groups)
    whole = grid(low, high, scheme)
    best = _Best(_loss(groups, whole, blocks), whole, groups.new_ones(*low.shape[:2], 2))
    for shares in _shares(best, scheme):
        candidate = grid(low * shares[..., :1], high * shares[..., 1:], scheme)
        best.take(_loss(groups, candidate, blocks), candidate, shares)
    for _ in range(FITS):
        fitted = _fitted(groups, best.grid, blocks, scheme)
        best.take(_loss(groups, fitted, blocks), fitted, best.shares)
    return best


def _shares(best: _Best, scheme: Scheme) -> Iterator[Tensor]:
    """What to try: fixed shares for both ends, then each end moved from the best so far."""
    for shrink in SHRINKS[1:]:
        yield torch.full_like(best.shares, shrink)
    if not scheme.symmetric:
        for move in SIDES:
            yield (best.shares + best.shares.new_tensor(move)).clamp(SHRINKS[-1] / 2, 1)


def _loss(groups: Tensor, candidate: Grid, blocks: Tensor) -> Tensor:
    """d^T H_g d of every group [n, K/G, 1]."""
    return _form(candidate.rounded(groups).sub_(groups), blocks)


def _form(vectors: Tensor, blocks: Tensor) -> Tensor:
    """v^T H_g v for `vectors` [n, K/G, G]."""
    return _times(vectors, blocks).mul_(vectors).sum(-1, keepdim=True)


def _times(vectors: Tensor, blocks: Tensor) -> Tensor:
    """H_g v for `vectors` [n, K/G, G], one product a group."""
    return torch.bmm(vectors.transpose(0, 1), blocks).transpose(0, 1)


def _fitted(groups: Tensor, chosen: Grid, blocks: Tensor, scheme: Scheme) -> Grid:
    """The scale that brings the same codes c nearest: c^T H_g w / c^T H_g c, where that is a usable one."""
    steps = chosen.codes(groups).sub_(chosen.zeros)
    along = _times(steps, blocks)
    scales = (along * groups).sum(-1, keepdim=True) / (along * steps).sum(-1, keepdim=True)
    scales = scales.to(scheme.scale_dtype).float()
    return Grid(torch.where(scales.isfinite() & (scales > 0), scales, chosen.scales), chosen.zeros)
