"""AutoAWQ's default packing, and the one most AWQ checkpoints on the hub have ("version": "gemm").

    qweight  int32 [K, N/8]     nibble i of word c is column 8c + COLUMN_OF_NIBBLE[i]
    qzeros   int32 [K/G, N/8]   likewise
    scales   [K/G, N]           float16; other packers also write bfloat16

W = (q - z) * s. K, N and G all follow from the shapes. Source: AutoAWQ 0.2.9, modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LayoutCannotHold
from ..weights import AwqWeight
from . import nibbles
from .layout import LinearShape, TensorInfo, expect, expect_floating, group_size_of, is_matrix

NAME = "gemm"
SUFFIXES = ("qweight", "qzeros", "scales", "bias")

COLUMN_OF_NIBBLE = [0, 2, 4, 6, 1, 3, 5, 7]
"""Even columns in the low half-word, odd ones in the high, as half2 arithmetic wants them."""


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    if not (is_matrix(stored, "qweight", torch.int32) and is_matrix(stored, "qzeros", torch.int32)):
        return False
    # GEMV keeps a row an output in both tensors; here they share the columns. Only G = 1 could look like both.
    qweight, qzeros = stored["qweight"].shape, stored["qzeros"].shape
    return "g_idx" not in stored and is_matrix(stored, "scales") and qweight[1] == qzeros[1] and qweight[0] != qzeros[0]


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    in_features, words = stored["qweight"].shape
    groups = stored["scales"].shape[0]
    expect_floating(stored["scales"])
    expect(stored["scales"], groups, 8 * words)
    expect(stored["qzeros"], groups, words)
    return LinearShape(in_features, 8 * words, group_size_of(stored["scales"], in_features, groups))


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    return AwqWeight(
        _unpack(stored["qweight"]),
        _unpack(stored["qzeros"]),
        stored["scales"],
        stored.get("bias"),
    )


def check(shape: LinearShape) -> None:
    if shape.out_features % 8:
        raise LayoutCannotHold(f"gemm packs 8 columns a word; out_features is {shape.out_features}")


def write(weight: AwqWeight) -> dict[str, Tensor]:
    check(LinearShape.of(weight))
    return {
        "qweight": _pack(weight.codes),
        "qzeros": _pack(weight.zeros),
        "scales": weight.scales,
    }


def _unpack(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 C]. Whole words are shifted and masked: 8 times as fast as gathering bytes."""

    def columns(pair: int) -> Tensor:
        """Columns 2 pair and 2 pair + 1, which are nibbles `pair` and `pair` + 4, as the two low bytes of a word."""
        apart = (words >> 4 * pair).bitwise_and_(0x000F000F)
        return (apart >> 8).bitwise_or_(apart).bitwise_and_(0xFFFF)

    halves = [columns(0).bitwise_or_(columns(1) << 16), columns(2).bitwise_or_(columns(3) << 16)]
    return torch.stack(halves, dim=-1).view(torch.uint8).flatten(1)


def _pack(values: Tensor) -> Tensor:
    return nibbles.join(values.reshape(len(values), -1, 8)[..., COLUMN_OF_NIBBLE], torch.int32)
