"""Shapes and weights chosen to hurt a kernel: sizes no tile divides, extreme zero points, cancellation, subnormals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..weights import AwqWeight

HURTFUL_SHAPES: tuple[tuple[int, int, int, int], ...] = (
    # K, N, G, M
    (64, 8, 64, 1),
    (64, 8, 16, 5),
    (128, 32, 32, 3),
    (128, 72, 128, 4),
    (192, 40, 192, 17),  # one group a column
    (512, 264, 256, 2),
    (576, 192, 64, 7),  # SmolLM2's key projection: neither size a multiple of 128
    (1408, 136, 128, 6),  # a Qwen-MoE expert: 11 groups
    (4544, 64, 64, 1),  # Falcon-7B's hidden size: 71 groups
    (256, 1024, 128, 33),
)
"""Every K is a multiple of G and every N of 8: what each layout on disk can hold."""

WEIGHT_KINDS = ("random", "extreme zeros", "symmetric", "cancelling", "wide scales", "subnormal scales")


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One linear to compute. `x` [M, K] in the activations' dtype."""

    name: str
    x: Tensor
    weight: AwqWeight


def hurtful_weight(
    kind: str,
    in_features: int,
    out_features: int,
    group_size: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    bias: bool = False,
    seed: int = 0,
) -> AwqWeight:
    """A weight of one of `WEIGHT_KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size

    def integers(shape: tuple[int, int]) -> Tensor:
        return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)

    codes, zeros = integers((in_features, out_features)), integers((groups, out_features))
    scales = torch.rand(groups, out_features, generator=generator) * 0.02 + 0.001
    if kind == "extreme zeros":  # 0 and 15 in neighbouring columns, where a borrow or a carry would show
        zeros = (torch.arange(out_features) % 2 * 15).to(torch.uint8).expand(groups, -1).contiguous()
    elif kind == "symmetric":
        zeros = torch.full_like(zeros, 8)
    elif kind == "cancelling":  # every weight is 0 but a few: whatever is summed apart must cancel
        codes = zeros.repeat_interleave(group_size, 0)
        rows = torch.arange(0, in_features, 31)
        codes[rows] = integers((len(rows), out_features))
    elif kind == "wide scales":  # neighbouring groups differ by 2^12
        exponents = torch.randint(-12, 1, scales.shape, generator=generator)
        scales = torch.ldexp(torch.ones_like(scales), exponents)
    elif kind == "subnormal scales":  # what AutoAWQ stores for a group of equal weights: 1e-5 / 15
        scales = torch.full_like(scales, 1e-5 / 15)
    elif kind != "random":
        raise ValueError(f"kind {kind!r} is unknown; one of {WEIGHT_KINDS} is expected")
    offsets = torch.randn(out_features, generator=generator).to(scale_dtype) if bias else None
    return AwqWeight(codes, zeros, scales.to(scale_dtype), offsets)


def hurtful_cases(dtype: torch.dtype, kinds: tuple[str, ...] = WEIGHT_KINDS) -> Iterator[Case]:
    """Every hurtful shape with every kind of weight; activations of mean 0 and, in every second case, of mean 1."""
    for number, (in_features, out_features, group_size, rows) in enumerate(HURTFUL_SHAPES):
        for kind_number, kind in enumerate(kinds):
            seed = 1000 * number + kind_number
            # Scales share the activations' dtype where that is 16 bits wide: bfloat16 checkpoints have bfloat16 scales.
            scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
            bias = (number + kind_number) % 2 == 1
            weight = hurtful_weight(
                kind, in_features, out_features, group_size, scale_dtype=scale_dtype, bias=bias, seed=seed
            )
            generator = torch.Generator().manual_seed(seed + 1)
            x = torch.randn(rows, in_features, generator=generator) + float((number + kind_number) % 3 == 0)
            yield Case(f"{kind}, K {in_features}, N {out_features}, G {group_size}, M {rows}", x.to(dtype), weight)
