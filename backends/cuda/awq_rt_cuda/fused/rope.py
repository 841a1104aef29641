"""Host half of kernels/fused_rope.cu."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from awq_rt.ops import AttentionSpec, AttentionTensors

from ..driver import Kernel, Shape
from . import order
from .heads import head_defines, pointer, serves_call
from .launch import HALF, bits, launch, load

ARGUMENTS = 15
THREADS = 256


def defines(spec: AttentionSpec, half: int) -> dict[str, str | int]:
    return head_defines(spec, half) | {"HEADS": spec.heads, "KV_HEADS": spec.kv_heads, "THREADS": THREADS}


@functools.cache
def _kernel(spec: AttentionSpec, half: int, device_index: int) -> Kernel:
    return load("fused_rope", defines(spec, half), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=4096)
def _shape(count: int, batch: int) -> Shape:
    return Shape((count, batch, 1), THREADS)


def rope_append(
    qkv: Tensor, first: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Any:
    """`awq_rt.ops.rope_append`, or NotImplemented."""
    if not serves_call(qkv, first, k_cache, v_cache, spec, tensors):
        return NotImplemented
    batch, count, _ = qkv.shape
    q = qkv.new_empty(batch, count, spec.heads, spec.head_dim)  # as attention is to write its result
    if q.numel():
        index = qkv.get_device()
        order.wrote(index, k_cache.data_ptr())
        launch(
            _kernel(spec, HALF[qkv.dtype], index),
            _shape(count, batch),
            index,
            qkv.data_ptr(),
            first.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            pointer(tensors.cos),
            pointer(tensors.sin),
            pointer(tensors.q_norm),
            pointer(tensors.k_norm),
            *k_cache.stride()[:2],
            *v_cache.stride()[:2],
            count,
            bits(spec.norm_eps or 0.0),
        )
    return q.transpose(1, 2)
