"""The fused operators of a decoder, defined in torch. A backend may bring its own of the same name and meaning.

A step of a decoder layer is four of these between its four linears. A backend's operator is called with the arguments
below, and returns `NotImplemented` for those that it does not serve; the definition here then runs instead. It computes
in float32 and rounds its result once, runs on the current stream, never waits, and takes memory from torch only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .backend import Backend, Capture

if TYPE_CHECKING:
    from .parallel.group import Group

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What an attention layer fixes. `qkv` holds the heads of q, then those of k, then those of v."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of q @ k
    rotary_dim: int = 0  # leading features of a head that are rotated
    interleaved: bool = False  # rotates features 2i and 2i + 1, not i and i + rotary_dim / 2
    window: int | None = None  # a position sees itself and window - 1 before it
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    norm_eps: float | None = None  # of the norms of q and k, where there are any


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTensors:
    """The tensors of an attention layer beside its cache, all float32."""

    cos: Tensor  # [positions, rotary_dim / 2]
    sin: Tensor
    q_norm: Tensor | None = None  # [head_dim], of an RMS norm before the rotation; both or neither
    k_norm: Tensor | None = None
    slopes: Tensor | None = None  # [heads]: ALiBi adds slope * (key position - query position)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` [M, K] @ `weight` [N, K].T + `bias` [N] -> [M, N] in x's dtype, for the linear that gives logits.

    `weight` is of x's dtype; or of 16 bits while x is float32, where that holds every weight exactly.
    """
    return functional.linear(x, weight.to(x.dtype), bias)


def argmax(logits: Tensor) -> Tensor:
    """The index of the largest of each row of `logits` [M, V], the first of equal ones -> int64 [M]. NaN is largest."""
    return logits.argmax(dim=-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [M, H] / sqrt(mean(x^2) + eps) * `weight` float32 [H] -> [M, H] in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`residual` [M, H] += `x` [M, H], in place and rounded; returns `rms_norm` of it."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def all_reduce_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: Group) -> Tensor:
    """`add_rms_norm` of the sum over `group`'s processes of their `x`, which may be changed."""
    return add_rms_norm(group.all_reduce(x), residual, weight, eps)


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    """`gate_up` [M, 2 I] -> activation(first half) * second half [M, I]. `activation` is a key of `ACTIVATIONS`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (ACTIVATIONS[activation](gate) * up).to(gate_up.dtype)


def rope_append(
    qkv: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Tensor:
    """Rotate q and k of T new positions a row, and put k and v into the cache.

    `qkv` [B, T, (heads + 2 kv_heads) head_dim]; `first` int32 [B], the position of each row's first token, which is its
    slot in the cache too; caches [B, kv_heads, S, head_dim] of qkv's dtype, perhaps the leading slots of longer ones
    (only the last two dimensions are contiguous). Positions must lie below S and below the tables' length: nothing is
    checked on the device. Returns q [B, heads, T, head_dim], perhaps a view of [B, T, heads, head_dim].
    """
    batch, count, _ = qkv.shape
    heads = qkv.view(batch, count, -1, spec.head_dim).transpose(1, 2)
    q, k, v = torch.split(heads, [spec.heads, spec.kv_heads, spec.kv_heads], dim=1)
    positions = first.long()[:, None] + torch.arange(count, device=first.device)  # [B, T]
    q = _placed(q, positions, spec, tensors, tensors.q_norm)
    k = _placed(k, positions, spec, tensors, tensors.k_norm)
    slots = positions[:, None, :, None].expand(k.shape)
    k_cache.scatter_(2, slots, k)
    v_cache.scatter_(2, slots, v)
    return q


def decode_attention(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Tensor:
    """One new position a row: `rope_append`, then attention over the cache up to and including it.

    `qkv` [B, (heads + 2 kv_heads) head_dim], `positions` int32 [B], caches [B, kv_heads, S, head_dim]. Cache slots past
    a row's position may hold anything. Returns [B, heads head_dim].
    """
    batch = len(qkv)
    q = rope_append(qkv[:, None], positions, k_cache, v_cache, spec, tensors)
    grouped = q.view(batch, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim).float()
    scores = grouped @ k_cache.float().transpose(2, 3) * spec.scale  # [B, kv_heads, heads / kv_heads, S]
    distance = torch.arange(k_cache.shape[2], device=qkv.device) - positions.long()[:, None]  # [B, S]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if tensors.slopes is not None:
        scores = scores + tensors.slopes.view(spec.kv_heads, -1, 1) * distance[:, None, None]
    unseen = distance > 0
    if spec.window is not None:
        unseen |= distance <= -spec.window
    unseen = unseen[:, None, None]
    shares = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    values = v_cache.float().masked_fill(unseen.transpose(2, 3), 0.0)  # a slot past the position may hold NaN
    return (shares @ values).view(batch, -1).to(qkv.dtype)


def _placed(
    x: Tensor, positions: Tensor, spec: AttentionSpec, tensors: AttentionTensors, norm: Tensor | None
) -> Tensor:
    """`x` [B, heads, T, head_dim], normalised where there is a norm, rotated to its `positions` [B, T]."""
    wide = x.float()
    if norm is not None:
        assert spec.norm_eps is not None
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.norm_eps) * norm
    if spec.rotary_dim:
        cos, sin = tensors.cos[positions][:, None], tensors.sin[positions][:, None]  # [B, 1, T, rotary_dim / 2]
        turned, rest = wide[..., : spec.rotary_dim], wide[..., spec.rotary_dim :]
        if spec.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = turned.chunk(2, dim=-1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        wide = torch.cat((turned, rest), dim=-1)
    return wide.to(x.dtype)


DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    "dense_linear": dense_linear,
    "argmax": argmax,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "all_reduce_add_rms_norm": all_reduce_add_rms_norm,
    "gated_activation": gated_activation,
    "rope_append": rope_append,
    "decode_attention": decode_attention,
}


class Ops:
    """The operators that serve one backend: its own, and for what those do not serve, the definitions.

    `capture` is the backend's, where it has one.
    """

    def __init__(self, backend: Backend):
        self.own = frozenset(backend.ops)
        self.capture: Capture | None = getattr(backend, "capture", None)
        for name, definition in DEFINITIONS.items():
            setattr(self, name, _first_that_serves(backend.ops.get(name), definition))

    dense_linear: Callable[..., Tensor]
    argmax: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., Tensor]
    all_reduce_add_rms_norm: Callable[..., Tensor]
    gated_activation: Callable[..., Tensor]
    rope_append: Callable[..., Tensor]
    decode_attention: Callable[..., Tensor]


def _first_that_serves(own: Callable[..., Any] | None, definition: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if own is None:
        return definition

    def call(*arguments: Any) -> Tensor:
        result: Tensor = own(*arguments)
        return definition(*arguments) if result is NotImplemented else result

    return call
