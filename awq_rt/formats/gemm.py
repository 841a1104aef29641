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
NIBBLE_OF_COLUMN = [0, 4, 1, 5, 2, 6, 3, 7]
"""Its inverse: even columns in the low half-word, odd ones in the high, as half2 arithmetic wants them."""


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
    return nibbles.split(words)[..., NIBBLE_OF_COLUMN].flatten(1)


def _pack(values: Tensor) -> Tensor:
    return nibbles.join(values.reshape(len(values), -1, 8)[..., COLUMN_OF_NIBBLE], torch.int32)
