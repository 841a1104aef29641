"""A mixture's experts in 4 bits, in the place of transformers' module that fuses them into two dense parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import registry
from ..backend import Packed
from ..formats import LinearShape
from ..linear import AwqLinear

FEW_TOKENS = 64
"""Up to so many tokens the device chooses experts itself where `stack` has prepared it, without the host's help."""


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
        self._stacks: tuple[Callable[[Tensor], Packed], Callable[[Tensor], Packed]] | None = None
        self._gate_rule: Callable[..., Tensor] | None = getattr(type(replaced), "_apply_gate", None)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # which experts are chosen is not known to a graph
            return self._all_on_device(hidden_states, top_k_index, top_k_weights)
        if self._stacks is not None and len(hidden_states) <= FEW_TOKENS:
            few = top_k_index.numel() <= len(self.gate_up)
            by = self._chosen_on_device if few else self._all_on_device
            return by(hidden_states, top_k_index, top_k_weights)
        y = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= len(self.gate_up):  # one past the last means "none", where tokens are padding
                continue
            token, choice = torch.where(top_k_index == expert)
            gated = self._apply_gate(self.gate_up[expert](hidden_states[token]))
            out = self.down[expert](gated) * top_k_weights[token, choice, None]
            y.index_add_(0, token, out.to(y.dtype))
        return y

    def stack(self) -> bool:
        """Lay the experts' weights side by side, so that few tokens can choose among them without the host knowing.

        The experts then hold views. False where they cannot be: they were packed in different ways.
        """
        self._stacks = None
        kinds = [
            {(linear.layout, tuple(t.shape for t in linear.packed.tensors)) for linear in linears}  # type: ignore[union-attr]
            for linears in (self.gate_up, self.down)
        ]
        if any(len(kind) != 1 for kind in kinds):
            return False
        self._stacks = (_stacked(self.gate_up), _stacked(self.down))
        return True

    def _chosen_on_device(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `forward`, one product a token and choice, each of a copy of the weights chosen: a graph can hold this."""
        assert self._stacks is not None
        last = len(self.gate_up) - 1
        rows = []
        for token in range(len(hidden_states)):
            outs = []
            for choice in range(top_k_index.shape[1]):
                expert = top_k_index[token, choice].clamp(max=last).view(1)
                gate_up, down = (stack(expert) for stack in self._stacks)
                # This copy is also a barrier: kernels may read weights before the kernel ahead of them has ended.
                x = hidden_states[token : token + 1].clone()
                backend = registry.get(self.gate_up[0].backend_name)  # type: ignore[arg-type]
                out = backend.linear(self._apply_gate(backend.linear(x, gate_up)), down)
                share = top_k_weights[token, choice] * (top_k_index[token, choice] <= last)
                outs.append(out * share.to(out.dtype))
            rows.append(torch.stack(outs).sum(0))
        return torch.cat(rows).to(hidden_states.dtype)

    def _all_on_device(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `forward`, every expert for all tokens: many tokens hit most experts, and each is read once."""
        y = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            hit = top_k_index == expert
            share = (top_k_weights * hit).sum(-1, keepdim=True)
            out = down(self._apply_gate(gate_up(hidden_states))) * share
            y += out.to(y.dtype).masked_fill(~hit.any(-1, keepdim=True), 0.0)
        return y

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self._gate_rule is not None:
            return self._gate_rule(self, gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def _stacked(linears: nn.ModuleList) -> Callable[[Tensor], Packed]:
    """A function from an expert's number, int64 [1] on the device, to a copy of its packed weight."""
    packed: list[Packed] = [linear.packed for linear in linears]  # type: ignore[misc]
    stacks = [torch.stack(tensors) for tensors in zip(*(p.tensors for p in packed), strict=True)]
    for expert, linear in enumerate(linears):
        assert isinstance(linear, AwqLinear)
        linear.hold(Packed(packed[expert].layout, tuple(stack[expert] for stack in stacks)))
    return lambda expert: Packed(packed[0].layout, tuple(stack.index_select(0, expert)[0] for stack in stacks))


def empty_linear(shape: LinearShape) -> AwqLinear:
    """A packed linear of this shape that waits for its weight."""
    return AwqLinear(shape.in_features, shape.out_features, shape.group_size)
