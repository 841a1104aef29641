"""The fused operators of `awq_rt.ops` on the CPU. Each returns `NotImplemented` for what it does not serve."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, get_num_threads

from awq_rt.ops import AttentionSpec, AttentionTensors

from . import _native

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
"""The native module's numbers."""

DENSE_ROWS = 8
"""Up to this many rows of x, reading a dense weight is what takes the time. torch's BLAS is for more."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _native.rms_norm(x, weight, eps, get_num_threads())


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _native.add_rms_norm(x, residual, weight, eps, get_num_threads())


def gated_activation(gate_up: Tensor, activation: str) -> Tensor:
    number = ACTIVATIONS.get(activation)
    if number is None:
        return NotImplemented  # type: ignore[no-any-return]
    return _native.gated_activation(gate_up, number, get_num_threads())


def rope_append(
    qkv: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Tensor:
    native, t = _attention(spec), tensors
    if native is None:
        return NotImplemented  # type: ignore[no-any-return]
    return native.append(qkv, first, k_cache, v_cache, t.cos, t.sin, t.q_norm, t.k_norm, get_num_threads())


def decode_attention(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Tensor:
    native, t = _attention(spec), tensors
    if native is None:
        return NotImplemented  # type: ignore[no-any-return]
    parts = (t.cos, t.sin, t.q_norm, t.k_norm, t.slopes)
    return native.decode(qkv, positions, k_cache, v_cache, *parts, get_num_threads())


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [M, K] @ `weight` [N, K].T + `bias` [N] -> [M, N] in x's dtype; float32 sums of unrounded products.

    `weight` may be narrower than x: it is read in the dtype that it has.
    """
    return _native.dense_linear(x, weight, bias, DENSE_ROWS, get_num_threads())


def argmax(logits: Tensor) -> Tensor:
    found = torch.empty(len(logits), dtype=torch.int64)
    return _native.argmax(logits, found, get_num_threads())


@functools.lru_cache(maxsize=256)
def _attention(spec: AttentionSpec) -> _native.Attention | None:
    sizes = (spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim)
    numbers = (spec.window or 0, spec.scale, spec.softcap or 0.0, spec.norm_eps or 0.0)
    try:
        return _native.Attention(*sizes, spec.interleaved, *numbers)
    except ValueError:  # a size that the kernels do not serve
        return None


OPS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_activation": gated_activation,
    "rope_append": rope_append,
    "decode_attention": decode_attention,
    "dense_linear": dense_linear,
    "argmax": argmax,
}
