"""The 4-bit grid of a group: from the range that it covers to scales, zero points, and weights rounded onto it.

What the search measures is what `AwqWeight` will hold: scales are rounded to the dtype in which they are stored before
anything is rounded with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rounding import SMALLEST_RANGE
from ..weights import SYMMETRIC_ZERO, AwqWeight


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored: `group_size` along K, zero points fitted or all 8, and the dtype of scales."""

    group_size: int
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16


@dataclass(frozen=True, slots=True)
class Grid:
    """`scales` and `zeros` float32 [..., 1]: a weight w is stored as `round(w / scales) + zeros`, clamped to 0..15."""

    scales: Tensor
    zeros: Tensor

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of `weight` [..., G], as float32."""
        return (weight / self.scales).round_().add_(self.zeros).clamp_(0, 15)

    def rounded(self, weight: Tensor) -> Tensor:
        """`weight` [..., G], each value replaced by the nearest one on the grid."""
        return self.codes(weight).sub_(self.zeros).mul_(self.scales)


def extent(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(lowest, highest) [..., 1] of `groups` [..., G], 0 included, so that a zero point of 0..15 exists."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    return low.clamp_max_(0), high.clamp_min_(0)


def grid(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid over [low, high]; over the larger of both to either side where the scheme is symmetric.

    As `round_to_nearest` has it, for any range instead of that of the weights.
    """
    if scheme.symmetric:
        scales = torch.maximum(-low, high).clamp_min(SMALLEST_RANGE) / 7
        scales = scales.to(scheme.scale_dtype).float()
        return Grid(scales, torch.full_like(scales, SYMMETRIC_ZERO))
    scales = (high - low).clamp_min(SMALLEST_RANGE) / 15
    zeros = (-low / scales).round_()
    return Grid(scales.to(scheme.scale_dtype).float(), zeros)


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """`weight` [N, K] as [N, K/G, G]."""
    return weight.view(len(weight), -1, group_size)


def to_weight(codes: Tensor, chosen: Grid, scheme: Scheme, bias: Tensor | None) -> AwqWeight:
    """The canonical weight of `codes` [N, K/G, G] on `chosen` [N, K/G, 1]."""
    return AwqWeight(
        codes.flatten(1).T.to(torch.uint8).contiguous(),
        chosen.zeros.squeeze(-1).T.to(torch.uint8).contiguous(),
        chosen.scales.squeeze(-1).T.to(scheme.scale_dtype).contiguous(),
        bias,
    )
