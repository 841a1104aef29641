"""What the operators on heads share: which specs kernels/fused_head.cuh serves, and the arguments of a cache."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..ops import AttentionSpec, AttentionTensors
from .launcher import pointer, serves

HEAD_DIMS = (64, 80, 96, 112, 128, 256)
MOST_ROWS = 65535
"""Of a batch: blocks along an outer dimension of the grid."""


@functools.lru_cache(maxsize=1024)
def serves_spec(spec: AttentionSpec) -> bool:
    """Whether a lane's two vectors of 8 features hold every pair that a rotation turns."""
    fits = spec.head_dim in HEAD_DIMS and spec.rotary_dim % 16 == 0 and 0 <= spec.rotary_dim <= spec.head_dim
    return fits and spec.heads % spec.kv_heads == 0


def serves_cache(cache: Tensor, qkv: Tensor, spec: AttentionSpec) -> bool:
    """Whether `cache` is [rows, kv_heads, slots, head_dim] with slots in whole loads of 16 bytes."""
    outer, inner, slot, feature = cache.stride()
    return (
        cache.dtype == qkv.dtype
        and cache.shape[1] == spec.kv_heads
        and cache.shape[3] == slot == spec.head_dim
        and feature == 1
        and outer % 8 == inner % 8 == cache.data_ptr() % 16 == 0
    )


def serves_call(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> bool:
    """Whether a kernel can take these arguments."""
    return (
        serves_spec(spec)
        and serves(qkv)
        and qkv.shape[0] <= MOST_ROWS
        and positions.dtype == torch.int32
        and positions.is_contiguous()
        and serves_cache(k_cache, qkv, spec)
        and serves_cache(v_cache, qkv, spec)
        and (spec.rotary_dim == 0 or (_is_table(tensors.cos, spec) and _is_table(tensors.sin, spec)))
        and _are_norms(spec, tensors.q_norm, tensors.k_norm)
    )


def _is_table(table: Tensor, spec: AttentionSpec) -> bool:
    return table.dtype == torch.float32 and table.is_contiguous() and table.shape[-1] == spec.rotary_dim // 2


def _are_norms(spec: AttentionSpec, *weights: Tensor | None) -> bool:
    """Whether q and k both have a norm, or neither."""
    if spec.norm_eps is None:
        return all(weight is None for weight in weights)
    return all(w is not None and w.dtype == torch.float32 and w.is_contiguous() for w in weights)


def head_defines(spec: AttentionSpec, half: int) -> dict[str, str | int]:
    """What fused_head.cuh is compiled for."""
    return {
        "ACTIVATION_HALF": half,
        "HEAD_DIM": spec.head_dim,
        "ROTARY_DIM": spec.rotary_dim,
        "INTERLEAVED": int(spec.interleaved),
        "QK_NORM": int(spec.norm_eps is not None),
    }


def rope_pointers(tensors: AttentionTensors) -> tuple[int, int, int, int]:
    """The kernels' arguments cos, sin, q_norm, k_norm."""
    return pointer(tensors.cos), pointer(tensors.sin), pointer(tensors.q_norm), pointer(tensors.k_norm)


def strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """The kernels' arguments k_batch_stride to v_head_stride."""
    return (*k_cache.stride()[:2], *v_cache.stride()[:2])
