"""Host half of kernels/fused_prompt_attention.cu."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from awq_rt.ops import AttentionSpec, AttentionTensors
from awq_rt.rtc import Program

from ..driver import Kernel, Shape
from . import attention, order
from .heads import head_defines, pointer, serves_layer
from .launch import HALF, launch, load, program

ENTRY = "fused_prompt_attention"
ARGUMENTS = 18
THREADS = 256
QUERIES = THREADS // 32
"""Of a block: a wave each."""


def most_of(spec: AttentionSpec) -> int:
    """Positions of a prompt, at most: shared memory holds all keys and values of a head."""
    return 64 if spec.head_dim <= 128 else 32


def defines(spec: AttentionSpec, half: int, slopes: bool) -> dict[str, str | int]:
    return head_defines(spec, half) | {
        "THREADS": THREADS,
        "MOST": most_of(spec),
        "SHARING": attention.sharing(spec),
        "SOFTCAP": int(spec.softcap is not None),
        "SLOPES": int(slopes),
        "GROUP": 1,
        "TO_PARTS": 0,
        "ALONE": 0,
    }


def needed(spec: AttentionSpec, half: int, slopes: bool, arch: str) -> Program:
    """The program that `prompt_attention` may need for `spec`."""
    return program(ENTRY, arch, defines(spec, half, slopes))


@functools.cache
def _kernel(spec: AttentionSpec, half: int, slopes: bool, device_index: int) -> Kernel:
    return load(ENTRY, defines(spec, half, slopes), ARGUMENTS, device_index)


@functools.lru_cache(maxsize=4096)
def _shape(count: int, heads: int, rows: int) -> Shape:
    return Shape((-(-count // QUERIES), heads, rows), THREADS)


def prompt_attention(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Any:
    """`awq_rt.ops.prompt_attention`, or NotImplemented."""
    if qkv.shape[1] > most_of(spec) or not serves_layer(qkv, k_cache, v_cache, spec, tensors):
        return NotImplemented
    rows, count, _ = qkv.shape
    y = qkv.new_empty(rows, count, spec.heads * spec.head_dim)
    if y.numel():
        index = qkv.get_device()
        order.wrote(index, k_cache.data_ptr())
        launch(
            _kernel(spec, HALF[qkv.dtype], tensors.slopes is not None, index),
            _shape(count, spec.heads, rows),
            index,
            qkv.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            pointer(tensors.cos),
            pointer(tensors.sin),
            pointer(tensors.q_norm),
            pointer(tensors.k_norm),
            pointer(tensors.slopes),
            y.data_ptr(),
            *k_cache.stride()[:2],
            *v_cache.stride()[:2],
            count,
            *attention.constants_of(spec),
        )
    return y
