"""What a 4-bit linear computes. Every other kernel is an optimisation of this."""

from __future__ import annotations

import torch
from torch import Tensor

from awq_rt.weights import AwqWeight


def linear(x: Tensor, weight: AwqWeight) -> Tensor:
    """`x` [..., K] -> [..., N] in x's dtype: dequantise, multiply, add the bias, all in float32; round once."""
    y = x.float() @ weight.dequantize(torch.float32)
    if weight.bias is not None:
        y = y + weight.bias.float()
    return y.to(x.dtype)
