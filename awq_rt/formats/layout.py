"""What a packing's module provides, and the words they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InvalidTensor
from ..weights import SCALE_DTYPES, AwqWeight


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor's header: `name` is its full name in the checkpoint.

    `values` are its contents where those are a shape (`weight_shape` of compressed-tensors), else None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """K, N and G of a packed linear."""

    in_features: int
    out_features: int
    group_size: int

    @property
    def groups(self) -> int:
        return self.in_features // self.group_size

    @classmethod
    def of(cls, weight: AwqWeight) -> LinearShape:
        return cls(weight.in_features, weight.out_features, weight.group_size)


class Layout(Protocol):
    """One packing, as its module implements it."""

    NAME: str
    SUFFIXES: tuple[str, ...]

    def matches(self, stored: Mapping[str, TensorInfo]) -> bool:
        """Whether tensors with these suffixes, shapes and dtypes are this packing."""

    def shape(self, stored: Mapping[str, TensorInfo], group_size: int | None) -> LinearShape:
        """K, N and G; every tensor's shape checked against them. `group_size` is the configuration's, -1 for K.

        Raises `InvalidTensor`.
        """

    def read(self, stored: Mapping[str, Tensor], shape: LinearShape) -> AwqWeight:
        """The canonical weight. Values that the packing does not allow raise `InvalidTensor`."""


class WritableLayout(Layout, Protocol):
    """A packing that can also be written."""

    def check(self, shape: LinearShape) -> None:
        """Raise `LayoutCannotHold` where a weight of this shape does not fit."""

    def write(self, weight: AwqWeight) -> dict[str, Tensor]:
        """Tensors by suffix, without the bias. Raises `LayoutCannotHold`."""


def expect(info: TensorInfo, *shape: int) -> None:
    """Raise `InvalidTensor` unless the tensor has this shape."""
    if info.shape != shape:
        raise InvalidTensor(f"{info.name} has shape {list(info.shape)}; the tensors beside it need {list(shape)}")


def expect_floating(info: TensorInfo) -> None:
    """Raise `InvalidTensor` unless the tensor's dtype is one that scales may have."""
    if info.dtype not in SCALE_DTYPES:
        raise InvalidTensor(f"{info.name} is {info.dtype}; float16, bfloat16 or float32 is expected")


def group_size_of(info: TensorInfo, in_features: int, groups: int) -> int:
    """K / groups, checked. `info` is the tensor that says how many groups there are."""
    if groups < 1 or in_features < 1 or in_features % groups:
        raise InvalidTensor(f"{info} makes {groups} groups, which do not divide in_features {in_features}")
    return in_features // groups


def is_matrix(stored: Mapping[str, TensorInfo], suffix: str, dtype: torch.dtype | None = None) -> bool:
    """Whether the tensor exists, is two-dimensional and, where given, has the dtype."""
    info = stored.get(suffix)
    return info is not None and len(info.shape) == 2 and (dtype is None or info.dtype == dtype)
