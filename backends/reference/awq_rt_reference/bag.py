"""The specification's result on a CPU, straight from the packed rows, with operators that torch already carries.

`quantized::embedding_bag_4bit_rowwise_offsets` sums rows of 4-bit codes weighted by float32 factors. With one bag a
group and x as the factors it is a 4-bit matrix-vector product in float32: bag g sums `x[k] * codes[k, :]` over group g.
Scale and zero point are applied to the bags, so nothing is dequantised and each weight is read once at half a byte.

Why not torch's own CPU int4 matmul (`_weight_int4pack_mm_for_cpu`): it is vectorised for bfloat16 only, and there it
rounds `scale` and `(8 - zero) * scale` to 8 bits, which leaves the derived tolerance; figures in benchmarks/README.md.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_ROWS = 8
"""Above this many rows of x dequantising once is faster: 2 cores of an EPYC, 2026-11-22, tools/bench_reference.py."""

TILE_WEIGHTS = 1 << 20
"""Weights dequantised at a time: 4 MB of float32 stays in the last-level cache between the unpack and the product."""


def available() -> bool:
    """Whether this build of torch has both operators."""
    names = ("embedding_bag_4bit_rowwise_offsets", "embedding_bag_4bit_unpack")
    return all(hasattr(torch.ops.quantized, name) for name in names)


def linear(x: Tensor, rows: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [M, K] on the CPU -> [M, N] in x's dtype. `rows` is `packing.pack_rows` of the codes; float32 inside."""
    few = 0 < len(x) <= MAX_ROWS
    y = (_by_bags if few else _by_tiles)(x.float().contiguous(), rows, zeros, scales)
    if bias is not None:
        y += bias
    return y.to(x.dtype)


def _by_bags(x: Tensor, rows: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    count, in_features = x.shape
    groups, out_features = scales.shape
    indices, offsets = _bag_indices(count, in_features, in_features // groups)
    bags = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(
        rows, indices, offsets, False, 0, False, x.view(-1), None, False
    )
    bags = bags.view(count, groups, -1)[:, :, :out_features]
    sums = x.view(count, groups, -1).sum(-1, keepdim=True)  # [M, K/G, 1]
    y: Tensor = bags.sub_(zeros * sums).mul_(scales).sum(1)
    return y


def _by_tiles(x: Tensor, rows: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    groups, out_features = scales.shape
    group_size = x.shape[1] // groups
    step = max(1, TILE_WEIGHTS // (group_size * out_features))
    y = x.new_zeros(len(x), out_features)
    for first in range(0, groups, step):
        last = min(groups, first + step)
        k = slice(first * group_size, last * group_size)
        tile = torch.ops.quantized.embedding_bag_4bit_unpack(rows[k])[:, :out_features]
        tile = tile.reshape(last - first, group_size, out_features)
        tile.sub_(zeros[first:last, None]).mul_(scales[first:last, None])
        y.addmm_(x[:, k], tile.view(-1, out_features))
    return y


@functools.lru_cache(maxsize=256)
def _bag_indices(count: int, in_features: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Row numbers of every bag's members, and where each bag starts, for `count` rows of x.

    They are kept: on the CPU, whatever device is the default when they are made.
    """
    indices = torch.arange(in_features, dtype=torch.int32, device="cpu").repeat(count)
    return indices, torch.arange(0, count * in_features, group_size, dtype=torch.int32, device="cpu")
