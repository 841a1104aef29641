"""compressed-tensors "pack-quantized" with 4 bits, what llm-compressor writes for AWQ (and for plain W4A16).

    weight_packed      int32 [N, ceil(K/8)]     natural order along K
    weight_scale       [N, K/G]                 float16 or bfloat16, the model's dtype; [N, 1] for one group a column
    weight_zero_point  int32 [ceil(N/8), K/G]   natural order along N; absent when symmetric
    weight_shape       int64 [2]                N, K

Stored nibbles are the signed values plus 8, so they equal the codes and zero points of AWQ: W = (q - z) * s, z = 8 when
symmetric. Source: compressed-tensors 0.20, compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InvalidTensor
from ..weights import SYMMETRIC_ZERO, AwqWeight
from . import nibbles
from .layout import LinearShape, TensorInfo, expect, expect_floating, group_size_of, is_matrix

NAME = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "bias")


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    words = is_matrix(stored, "weight_packed", torch.int32)
    return words and is_matrix(stored, "weight_scale") and "weight_g_idx" not in stored


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    out_features, words = stored["weight_packed"].shape
    in_features = _in_features(stored, out_features, words)
    groups = stored["weight_scale"].shape[1]
    expect_floating(stored["weight_scale"])
    expect(stored["weight_scale"], out_features, groups)
    if "weight_zero_point" in stored:
        expect(stored["weight_zero_point"], -(-out_features // 8), groups)
        if stored["weight_zero_point"].dtype != torch.int32:
            raise InvalidTensor(f"{stored['weight_zero_point']}: int32 is expected, 8 zero points a word")
    return LinearShape(in_features, out_features, group_size_of(stored["weight_scale"], in_features, groups))


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    codes = nibbles.unpack_rows(stored["weight_packed"])[:, : shape.in_features].T.contiguous()
    scales = stored["weight_scale"].T.contiguous()
    if "weight_zero_point" in stored:
        zeros = nibbles.unpack_rows(stored["weight_zero_point"].T)[:, : shape.out_features].contiguous()
    else:
        zeros = torch.full(scales.shape, SYMMETRIC_ZERO, dtype=torch.uint8, device=scales.device)
    return AwqWeight(codes, zeros, scales, stored.get("bias"))


def check(shape: LinearShape) -> None:
    """Every shape fits."""


def write(weight: AwqWeight) -> dict[str, Tensor]:
    """Always with zero points: a checkpoint has one scheme, and a symmetric weight is an asymmetric one with z = 8."""
    return {
        "weight_packed": nibbles.pack_rows(_to_multiple_of_8(weight.codes.T)),
        "weight_scale": weight.scales.T.contiguous(),
        "weight_zero_point": nibbles.pack_rows(_to_multiple_of_8(weight.zeros)).T.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }


def _in_features(stored: Mapping[str, TensorInfo], out_features: int, words: int) -> int:
    if "weight_shape" not in stored:
        return 8 * words
    values = stored["weight_shape"].values
    if values is None or len(values) != 2 or values[0] != out_features or -(-values[1] // 8) != words:
        packed = stored["weight_packed"]
        raise InvalidTensor(f"{stored['weight_shape'].name} holds {values}, which contradicts {packed}")
    return values[1]


def _to_multiple_of_8(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % 8)).contiguous()
