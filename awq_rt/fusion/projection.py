"""Linears that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import registry
from ..backend import Packed
from ..linear import AwqLinear
from ..parallel.group import Group

Place = tuple[Mapping[str, Tensor | None], str, int]
"""A module's tensors, the name of one of them, and the address that it has: quick to look up, past `nn.Module`."""


class Projection:
    """`x` [M, K] -> the outputs of `linears` side by side [M, N1 + N2 + ...].

    Where the backend can lay the packed weights of all side by side, they are one product, and the linears then hold
    views of its tensors: nothing is stored twice, and each linear still works alone.

    `places` are those of the linears' weights: one that moves to another device or dtype is packed anew elsewhere.

    `group` are the processes over which the result has to be summed, where the linear's rows are cut.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = tuple(linears)
        self._product: Packed | None = None
        self._linear: Callable[[Tensor, Packed], Tensor] | None = None
        packed = [linear for linear in self.linears if isinstance(linear, AwqLinear)]
        if len(packed) == len(self.linears) and len({linear.backend_name for linear in packed}) == 1:
            self._linear = registry.get(packed[0].backend_name).linear
            self._product = _joined(packed) if len(packed) > 1 else packed[0].packed
        self.places = _places(self.linears)
        self.group: Group | None = getattr(self.linears[0], "group", None)

    @property
    def in_features(self) -> int:
        return int(self.linears[0].in_features)  # type: ignore[arg-type]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the product; none where there is not one, or its linear is dense."""
        return () if self._product is None else self._product.tensors

    def hold(self, moved: Sequence[Tensor]) -> None:
        """Keep `moved`, the product's `tensors` at other addresses; each linear gets its part of them as views."""
        assert self._product is not None
        for linear in self.linears:
            assert isinstance(linear, AwqLinear)
            parts = zip(moved, self._product.tensors, linear.packed.tensors, strict=True)
            linear.hold(Packed(linear.layout, tuple(_same_part(new, old, part) for new, old, part in parts)))
        self._product = Packed(self._product.layout, tuple(moved))
        self.places = _places(self.linears)

    def __call__(self, x: Tensor) -> Tensor:
        return self.partial(x) if self.group is None else self.group.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This process's part of the result; all of it where there is no `group`."""
        if self._linear is not None and self._product is not None:
            return self._linear(x, self._product)
        outputs = [linear(x) for linear in self.linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _same_part(new: Tensor, old: Tensor, part: Tensor) -> Tensor:
    """The view of `new` that `part` is of `old`."""
    offset = new.storage_offset() + part.storage_offset() - old.storage_offset()
    return new.as_strided(part.shape, part.stride(), offset)


def _places(linears: Sequence[nn.Module]) -> list[Place]:
    found: list[Place] = []
    for linear in linears:
        packed = isinstance(linear, AwqLinear)
        tensors: Mapping[str, Tensor | None] = linear._buffers if packed else linear._parameters
        name = "packed_0" if packed else "weight"
        weight = tensors.get(name)
        if weight is not None:  # a dense one that is computed from others moves with them
            found.append((tensors, name, weight.data_ptr()))
    return found


def _joined(linears: Sequence[AwqLinear]) -> Packed | None:
    join = getattr(registry.get(linears[0].backend_name), "join", None)
    found = join([linear.packed for linear in linears]) if join is not None else None
    if found is None:
        return None
    whole, views = found
    for linear, view in zip(linears, views, strict=True):
        linear.hold(view)
    return whole  # type: ignore[no-any-return]
