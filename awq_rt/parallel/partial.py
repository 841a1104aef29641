"""A linear's part read from its file: what other processes have is not copied, and of cut rows not even touched."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, StoredLinear
from ..checkpoint.storage import TensorFile
from ..formats import LinearShape
from .plan import Cut

AXES: Mapping[str, Mapping[str, tuple[int | None, int | None]]] = {
    "gemm": {"qweight": (0, 1), "qzeros": (0, 1), "scales": (0, 1), "bias": (None, 0)},
    "compressed-tensors": {
        "weight_packed": (1, 0),
        "weight_scale": (1, 0),
        "weight_zero_point": (1, 0),
        "weight_shape": (None, None),
        "bias": (None, 0),
    },
}
"""Dimensions of a layout's tensors along in_features and out_features. The other layouts interleave them."""


class CutFile:
    """What `Checkpoint` asks of a file, for the tensors of one linear of `shape`."""

    def __init__(self, file: TensorFile, axes: tuple[int | None, int | None], shape: LinearShape, cut: Cut):
        self._file, self._axes, self._shape, self._cut = file, axes, shape, cut

    def view(self, name: str) -> Tensor:
        """The part of the tensor `name`; where it is one range, in the file's own pages."""
        tensor = self._file.view(name)
        in_dim, out_dim = self._axes
        if self._cut.rows is not None and in_dim is not None:
            tensor = _cut(tensor, in_dim, self._shape.in_features, (self._cut.rows,))
        if self._cut.columns and out_dim is not None:
            tensor = _cut(tensor, out_dim, self._shape.out_features, self._cut.columns)
        return tensor

    def read(self, name: str) -> Tensor:
        return self.view(name).clone(memory_format=torch.contiguous_format)


def of_files(whole: Checkpoint, parts: Mapping[str, StoredLinear], cuts: Mapping[str, Cut]) -> Checkpoint | None:
    """`whole` with the linears `parts`, those in `cuts` read in part; None where its layout allows no such reading."""
    axes = AXES.get(whole.layout)
    if type(whole) is not Checkpoint or axes is None:
        return None
    found = copy.copy(whole)
    found.linears = dict(parts)
    found._home = dict(whole._home)
    for name, cut in cuts.items():
        linear = whole.linears[name]
        for suffix, info in linear.tensors.items():
            file = CutFile(whole._home[info.name], axes[suffix], linear.shape, cut)
            found._home[info.name] = cast(TensorFile, file)
    return found


def _cut(tensor: Tensor, dim: int, features: int, ranges: tuple[slice, ...]) -> Tensor:
    """`ranges` of `features` along `dim`, where an entry is of one feature, of 8 in a word, or of a group."""
    each = features // tensor.shape[dim]
    parts = [tensor.narrow(dim, r.start // each, (r.stop - r.start) // each) for r in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
