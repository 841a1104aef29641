"""Linears that read the same input, as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .. import registry
from ..backend import Packed
from ..linear import AwqLinear


class Projection:
    """`x` [M, K] -> the outputs of `linears` side by side [M, N1 + N2 + ...].

    Where the backend can lay the packed weights of all side by side, they are one product, and the linears then hold
    views of its tensors: nothing is stored twice, and each linear still works alone.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        self.linears = tuple(linears)
        self._product: Packed | None = None
        self._linear: Callable[[Tensor, Packed], Tensor] | None = None
        packed = [linear for linear in self.linears if isinstance(linear, AwqLinear)]
        if len(packed) == len(self.linears) and len({linear.backend_name for linear in packed}) == 1:
            self._linear = registry.get(packed[0].backend_name).linear
            self._product = _joined(packed) if len(packed) > 1 else packed[0].packed
        self._pointers = [_pointer(linear) for linear in self.linears]

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
        self._pointers = [_pointer(linear) for linear in self.linears]

    @property
    def current(self) -> bool:
        """Whether the linears still hold what was joined: one that moves to another device or dtype is packed anew."""
        return all(pointer == _pointer(linear) for pointer, linear in zip(self._pointers, self.linears, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        if self._linear is not None and self._product is not None:
            return self._linear(x, self._product)
        outputs = [linear(x) for linear in self.linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _same_part(new: Tensor, old: Tensor, part: Tensor) -> Tensor:
    """The view of `new` that `part` is of `old`."""
    offset = new.storage_offset() + part.storage_offset() - old.storage_offset()
    return new.as_strided(part.shape, part.stride(), offset)


def _pointer(linear: nn.Module) -> int:
    weight = linear.packed_0 if isinstance(linear, AwqLinear) else linear.weight
    assert isinstance(weight, Tensor)
    return weight.data_ptr()


def _joined(linears: Sequence[AwqLinear]) -> Packed | None:
    join = getattr(registry.get(linears[0].backend_name), "join", None)
    found = join([linear.packed for linear in linears]) if join is not None else None
    if found is None:
        return None
    whole, views = found
    for linear, view in zip(linears, views, strict=True):
        linear.hold(view)
    return whole  # type: ignore[no-any-return]
