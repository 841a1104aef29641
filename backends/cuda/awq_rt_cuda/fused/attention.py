"""Host half of kernels/fused_attention*.cu: how the context is cut, and the launch."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from awq_rt.ops import AttentionSpec, AttentionTensors
from awq_rt.rtc import Program

from ..driver import Kernel, Shape
from ..selection import Target
from ..tiled import target_of
from . import order
from .heads import head_defines, pointer, serves_call
from .launch import HALF, bits, launch, load, ordinary, program

ARGUMENTS = 19
SUM_ARGUMENTS = 3
MOST_PARTS = 8
"""What a cluster may hold on every GPU that has them."""
FROM_MMA = 3
"""Heads of q that share a head of k and v, from which the matrix unit serves; fma has one or two a block."""
MOST_MMA_HEAD_DIM = 128
MOST_GROUP = 4
"""Heads of q a block of mma: those of further blocks find k and v in the L2 cache."""
ALONE = 128
"""Positions up to which one block takes all."""
NO_WINDOW = 0xFFFFFFFF
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a block works: its unit, its threads, the heads of q that it serves, and how many a multiprocessor holds."""

    unit: str  # "mma" is fused_attention_mma.cu, "fma" fused_attention.cu
    threads: int
    group: int
    resident: int
    ahead: int = 1  # positions in flight in each team of fma

    @property
    def entry(self) -> str:
        return "fused_attention_mma" if self.unit == "mma" else "fused_attention"


def sharing(spec: AttentionSpec) -> int:
    """Heads of q that share a head of k and v."""
    return spec.heads // spec.kv_heads


@functools.lru_cache(maxsize=1024)
def cut_of(spec: AttentionSpec) -> Cut:
    """More heads of q a block, or wider ones, need more registers, which leaves fewer for positions in flight."""
    shared = sharing(spec)
    if shared >= FROM_MMA and spec.head_dim <= MOST_MMA_HEAD_DIM:
        return Cut("mma", 192, -(-shared // -(-shared // MOST_GROUP)), 1)
    if shared % 2:
        return Cut("fma", 192, 1, 2, 4 if spec.head_dim <= 128 else 3)
    return Cut("fma", 128, 2, 2, 4)


def parts_of(rows: int, spec: AttentionSpec, target: Target) -> int:
    """Parts of the context: a power of two that makes no more blocks than there are multiprocessors, so that the next
    kernel's blocks find room beside them."""
    most = target.multiprocessors // (rows * blocks_of(spec))
    return min(MOST_PARTS, 1 << max(0, most.bit_length() - 1))


def blocks_of(spec: AttentionSpec) -> int:
    """Blocks of a row and a part."""
    return spec.kv_heads * -(-sharing(spec) // cut_of(spec).group)


def defines(spec: AttentionSpec, half: int, slopes: bool, to_parts: bool) -> dict[str, str | int]:
    cut = cut_of(spec)
    return head_defines(spec, half) | {
        "SHARING": sharing(spec),
        "GROUP": cut.group,
        "SOFTCAP": int(spec.softcap is not None),
        "SLOPES": int(slopes),
        "TO_PARTS": int(to_parts),
        "THREADS": cut.threads,
        "AHEAD": cut.ahead,
        "ALONE": ALONE,
        "MIN_BLOCKS": cut.resident,
    }


def programs(spec: AttentionSpec, half: int, slopes: bool, target: Target, arch: str) -> list[Program]:
    """Every program that `decode_attention` may need for `spec`."""
    to_parts = not target.clusters
    needed = [cut_of(spec).entry] + ["fused_attention_sum"] * to_parts
    return [program(name, arch, defines(spec, half, slopes, to_parts)) for name in needed]


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What is decided for a spec on a device."""

    early: Kernel
    ordinary: Kernel
    adder: Kernel | None  # of the parts, where blocks cannot read each other's shared memory
    constants: tuple[int, int, int, int]  # window, scale, softcap, eps as the kernel takes them


@functools.cache
def plan(spec: AttentionSpec, half: int, slopes: bool, device_index: int) -> Plan:
    """The kernels of `spec`, compiled and loaded."""
    target = target_of(device_index)
    given = defines(spec, half, slopes, not target.clusters)
    kernel = load(cut_of(spec).entry, given, ARGUMENTS, device_index)
    adder = None if target.clusters else load("fused_attention_sum", given, SUM_ARGUMENTS, device_index)
    softcap = spec.softcap or 0.0
    scale = spec.scale / softcap if softcap else spec.scale * LOG2_E
    constants = (spec.window or NO_WINDOW, bits(scale), bits(softcap), bits(spec.norm_eps or 0.0))
    return Plan(kernel, ordinary(kernel), adder, constants)


@functools.lru_cache(maxsize=4096)
def _shape(rows: int, spec: AttentionSpec, device_index: int) -> Shape:
    target = target_of(device_index)
    parts = parts_of(rows, spec, target)
    return Shape((parts, blocks_of(spec), rows), cut_of(spec).threads, cluster=parts if target.clusters else 1)


def decode_attention(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> Any:
    """`awq_rt.ops.decode_attention`, or NotImplemented."""
    if not serves_call(qkv, positions, k_cache, v_cache, spec, tensors):
        return NotImplemented
    rows = qkv.shape[0]
    y = qkv.new_empty(rows, spec.heads * spec.head_dim)
    if rows == 0:
        return y
    index = qkv.get_device()
    chosen = plan(spec, HALF[qkv.dtype], tensors.slopes is not None, index)
    shape = _shape(rows, spec, index)
    parts = shape.grid[0]
    out = y
    if chosen.adder is not None and parts > 1:
        out = torch.empty(rows * spec.heads, parts, spec.head_dim + 4, dtype=torch.float32, device=qkv.device)
    keys = k_cache.data_ptr()
    window, scale, softcap, eps = chosen.constants
    launch(
        chosen.early if order.may_read_early(index, keys) else chosen.ordinary,
        shape,
        index,
        qkv.data_ptr(),
        positions.data_ptr(),
        keys,
        v_cache.data_ptr(),
        pointer(tensors.cos),
        pointer(tensors.sin),
        pointer(tensors.q_norm),
        pointer(tensors.k_norm),
        pointer(tensors.slopes),
        out.data_ptr(),
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        k_cache.shape[2],
        window,
        scale,
        softcap,
        eps,
    )
    if chosen.adder is not None and parts > 1:
        launch(
            chosen.adder,
            Shape((rows * spec.heads, 1, 1), spec.head_dim // 4),
            index,
            out.data_ptr(),
            y.data_ptr(),
            parts,
        )
    return y
