"""The tensors of a packed linear as vLLM's loader has to cut and fill them, and the weight that they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidTensor
from ..formats import LAYOUTS, LinearShape
from ..weights import AwqWeight

SERVED = ("gemm", "compressed-tensors")
WORD = 8
"""4-bit values in a word."""

SCALES = torch.float32
"""Scales are read into what holds them exactly, whatever vLLM's --dtype is: in bfloat16 they lose 3 of 11 bits."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a linear: `suffix` of its name, shape and dtype, the dimensions along in_features and out_features
    (None where it has none), and the one of the two in which a word holds 8 values."""

    suffix: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    in_dim: int | None
    out_dim: int | None
    packed_dim: int | None = None


def stored_tensors(layout: str, shape: LinearShape, symmetric: bool) -> tuple[StoredTensor, ...]:
    """The tensors of a linear of `shape` in `layout`, one of `SERVED`."""
    k, n, groups = shape.in_features, shape.out_features, shape.groups
    if layout == "gemm":
        return (
            StoredTensor("qweight", (k, n // WORD), torch.int32, 0, 1, 1),
            StoredTensor("qzeros", (groups, n // WORD), torch.int32, 0, 1, 1),
            StoredTensor("scales", (groups, n), SCALES, 0, 1),
        )
    tensors = (
        StoredTensor("weight_packed", (n, k // WORD), torch.int32, 1, 0, 1),
        StoredTensor("weight_scale", (n, groups), SCALES, 1, 0),
        StoredTensor("weight_shape", (2,), torch.int64, None, None),
    )
    zeros = StoredTensor("weight_zero_point", (n // WORD, groups), torch.int32, 1, 0, 0)
    return tensors if symmetric else (*tensors, zeros)


def check(name: str, shape: LinearShape) -> None:
    """Raise `InvalidTensor` where a process's part of the linear `name` ends inside a group or a word."""
    if shape.in_features % shape.group_size or shape.in_features % WORD or shape.out_features % WORD:
        raise InvalidTensor(
            f"{name}: a part of {shape.in_features} x {shape.out_features} does not consist of whole groups of "
            f"{shape.group_size} and words of {WORD}; give a smaller --tensor-parallel-size"
        )


def canonical(layout: str, shape: LinearShape, stored: Mapping[str, Tensor]) -> AwqWeight:
    """The weight that the tensors `stored`, by suffix, are; its scales in the dtype that they were saved in."""
    exact = {name: narrowed(tensor) if tensor.dtype == SCALES else tensor for name, tensor in stored.items()}
    return LAYOUTS[layout].read(exact, shape)


def narrowed(scales: Tensor) -> Tensor:
    """`scales` in the first of float16 and bfloat16 that holds each of them exactly, else as they are."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.to(scales.dtype), scales):
            return narrow
    return scales
