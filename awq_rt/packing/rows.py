"""The catch-all: any shape and group size, dequantised by torch operators for each product. Right, not fast.

It serves the shapes that no kernel of a backend can cut.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..backend import Packed
from ..weights import AwqWeight

PREFIX = "rows"


def pack(weight: AwqWeight) -> Packed:
    """Two codes a byte along N, zeros and scales as they are."""
    codes = functional.pad(weight.codes, (0, weight.out_features % 2))
    tensors = [codes[:, 0::2] | codes[:, 1::2] << 4, weight.zeros.contiguous(), weight.scales.contiguous()]
    if weight.bias is not None:
        tensors.append(weight.bias.contiguous())
    return Packed(PREFIX, tuple(tensors))


def unpack(packed: Packed) -> AwqWeight:
    """The exact inverse of `pack`."""
    pairs, zeros, scales, *bias = packed.tensors
    codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)[:, : zeros.shape[1]].contiguous()
    return AwqWeight(codes, zeros, scales, *bias)


def linear(x: Tensor, packed: Packed) -> Tensor:
    """`x` [M, K] -> [M, N]."""
    weight = unpack(packed)
    y = x @ weight.dequantize(torch.float32).to(x.dtype)
    return y if weight.bias is None else (y.float() + weight.bias.float()).to(x.dtype)
