"""A checkpoint of which one process sees its own parts."""

from __future__ import annotations

import dataclasses

import torch

from ..checkpoint import Checkpoint, StoredLinear
from ..weights import AwqWeight
from .partial import of_files
from .plan import Cut, Plan


class ShardedCheckpoint(Checkpoint):
    """`whole` as process `rank` reads it: `linears` have the sizes of the parts in `plan`, and `read` gives them."""

    def __init__(self, whole: Checkpoint, plan: Plan, rank: int):
        self.root, self.source = whole.root, whole.source
        self.config, self.quantization = whole.config, whole.quantization
        self.layout, self.dense = whole.layout, whole.dense
        self._whole, self._plan, self._rank = whole, plan, rank
        self.linears = {name: self._part(linear) for name, linear in whole.linears.items()}
        self._parts = of_files(whole, self.linears, self._plan.cuts)

    def read(self, name: str, device: torch.device | str = "cpu") -> AwqWeight:
        """This process's part of the linear `name`, on `device`."""
        if self._parts is not None:
            return self._parts.read(name, device)
        weight = self._whole.read(name, device)
        cut = self._plan.cuts.get(name)
        return weight if cut is None else part_of(weight, cut, self._rank)

    def _part(self, linear: StoredLinear) -> StoredLinear:
        cut = self._plan.cuts.get(linear.name)
        if cut is None:
            return linear
        shape, tensors = linear.shape, linear.tensors
        if cut.rows is not None:
            shape = dataclasses.replace(shape, in_features=cut.rows.stop - cut.rows.start)
            if self._rank:  # the bias is added once
                tensors = {suffix: info for suffix, info in tensors.items() if suffix != "bias"}
        if cut.columns:
            shape = dataclasses.replace(shape, out_features=sum(part.stop - part.start for part in cut.columns))
        return dataclasses.replace(linear, shape=shape, tensors=tensors)

    def __repr__(self) -> str:
        return f"part {self._rank} of {self._whole!r}"


def part_of(weight: AwqWeight, cut: Cut, rank: int) -> AwqWeight:
    """The part of `weight` that `cut` describes. Of cut rows, process 0 alone has the bias: the results are summed."""
    codes, zeros, scales, bias = weight.codes, weight.zeros, weight.scales, weight.bias
    if cut.rows is not None:
        groups = slice(cut.rows.start // weight.group_size, cut.rows.stop // weight.group_size)
        codes, zeros, scales = codes[cut.rows], zeros[groups], scales[groups]
        bias = None if rank else bias
    if cut.columns:
        codes, zeros, scales = (torch.cat([t[:, n] for n in cut.columns], dim=1) for t in (codes, zeros, scales))
        bias = None if bias is None else torch.cat([bias[n] for n in cut.columns])
    return AwqWeight(codes, zeros, scales, bias)
