"""AutoAWQ's marlin packing: symmetric, so without zero points; read only, as AutoAWQ deprecated it.

    qweight  int32 [K/16, 2 N]    16 x 16 tiles in the order in which a tensor core's threads hold them
    scales   float16 [K/G, N]     columns permuted likewise

W = (q - 8) * s. Source: AutoAWQ 0.2.9, modules/linear/marlin.py, after Marlin (Frantar and others, 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InvalidTensor
from ..weights import SYMMETRIC_ZERO, AwqWeight
from . import nibbles
from .layout import LinearShape, TensorInfo, expect, expect_floating, group_size_of, is_matrix

NAME = "marlin"
SUFFIXES = ("qweight", "scales", "bias")

TILE = 16
COLUMNS = 64
"""Four tiles side by side share the words of one thread."""


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    if stored.keys() & {"qzeros", "scaled_zeros", "g_idx"} or not is_matrix(stored, "qweight", torch.int32):
        return False
    return is_matrix(stored, "scales") and stored["qweight"].shape[1] == 2 * stored["scales"].shape[1]


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    tiles, doubled = stored["qweight"].shape
    in_features, out_features = TILE * tiles, doubled // 2
    groups = stored["scales"].shape[0]
    expect_floating(stored["scales"])
    expect(stored["scales"], groups, out_features)
    if out_features % COLUMNS:
        raise InvalidTensor(f"{stored['qweight']}: out_features {out_features} is not a multiple of {COLUMNS}")
    return LinearShape(in_features, out_features, group_size_of(stored["scales"], in_features, groups))


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    scales = _grouped_scales(stored["scales"]) if shape.groups > 1 else _single_scales(stored["scales"])
    zeros = torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device)
    return AwqWeight(_codes(stored["qweight"]), zeros, scales, stored.get("bias"))


def _codes(words: Tensor) -> Tensor:
    """int32 [K/16, 2 N] -> uint8 [K, N].

    Thread (h, l) of 8 x 4 holds, of each of four tiles j, columns h and h + 8 and rows 2l, 2l + 1, 2l + 8, 2l + 9. Its
    word j has nibbles [row parity][column half][row half].
    """
    tiles, doubled = words.shape
    parts = nibbles.split(words).view(tiles, doubled // 2 // COLUMNS, 8, 4, 4, 2, 2, 2)
    # [K/16, N/64, h, l, j, row parity, column half, row half] -> rows: half, l, parity; columns: j, half, h
    return parts.permute(0, 7, 3, 5, 1, 4, 6, 2).reshape(TILE * tiles, doubled // 2)


def _grouped_scales(scales: Tensor) -> Tensor:
    """Every 64 columns are an 8 x 8 block stored transposed."""
    return scales.view(len(scales), -1, 8, 8).transpose(2, 3).reshape(scales.shape)


def _single_scales(scales: Tensor) -> Tensor:
    """One group a column: every 32 columns [a, l, parity] are stored as [l, a, parity]."""
    return scales.view(len(scales), -1, 4, 4, 2).transpose(-2, -3).reshape(scales.shape)
