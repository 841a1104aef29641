"""The padding of scales and zero points that gemv, gemv_fast and llm-awq share: groups rounded up, zeros behind."""

from __future__ import annotations

from torch import Tensor

from ..errors import InvalidTensor, LayoutCannotHold
from .layout import LinearShape, TensorInfo


def zeros_width(in_features: int, group_size: int) -> int:
    """How many words of 8 zero points a column has: `ceil(K/G / 8)`, rounded up for the kernels' loads."""
    multiples = {64: 2, 32: 4}
    if group_size < 128 and group_size not in multiples:
        raise LayoutCannotHold(
            f"this layout exists for group sizes 32, 64 and from 128 on; the weight has {group_size}"
        )
    multiple = multiples.get(group_size, 1)
    words = -(-(in_features // group_size) // 8)
    return -(-words // multiple) * multiple


def shape_from_groups(
    scales: TensorInfo, in_features: int, out_features: int, padded: int, group_size: int | None
) -> LinearShape:
    """The shape of a linear whose `scales` have room for `padded` groups. Raises `InvalidTensor`."""
    if group_size is None:
        raise InvalidTensor(f"{scales} is padded, so the group size does not follow from its shape; pass group_size=")
    size = in_features if group_size == -1 else group_size
    if min(size, in_features) < 1 or in_features % size or in_features // size > padded:
        raise InvalidTensor(
            f"{scales} has room for {padded} groups; a group size of {group_size} with in_features {in_features} "
            "does not fit it; look at the group size in the configuration"
        )
    return LinearShape(in_features, out_features, size)


def padded_groups(rows: Tensor, width: int) -> Tensor:
    """[K/G, N] -> [width, N], zeros below."""
    padded = rows.new_zeros(width, rows.shape[1])
    padded[: len(rows)] = rows
    return padded


def unpadded(rows: Tensor, groups: int, what: str) -> Tensor:
    """The first `groups` rows. Raises `InvalidTensor` when zeros do not follow: the group size is then wrong."""
    if bool(rows[groups:].any()):
        used = int(rows.any(dim=1).nonzero().max()) + 1
        raise InvalidTensor(f"{what} holds {used} groups where the group size makes {groups}; it contradicts them")
    return rows[:groups].contiguous()


def unpadded_scales(rows: Tensor, groups: int) -> Tensor:
    """As `unpadded`; a group without any scale is padding too, as no packer writes a scale of 0."""
    scales = unpadded(rows, groups, "scales")
    if not bool(scales.any(dim=1).all()):
        raise InvalidTensor(
            f"scales holds {used_groups(rows)} groups where the group size makes {groups}; it contradicts them"
        )
    return scales


def used_groups(scales: Tensor) -> int:
    """How many groups padded `scales` [padded, N] hold."""
    return int(scales.any(dim=1).sum())
