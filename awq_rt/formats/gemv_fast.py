"""AutoAWQ's gemv_fast packing.

    qweight  int16 [N/4, K]     four outputs interleaved, 64 rows of K at a time (below)
    scales   float16 [8 ZW, N]  padded with zeros
    qzeros   float16 [8 ZW, N]  -(s * z), padded with zeros: the kernel computes q * s + qzeros

The words of four outputs n and 64 inputs k are ordered [n % 4][k % 64 / 32][k % 8 / 2][k % 2], and nibble a of a word
belongs to the input with k % 32 / 8 = a. Source: AutoAWQ 0.2.9, modules/linear/gemv_fast.py, `pack_intweight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InvalidTensor, LayoutCannotHold
from ..weights import AwqWeight
from . import nibbles
from .layout import LinearShape, TensorInfo, expect, expect_floating, is_matrix
from .padding import padded_groups, shape_from_groups, unpadded, unpadded_scales, zeros_width

NAME = "gemv_fast"
SUFFIXES = ("qweight", "qzeros", "scales", "bias")
ZEROS = "qzeros"

INTERLEAVE = 4
BLOCK = 64


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    return matches_with(stored, ZEROS)


def matches_with(stored: Mapping[str, TensorInfo], zeros: str) -> bool:
    """Shared with llm_awq, whose zeros have another name."""
    words = is_matrix(stored, "qweight", torch.int16)
    return words and is_matrix(stored, "scales") and is_matrix(stored, zeros) and stored[zeros].dtype.is_floating_point


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    return shape_with(stored, ZEROS, group_size)


def shape_with(stored: Mapping[str, TensorInfo], zeros: str, group_size: int | None) -> LinearShape:
    """Shared with llm_awq."""
    quarters, in_features = stored["qweight"].shape
    out_features = INTERLEAVE * quarters
    padded = stored["scales"].shape[0]
    expect_floating(stored["scales"])
    expect(stored["scales"], padded, out_features)
    expect(stored[zeros], padded, out_features)
    if in_features % BLOCK:
        raise InvalidTensor(f"{stored['qweight']}: in_features {in_features} is not a multiple of {BLOCK}")
    return shape_from_groups(stored["scales"], in_features, out_features, padded, group_size)


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    return read_with(stored, ZEROS, shape)


def read_with(stored: Mapping[str, Tensor], zeros: str, shape: LinearShape) -> AwqWeight:
    """Shared with llm_awq."""
    scales = unpadded_scales(stored["scales"], shape.groups)
    products = unpadded(stored[zeros], shape.groups, zeros)
    plain = -products.float() / scales.float()
    rounded = plain.round()
    # s * z was rounded once: by half a unit in 2^11 or, in bfloat16, 2^8, of at most 15. More is not a zero point.
    if not bool(((plain - rounded).abs() < 0.1).all()) or not bool(((rounded >= 0) & (rounded <= 15)).all()):
        raise InvalidTensor(f"{zeros} is not -(scales * z) for zero points z of 0..15")
    return AwqWeight(_unpack(stored["qweight"]).T.contiguous(), rounded.to(torch.uint8), scales, stored.get("bias"))


def check(shape: LinearShape) -> None:
    if shape.in_features % BLOCK or shape.out_features % 8:
        raise LayoutCannotHold(
            f"gemv_fast packs {BLOCK} rows by 8 columns; the weight is {shape.in_features} x {shape.out_features}"
        )
    zeros_width(shape.in_features, shape.group_size)


def write(weight: AwqWeight) -> dict[str, Tensor]:
    check(LinearShape.of(weight))
    width = 8 * zeros_width(weight.in_features, weight.group_size)
    scales = weight.scales.to(torch.float16)
    products = -(scales.float() * weight.zeros).to(torch.float16)
    if not bool(torch.isfinite(products).all() and torch.isfinite(scales).all()):
        raise LayoutCannotHold("gemv_fast stores scales and scale * zero in float16; the weight's exceed its range")
    if bool((scales == 0).any()):  # -(s * z) would not give the zero point back
        raise LayoutCannotHold("gemv_fast stores scales in float16; the weight has scales that are 0 in it")
    return {
        "qweight": _pack(weight.codes.T.contiguous()),
        "scales": padded_groups(scales, width),
        "qzeros": padded_groups(products, width),
    }


def _unpack(words: Tensor) -> Tensor:
    """int16 [N/4, K] -> uint8 [N, K]."""
    quarters, in_features = words.shape
    parts = nibbles.split(words).view(quarters, in_features // BLOCK, INTERLEAVE, 2, 4, 2, 4)
    # [n / 4, k / 64, n % 4, k % 64 / 32, k % 8 / 2, k % 2, k % 32 / 8] -> n, then k from its highest part down
    return parts.permute(0, 2, 1, 3, 6, 4, 5).reshape(INTERLEAVE * quarters, in_features)


def _pack(codes: Tensor) -> Tensor:
    """The exact inverse of `_unpack`."""
    out_features, in_features = codes.shape
    parts = codes.view(out_features // INTERLEAVE, INTERLEAVE, in_features // BLOCK, 2, 4, 4, 2)
    words = nibbles.join(parts.permute(0, 2, 1, 3, 5, 6, 4), torch.int16)
    return words.reshape(out_features // INTERLEAVE, in_features)
