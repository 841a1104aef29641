"""How far a right kernel may be from the exact result, element by element.

Three independent sources of error, u being the unit roundoff of the activations' dtype:

- the result is rounded once to that dtype: `u * |reference|`;
- each dequantised weight is rounded once to it: K products with a relative error of at most u each, a random walk of
  standard deviation below `u * sqrt((x*x) @ (w*w))`;
- float32 accumulation, each addition rounding by 2**-24 of the partial sum. One accumulator makes K additions to sums
  of up to `|x| @ |w|`. A kernel may also sum codes and zero points apart, `scale * (x @ codes - zero * sum(x))`; then a
  partial sum reaches `15 * scale * sum(|x|)`, whatever the weight is, in G additions in a group and K/G between.

A number below the smallest normal one is rounded by up to half the smallest subnormal instead, which is added to both.
Six standard deviations are allowed of the last two. A zero point wrong by one moves the result by `scale * sum(x)` over
its group, and one swapped nibble by a whole code: both far outside (the counter-tests are in tests/test_tolerance.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..weights import AwqWeight

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
STANDARD_DEVIATIONS = 6.0


def reference(x: Tensor, weight: AwqWeight) -> Tensor:
    """`x` [..., K] times the canonical weight plus bias, float64 [..., N]."""
    y = x.double() @ weight.dequantize(torch.float64)
    return y if weight.bias is None else y + weight.bias.double()


def bound(x: Tensor, weight: AwqWeight, factor: float = STANDARD_DEVIATIONS) -> Tensor:
    """The largest allowed |y - reference|, float64 [..., N], for activations `x` [..., K] of the kernel's dtype.

    A kernel that rounds more often than once a weight (fp16 partial sums, say) declares a larger `factor`.
    """
    return _exact_and_limit(x, weight, factor)[1]


def excess(y: Tensor, x: Tensor, weight: AwqWeight, factor: float = STANDARD_DEVIATIONS) -> float:
    """The largest error over its bound: at most 1 for a right kernel, infinite where `y` is not finite."""
    if y.numel() == 0:
        return 0.0
    exact, limit = _exact_and_limit(x, weight, factor)
    error = (y.double() - exact).abs()
    return float(torch.nan_to_num(error / limit, nan=torch.inf, posinf=torch.inf).max())


def _exact_and_limit(x: Tensor, weight: AwqWeight, factor: float) -> tuple[Tensor, Tensor]:
    """`reference` and `bound`, which both need the weight in float64."""
    u = UNIT_ROUNDOFF[x.dtype]
    x64, w64 = x.double(), weight.dequantize(torch.float64)
    exact = x64 @ w64
    if weight.bias is not None:
        exact = exact + weight.bias.double()
    half_subnormal = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps / 2
    rounding = ((x64 * x64) @ (u * w64.abs() + half_subnormal).square()).sqrt()

    groups, group_size = weight.scales.shape[0], weight.group_size
    group_sums = x64.abs().reshape(*x.shape[:-1], groups, group_size).sum(-1)  # [..., K/G]
    partial = ((group_sums * group_sums) @ (15 * weight.scales.double()).square()).sqrt()
    apart = (group_size**0.5 + groups**0.5) * partial
    accumulation = 2.0**-24 * (weight.in_features**0.5 * (x64.abs() @ w64.abs()) + apart)
    return exact, u * exact.abs() + half_subnormal + factor * (rounding + accumulation)
