"""The modules of a model that is cut over several processes, in the places of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..formats import LinearShape
from ..linear import AwqLinear
from ..models.experts import AwqExperts, empty_linear
from ..models.narrow import NarrowHead
from .group import Group


class RowParallelLinear(AwqLinear):
    """A linear whose in_features are cut: `x` holds this process's features, and the sum of all results is returned.

    `partial` is this process's own result.
    """

    def __init__(self, shape: LinearShape, group: Group):
        super().__init__(shape.in_features, shape.out_features, shape.group_size)
        self.group = group

    def partial(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.partial(x))


class ParallelExperts(AwqExperts):
    """Experts whose intermediate features are cut: the sum of what all processes' parts give."""

    group: Group

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.group.all_reduce(super().forward(hidden_states, top_k_index, top_k_weights))


def cut_experts(experts: AwqExperts, gate_up: list[LinearShape], down: list[LinearShape], group: Group) -> None:
    """Make `experts`, which are empty yet, those of these shapes."""
    experts.gate_up = nn.ModuleList(empty_linear(shape) for shape in gate_up)
    experts.down = nn.ModuleList(empty_linear(shape) for shape in down)
    experts.__class__ = ParallelExperts
    experts.group = group  # type: ignore[assignment]


class VocabularyParallelHead(nn.Linear):
    """The dense linear that gives logits, cut by rows of its weight [V, H]; every process gets all logits.

    Its rows are a view of the whole weight where that is the embedding's too.
    """

    def __init__(self, head: nn.Linear, tied: bool, group: Group):
        rows = -(-head.out_features // group.size)
        super().__init__(head.in_features, rows, bias=False, device="meta")
        self.vocabulary, self.group = head.out_features, group
        first = min(group.rank * rows, head.out_features)
        weight, bias = head.weight.detach(), head.bias
        own = weight[first : first + rows]
        missing = rows - len(own)
        if missing:
            own = torch.cat([own, weight.new_zeros(missing, head.in_features)])
        self.weight = nn.Parameter(own if tied else own.clone(), requires_grad=False)
        if bias is not None:
            part = functional.pad(bias.detach()[first : first + rows], (0, missing))
            self.bias = nn.Parameter(part, requires_grad=False)

    def gather(self, logits: Tensor) -> Tensor:
        """This process's `logits` [..., rows] -> those of the whole vocabulary [..., V]."""
        return self.group.all_gather(logits)[..., : self.vocabulary]

    def forward(self, x: Tensor) -> Tensor:
        return self.gather(functional.linear(x, self.weight.to(x.dtype), self.bias))


def cut_head(model: Any, group: Group) -> None:
    """Cut the linear of `model` that gives logits, where it is dense. A packed one stays whole in every process."""
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, NarrowHead):
        tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        model.set_output_embeddings(VocabularyParallelHead(head, tied, group))
