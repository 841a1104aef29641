"""A mixture's experts in 4 bits, in the place of transformers' module that fuses them into two dense parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..formats import LinearShape
from ..linear import AwqLinear


class AwqExperts(nn.Module):
    """E gated feed-forward experts: `gate_up[e]` is [H -> 2I], gate before up, and `down[e]` [I -> H].

    Has the interface of transformers' fused experts modules: hidden states [T, H], the chosen experts [T, top_k] and
    their weights [T, top_k] -> [T, H]. `act_fn` and the gating rule are those of the module it replaces.
    """

    def __init__(self, replaced: nn.Module, gate_up: list[LinearShape], down: list[LinearShape]):
        super().__init__()
        self.gate_up = nn.ModuleList(empty_linear(shape) for shape in gate_up)
        self.down = nn.ModuleList(empty_linear(shape) for shape in down)
        self.act_fn: Callable[[Tensor], Tensor] = replaced.act_fn  # type: ignore[assignment]
        self._gate_rule: Callable[..., Tensor] | None = getattr(type(replaced), "_apply_gate", None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(self.gate_up):  # one past the last means "none", where tokens are padding
                continue
            token, choice = torch.where(top_k_index == expert)
            gated = self._apply_gate(self.gate_up[expert](hidden_states[token]))
            out = self.down[expert](gated) * top_k_weights[token, choice, None]
            y.index_add_(0, token, out.to(y.dtype))
        return y

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._gate_rule is not None:
            return self._gate_rule(self, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def empty_linear(shape: LinearShape) -> AwqLinear:
    """A packed linear of this shape that waits for its weight."""
    return AwqLinear(shape.in_features, shape.out_features, shape.group_size)
