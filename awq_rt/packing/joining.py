"""Several packed weights that read the same x as one, where strips of columns are the outermost dimension."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..backend import Packed
from .layout import Layout


def join(parts: Sequence[Packed], form: str, strip: int) -> tuple[Packed, tuple[Packed, ...]] | None:
    """One weight with the columns of all `parts`, and each part again as a view of its tensors.

    None where they cannot be one: they are not all of `form`, depth, groups or dtypes differ, only some have a bias, or
    a part does not end with a whole strip of `strip` columns.
    """
    if not all(part.layout.startswith(form + " ") for part in parts):
        return None
    layouts = [Layout.parse(part.layout) for part in parts]
    if len({replace(layout, out_features=0) for layout in layouts}) != 1:
        return None
    if any(layout.out_features % strip for layout in layouts):
        return None
    columns = sum(layout.out_features for layout in layouts)
    whole = tuple(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True))
    sizes = [[len(tensor) for tensor in part.tensors] for part in parts]
    splits = [
        torch.split(tensor, list(lengths)) for tensor, lengths in zip(whole, zip(*sizes, strict=True), strict=True)
    ]
    views = tuple(Packed(part.layout, tensors) for part, tensors in zip(parts, zip(*splits, strict=True), strict=True))
    return Packed(str(replace(layouts[0], out_features=columns)), whole), views
