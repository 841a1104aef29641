"""The packed weight, both ways, in torch operators: exact on any device, and testable without a GPU.

Tiles of 16 columns by 64 rows, in the order in which a warp's lanes feed them to the matrix unit; the drawing is at the
head of kernels/tile.cuh. Sizes are rounded up to whole tiles; what is added has scale 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

STRIP = 16
TILE_DEPTH = 64
SMALLEST_GROUP = 16
"""One step of the matrix unit. A scale that changed within it could not be applied to its sums."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def kernel_group_size(in_features: int, group_size: int) -> int:
    """The group size that the kernels are compiled for: it divides a tile or is a multiple of one.

    A group size that is neither is cut into equal groups with the same scales: 96 into three of 32. One group a column
    is rounded up with the column. Less than `SMALLEST_GROUP` means that the kernels cannot serve this weight.
    """
    if group_size == in_features:
        return round_up(in_features, TILE_DEPTH)
    return group_size if group_size % TILE_DEPTH == 0 else math.gcd(group_size, TILE_DEPTH)


def pack_codes(codes: Tensor) -> Tensor:
    """Codes uint8 [K, N] -> uint8 [strips, tiles, 32 lanes, 16 bytes]."""
    in_features, out_features = codes.shape
    codes = functional.pad(codes, (0, -out_features % STRIP, 0, -in_features % TILE_DEPTH))
    # k = 64 tile + 16 step + 8 pair + 2 quad + odd; n = 16 strip + 8 half + row
    parts = codes.view(-1, 4, 2, 4, 2, codes.shape[1] // STRIP, 2, 8)
    low, high = parts.permute(6, 5, 0, 7, 3, 1, 4, 2)  # [strip, tile, row, quad, step, odd, pair] for each half
    return _bytes(low, high).view(low.shape[0], low.shape[1], 32, 16)


def unpack_codes(packed: Tensor, in_features: int, out_features: int) -> Tensor:
    """The exact inverse of `pack_codes`."""
    strips, tiles = packed.shape[:2]
    bytes_ = packed.view(strips, tiles, 8, 4, 4, 2, 2)  # strip, tile, row, quad, step, odd, pair
    halves = torch.stack((bytes_ & 15, bytes_ >> 4))
    codes = halves.permute(2, 5, 7, 4, 6, 1, 0, 3).reshape(tiles * TILE_DEPTH, strips * STRIP)
    return codes[:in_features, :out_features].contiguous()


def pack_scales(scales: Tensor, repeats: int, groups: int) -> Tensor:
    """Scales [K/G, N] -> [strips, groups, 8, 2]: columns row and row + 8 side by side, a group `repeats` times."""
    return _by_strip(scales, repeats, groups).transpose(2, 3).contiguous()


def unpack_scales(packed: Tensor, repeats: int, groups: int, out_features: int) -> Tensor:
    """The exact inverse of `pack_scales`; `groups` is K/G."""
    return _from_strips(packed.transpose(2, 3), repeats, groups, out_features)


def pack_zeros(zeros: Tensor, repeats: int, groups: int) -> Tensor:
    """Zero points uint8 [K/G, N] -> uint8 [strips, groups, 8]: column row in the low nibble, row + 8 in the high."""
    return _bytes(*_by_strip(zeros, repeats, groups).unbind(2))


def unpack_zeros(packed: Tensor, repeats: int, groups: int, out_features: int) -> Tensor:
    """The exact inverse of `pack_zeros`; `groups` is K/G."""
    return _from_strips(torch.stack((packed & 15, packed >> 4), dim=2), repeats, groups, out_features)


def _bytes(low: Tensor, high: Tensor) -> Tensor:
    """Two nibbles a byte, in the order of the dimensions: an operator alone would keep the strides of its operands."""
    return (low | high << 4).contiguous()


def _by_strip(values: Tensor, repeats: int, groups: int) -> Tensor:
    """[K/G, N] -> [strips, groups, 2, 8], padded with zeros."""
    values = values.repeat_interleave(repeats, 0) if repeats > 1 else values
    values = functional.pad(values, (0, -values.shape[1] % STRIP, 0, groups - values.shape[0]))
    return values.view(groups, -1, 2, 8).transpose(0, 1)


def _from_strips(values: Tensor, repeats: int, groups: int, out_features: int) -> Tensor:
    """[strips, groups', 2, 8] -> [K/G, N]."""
    flat = values.transpose(0, 1).reshape(values.shape[1], -1)
    return flat[: groups * repeats : repeats, :out_features].contiguous()
