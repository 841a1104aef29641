"""AutoAWQ's gemv packing, and llm-awq's second generation (September 2023 to February 2024).

    qweight  int32 [N, K/8]   natural order along K
    qzeros   int32 [N, ZW]    natural order along the groups, padded with zeros
    scales   [N, 8 ZW]        padded with zeros

ZW (`zeros_width`) pads the number of groups for the kernel's loads, so G does not follow from the shapes: it comes from
the configuration or, without one, from where the padding of the scales begins.
Source: AutoAWQ 0.2.9, modules/linear/gemv.py, `calculate_zeros_width`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import LayoutCannotHold
from ..weights import AwqWeight
from . import nibbles
from .layout import LinearShape, TensorInfo, expect, expect_floating, is_matrix
from .padding import padded_groups, shape_from_groups, unpadded, unpadded_scales, zeros_width

NAME = "gemv"
SUFFIXES = ("qweight", "qzeros", "scales", "bias")


def matches(stored: Mapping[str, TensorInfo]) -> bool:
    if not (is_matrix(stored, "qweight", torch.int32) and is_matrix(stored, "qzeros", torch.int32)):
        return False
    # One row an output in all three. (GPTQ's int32 tensors share the columns instead.)
    rows = {stored[suffix].shape[0] for suffix in ("qweight", "qzeros")}
    return "g_idx" not in stored and is_matrix(stored, "scales") and len(rows) == 1


def shape(stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
    out_features, words = stored["qweight"].shape
    expect_floating(stored["scales"])
    expect(stored["scales"], out_features, 8 * stored["qzeros"].shape[1])
    return shape_from_groups(stored["scales"], 8 * words, out_features, 8 * stored["qzeros"].shape[1], group_size)


def read(stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
    scales = unpadded_scales(stored["scales"].T, shape.groups)
    zeros = unpadded(nibbles.unpack_rows(stored["qzeros"]).T, shape.groups, "qzeros")
    codes = nibbles.unpack_rows(stored["qweight"]).T.contiguous()
    return AwqWeight(codes, zeros, scales, stored.get("bias"))


def check(shape: LinearShape) -> None:
    if shape.in_features % 32:
        raise LayoutCannotHold(f"gemv packs 32 rows at a time; in_features is {shape.in_features}")
    zeros_width(shape.in_features, shape.group_size)


def write(weight: AwqWeight) -> dict[str, Tensor]:
    check(LinearShape.of(weight))
    if not bool(weight.scales.any(dim=1).all()):
        raise LayoutCannotHold("gemv pads scales with zeros; the weight has a group whose scales are all 0")
    width = 8 * zeros_width(weight.in_features, weight.group_size)
    return {
        "qweight": nibbles.pack_rows(weight.codes.T.contiguous()),
        "qzeros": nibbles.pack_rows(padded_groups(weight.zeros, width).T.contiguous()),
        "scales": padded_groups(weight.scales, width).T.contiguous(),
    }
