"""A layer's packed weights in one allocation.

Packing makes tensors of many sizes between temporaries that die. torch's allocator carves small ones out of large
blocks, which then cannot be given back: a quarter of a 7B model's packed size stays behind as holes. Moved together,
the weights leave all of it free.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .projection import Projection

ALIGNMENT = 512
"""Bytes, as torch aligns its own allocations."""


def move_together(projections: Iterable[Projection]) -> None:
    """Move the weights of `projections` to one new allocation. Their linears hold views of it, with the same values."""
    packed = [projection for projection in projections if projection.tensors]
    tensors = [tensor for projection in packed for tensor in projection.tensors]
    if not tensors:
        return
    arena = torch.empty(sum(map(_room, tensors)), dtype=torch.uint8, device=tensors[0].device)
    taken = 0
    for projection in packed:
        moved = []
        for tensor in projection.tensors:
            place = arena[taken : taken + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            moved.append(place.copy_(tensor))
            taken += _room(tensor)
        projection.hold(moved)


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
