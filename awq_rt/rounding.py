"""A dense weight rounded to the nearest 4-bit one, group by group: the last step of every AWQ quantisation."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InvalidWeight
from .weights import SYMMETRIC_ZERO, AwqWeight

SMALLEST_RANGE = 1e-5
"""A group of equal weights still needs a scale; AutoAWQ uses the same floor."""


def round_to_nearest(
    weight: Tensor,
    group_size: int,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
    bias: Tensor | None = None,
) -> AwqWeight:
    """`weight` [N, K] (as nn.Linear has it) in 4 bits with groups of `group_size` along K, -1 for one group a row.

    Scales are rounded to `scale_dtype` first and codes computed with the rounded ones. Raises `InvalidWeight` when
    groups do not divide K, values are not finite, or scales are beyond `scale_dtype`.
    """
    out_features, in_features = weight.shape
    size = in_features if group_size == -1 else group_size
    if size < 1 or in_features % size:
        raise InvalidWeight(f"group size {group_size} does not divide in_features {in_features}")
    if not bool(torch.isfinite(weight).all()):
        raise InvalidWeight("the weight holds NaN or infinity")
    groups = weight.float().view(out_features, -1, size)
    if symmetric:
        scales = groups.abs().amax(-1).clamp_min(SMALLEST_RANGE) / 7
        zeros = torch.full_like(scales, SYMMETRIC_ZERO)
    else:
        # The range always contains 0, so that a zero point of 0..15 exists for groups of one sign too.
        low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        scales = (high - low).clamp_min(SMALLEST_RANGE) / 15
        zeros = (-low / scales).round()
    scales = scales.to(scale_dtype)
    if not bool(torch.isfinite(scales).all()):
        raise InvalidWeight(f"the weight's range is too large for scales of {scale_dtype}; use bfloat16 or float32")
    codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return AwqWeight(
        codes.to(torch.uint8).view(out_features, in_features).T.contiguous(),
        zeros.to(torch.uint8).T.contiguous(),
        scales.T.contiguous(),
        bias,
    )
