"""The packed weight, both ways, in torch operators: exact on any device, and testable without a GPU.

Tiles of 16 columns by 128 rows, in the order in which a wave's lanes take them; the drawing is at the head of
kernels/tile.h. Sizes are rounded up to whole tiles; what is added weighs nothing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

STRIP = 16
TILE_DEPTH = 128
WORD_DEPTH = 8
"""Rows in one word of codes: a group that changed within it could not be served."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def kernel_group_size(in_features: int, group_size: int) -> int:
    """The group size that the kernels are compiled for; one group a column is rounded up with the column."""
    return round_up(in_features, TILE_DEPTH) if group_size == in_features else group_size


def fits(in_features: int, group_size: int) -> bool:
    """Whether the kernels can serve a weight: whole words in every group, and rows of x that are aligned."""
    return in_features % WORD_DEPTH == 0 and kernel_group_size(in_features, group_size) % WORD_DEPTH == 0


def pack_codes(codes: Tensor, zeros: Tensor) -> Tensor:
    """Codes uint8 [K, N] -> uint8 [strips, tiles, 4 quarters, 16 columns, 16 bytes].

    What is added below weighs zero: with one group a column it is the zero point, else its group has scale 0.
    """
    in_features, out_features = codes.shape
    missing = -in_features % TILE_DEPTH
    below = zeros if zeros.shape[0] == 1 else torch.zeros_like(zeros[:1])
    codes = torch.cat((codes, below.expand(missing, -1)))
    codes = functional.pad(codes, (0, -out_features % STRIP))
    # k = 128 tile + 32 word + 8 quarter + 2 pair + odd; bits 4 pair + 16 odd are byte 2 odd + pair / 2, nibble pair % 2
    parts = codes.view(-1, 4, 4, 2, 2, 2, codes.shape[1] // STRIP, STRIP)  # tile word quarter high_pair low_pair odd
    low, high = parts.permute(4, 6, 0, 2, 7, 1, 5, 3)  # [strip, tile, quarter, column, word, odd, high_pair] each
    # In the order of the dimensions: an operator alone would keep the strides of its operands.
    packed: Tensor = (low | high << 4).contiguous()
    return packed.view(packed.shape[0], packed.shape[1], 4, STRIP, 16)


def unpack_codes(packed: Tensor, in_features: int, out_features: int) -> Tensor:
    """The exact inverse of `pack_codes`."""
    strips, tiles = packed.shape[:2]
    bytes_ = packed.view(strips, tiles, 4, STRIP, 4, 2, 2)  # strip tile quarter column word odd high_pair
    halves = torch.stack((bytes_ & 15, bytes_ >> 4))  # low_pair first
    codes = halves.permute(2, 5, 3, 7, 0, 6, 1, 4).reshape(tiles * TILE_DEPTH, strips * STRIP)
    return codes[:in_features, :out_features].contiguous()


def pack_groups(scales: Tensor, zeros: Tensor, groups: int) -> Tensor:
    """Scales and zero points [K/G, N] -> uint8 [strips, groups, 16, 4 or 8], padded with zeros.

    The bytes are kernels/number.h's GroupConstants: a scale of 16 bits, z, 16 z; or a scale of 32 bits, 0, 0, z, 16 z.
    """
    scale_bytes = scales.contiguous().view(torch.uint8).view(*scales.shape, -1)
    gap = zeros.new_zeros(*zeros.shape, 0 if scale_bytes.shape[-1] == 2 else 2)
    values = torch.cat((scale_bytes, gap, zeros[..., None], zeros[..., None] << 4), dim=-1)
    values = functional.pad(values, (0, 0, 0, -zeros.shape[1] % STRIP, 0, groups - zeros.shape[0]))
    return values.view(groups, -1, STRIP, values.shape[-1]).transpose(0, 1).contiguous()


def unpack_groups(packed: Tensor, scale_dtype: torch.dtype, groups: int, out_features: int) -> tuple[Tensor, Tensor]:
    """The exact inverse of `pack_groups`; `groups` is K/G."""
    values = packed.transpose(0, 1).flatten(1, 2)[:groups, :out_features]
    scales = values[..., : scale_dtype.itemsize].contiguous().view(scale_dtype).view(groups, out_features)
    return scales, values[..., -2].contiguous()


def group_count(in_features: int, group_size: int) -> int:
    """Groups of the padded column."""
    return math.ceil(round_up(in_features, TILE_DEPTH) / kernel_group_size(in_features, group_size))
