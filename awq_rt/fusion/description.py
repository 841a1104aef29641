"""What a decoder consists of, told apart from the model it was found in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..ops import AttentionSpec
from .projection import Projection

Part = tuple[dict[str, nn.Module | None], str, nn.Module]
"""A module's children by name, one of the names, and the child that it had.

Not the module itself: the model holds its decoder, and were the model held here, the two would keep each other, and the
GPU's memory, until Python looks for cycles.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Norm:
    """An RMS norm: x / sqrt(mean(x^2) + eps) * weight. `weight` is float32 [H]."""

    weight: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    qkv: Projection
    out: Projection
    spec: AttentionSpec
    q_norm: Tensor | None  # float32 [head_dim]
    k_norm: Tensor | None
    slopes: Tensor | None  # float32 [heads]: ALiBi


@dataclass(frozen=True, slots=True, eq=False)
class GatedMlp:
    gate_up: Projection
    down: Projection
    activation: str  # a key of ops.ACTIVATIONS


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """h += post(attention(norm(h))); h += post(mlp(norm(h))). A mixture of experts is `mlp` as transformers has it."""

    attention_norm: Norm
    attention: Attention
    attention_post_norm: Norm | None
    mlp_norm: Norm
    mlp: GatedMlp | nn.Module
    mlp_post_norm: Norm | None

    @property
    def projections(self) -> tuple[Projection, ...]:
        of_mlp = (self.mlp.gate_up, self.mlp.down) if isinstance(self.mlp, GatedMlp) else ()
        return (self.attention.qkv, self.attention.out, *of_mlp)


@dataclass(frozen=True, slots=True, eq=False)
class Description:
    """A whole decoder.

    `rotary(count)` gives the float32 tables cos and sin [count, rotary_dim / 2] of the first `count` positions, which
    hold for sequences of up to `rotary_limit`.
    """

    embedding: nn.Module
    embedding_scale: float
    layers: tuple[Layer, ...]
    norm: Norm
    head: nn.Module  # a linear, packed or dense
    logit_softcap: float | None
    rotary: Callable[[int], tuple[Tensor, Tensor]] | None
    rotary_limit: int | None
    parts: tuple[Part, ...]  # all that this was read from
    hooks: tuple[Mapping[int, Any], ...]  # on the model and its parts, of every kind

    @property
    def hidden_sizes(self) -> set[int]:
        return {len(self.norm.weight)}

    @property
    def mlps(self) -> set[tuple[int, str]]:
        """(intermediate size, activation) of every gated MLP."""
        found = [layer.mlp for layer in self.layers if isinstance(layer.mlp, GatedMlp)]
        return {(mlp.down.in_features, mlp.activation) for mlp in found}

    @property
    def attentions(self) -> set[tuple[AttentionSpec, bool]]:
        """(attention, whether it has slopes) of every layer."""
        return {(layer.attention.spec, layer.attention.slopes is not None) for layer in self.layers}
