"""The canonical 4-bit weight, the one form between every checkpoint layout and every kernel.

Its tensors hold plain values: no kernel's bias, order or padding ever appears here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .errors import InvalidWeight

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SYMMETRIC_ZERO = 8
"""The zero point of a symmetric weight: codes 0..15 stand for -8..7."""


@dataclass(frozen=True, slots=True, eq=False)
class AwqWeight:
    """A linear's weight: `W[k, n] = (codes[k, n] - zeros[k // G, n]) * scales[k // G, n]`, used as `y = x @ W + bias`.

    `codes` uint8 [K, N] in 0..15; `zeros` uint8 [K/G, N] in 0..15; `scales` [K/G, N] float16, bfloat16 or float32;
    `bias` [N] floating, or None. K is in_features, N out_features, G the group size (K for one group a column).
    Raises `InvalidWeight` when shapes or dtypes contradict each other; values are checked by `check_values`.
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        for name, tensor in (("codes", self.codes), ("zeros", self.zeros), ("scales", self.scales)):
            if tensor.dim() != 2:
                raise InvalidWeight(f"{name} has shape {list(tensor.shape)}; a matrix is expected")
        for name, tensor in (("codes", self.codes), ("zeros", self.zeros)):
            if tensor.dtype != torch.uint8:
                raise InvalidWeight(f"{name} is {tensor.dtype}; torch.uint8 is expected")
        if self.scales.dtype not in SCALE_DTYPES:
            raise InvalidWeight(f"scales is {self.scales.dtype}; one of {SCALE_DTYPES} is expected")
        in_features, out_features = self.codes.shape
        groups = self.scales.shape[0]
        if groups == 0 or in_features % groups:
            raise InvalidWeight(f"{groups} groups do not divide in_features {in_features}")
        for name, tensor in (("zeros", self.zeros), ("scales", self.scales)):
            if tuple(tensor.shape) != (groups, out_features):
                raise InvalidWeight(f"{name} has shape {list(tensor.shape)}; [{groups}, {out_features}] is expected")
        if self.bias is not None:
            if tuple(self.bias.shape) != (out_features,):
                raise InvalidWeight(f"bias has shape {list(self.bias.shape)}; [{out_features}] is expected")
            if not self.bias.is_floating_point():
                raise InvalidWeight(f"bias is {self.bias.dtype}; a floating dtype is expected")

    @property
    def in_features(self) -> int:
        return self.codes.shape[0]

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        return self.codes.shape[0] // self.scales.shape[0]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 8."""
        return bool((self.zeros == SYMMETRIC_ZERO).all())

    def check_values(self) -> None:
        """Raise `InvalidWeight` unless codes and zeros lie in 0..15 and every scale is finite."""
        for name, tensor in (("codes", self.codes), ("zeros", self.zeros)):
            if tensor.numel() and int(tensor.max()) > 15:
                raise InvalidWeight(f"{name} holds {int(tensor.max())}; values 0..15 are expected")
        if not torch.isfinite(self.scales).all():
            raise InvalidWeight("scales holds NaN or infinity; finite values are expected")

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [K, N], computed in `dtype`."""
        groups, out_features = self.scales.shape
        codes = self.codes.reshape(groups, -1, out_features).to(dtype)
        return (
            codes.sub_(self.zeros.to(dtype)[:, None])
            .mul_(self.scales.to(dtype)[:, None])
            .view(self.in_features, out_features)
        )

    def to(self, device: torch.device | str) -> AwqWeight:
        """The same weight on `device`."""
        bias = None if self.bias is None else self.bias.to(device)
        return AwqWeight(self.codes.to(device), self.zeros.to(device), self.scales.to(device), bias)

    def equal(self, other: AwqWeight) -> bool:
        """Whether both hold the same values and dtypes, bit for bit."""

        def same(a: Tensor | None, b: Tensor | None) -> bool:
            if a is None or b is None:
                return a is b
            return a.dtype == b.dtype and torch.equal(a, b)

        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    @staticmethod
    def concatenate(weights: Sequence[AwqWeight]) -> AwqWeight:
        """Weights that read the same input, side by side along N (q|k|v, gate|up).

        All must share in_features, group size and scale dtype; a missing bias counts as zeros beside a present one.
        """
        first = weights[0]
        for weight in weights[1:]:
            pairs = {
                "in_features": (first.in_features, weight.in_features),
                "group size": (first.group_size, weight.group_size),
                "scale dtype": (first.scales.dtype, weight.scales.dtype),
            }
            for what, (one, other) in pairs.items():
                if one != other:
                    raise InvalidWeight(f"cannot concatenate weights of {what} {one} and {other}")
        bias = None
        present = [weight.bias for weight in weights if weight.bias is not None]
        if present:
            bias = torch.cat(
                [
                    present[0].new_zeros(weight.out_features) if weight.bias is None else weight.bias
                    for weight in weights
                ]
            )
        return AwqWeight(
            torch.cat([weight.codes for weight in weights], dim=1),
            torch.cat([weight.zeros for weight in weights], dim=1),
            torch.cat([weight.scales for weight in weights], dim=1),
            bias,
        )
