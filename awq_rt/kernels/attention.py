"""Host half of fused_attention.cu and fused_attention_sum.cu, for a backend without a kernel of its own."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import AttentionSpec, AttentionTensors
from ..rtc import Program
from .heads import head_defines, rope_pointers, serves_call, strides
from .launcher import HALF, Launcher, bits, pointer

ARGUMENTS = 19
SUM_ARGUMENTS = 3
THREADS = 256
MOST_PARTS = 8
ALONE = 128
"""Positions up to which one part would take all, where parts could meet."""
NO_WINDOW = 0xFFFFFFFF
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Cut:
    """Heads of q that a block serves, and positions in flight in each of its teams."""

    group: int
    ahead: int


def sharing(spec: AttentionSpec) -> int:
    """Heads of q that share a head of k and v."""
    return spec.heads // spec.kv_heads


def cut_of(spec: AttentionSpec, lanes: int) -> Cut:
    """As many heads as share a head of k and v and find registers: others read k and v again, from a cache."""
    group = math.gcd(sharing(spec), 4)
    return Cut(group, 1 if group == 4 and lanes == 32 else 2)


def blocks_of(spec: AttentionSpec) -> int:
    """Blocks of a row and a part."""
    return spec.heads // math.gcd(sharing(spec), 4)


def parts_of(rows: int, spec: AttentionSpec, multiprocessors: int) -> int:
    """Parts of the context: a power of two that makes no more blocks than there are multiprocessors."""
    most = multiprocessors // (rows * blocks_of(spec))
    return min(MOST_PARTS, 1 << max(0, most.bit_length() - 1))


def defines(spec: AttentionSpec, half: int, slopes: bool, lanes: int) -> dict[str, str | int]:
    cut = cut_of(spec, lanes)
    return head_defines(spec, half) | {
        "SHARING": sharing(spec),
        "GROUP": cut.group,
        "SOFTCAP": int(spec.softcap is not None),
        "SLOPES": int(slopes),
        "TO_PARTS": 1,
        "THREADS": THREADS,
        "AHEAD": cut.ahead,
        "ALONE": ALONE,
        "MIN_BLOCKS": 1,
    }


@functools.lru_cache(maxsize=1024)
def constants(spec: AttentionSpec) -> tuple[int, int, int, int]:
    """The kernels' arguments window, scale, softcap and eps."""
    softcap = spec.softcap or 0.0
    scale = spec.scale / softcap if softcap else spec.scale * LOG2_E
    return spec.window or NO_WINDOW, bits(scale), bits(softcap), bits(spec.norm_eps or 0.0)


class DecodeAttention:
    """`awq_rt.ops.decode_attention`, or NotImplemented."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[AttentionSpec, torch.dtype, bool, int], tuple[Any, Any]] = {}

    def programs(self, spec: AttentionSpec, half: int, slopes: bool, device_index: int) -> list[Program]:
        """The parts' program and that of their sum."""
        given = defines(spec, half, slopes, self._launcher.lanes(device_index))
        names = ("fused_attention", "fused_attention_sum")
        return [self._launcher.program(name, given, device_index) for name in names]

    def __call__(
        self,
        qkv: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        spec: AttentionSpec,
        tensors: AttentionTensors,
    ) -> Any:
        launcher = self._launcher
        index = launcher.device_index(qkv)
        if index is None or not serves_call(qkv, positions, k_cache, v_cache, spec, tensors):
            return NotImplemented
        rows = qkv.shape[0]
        y = qkv.new_empty(rows, spec.heads * spec.head_dim)
        if rows == 0:
            return y
        key = (spec, qkv.dtype, tensors.slopes is not None, index)
        kernel, adder = self._loaded.get(key) or self._load(*key)
        parts = parts_of(rows, spec, launcher.multiprocessors(index))
        out = y
        if parts > 1:
            out = torch.empty(rows * spec.heads, parts, spec.head_dim + 4, dtype=torch.float32, device=qkv.device)
        pointers = [tensor.data_ptr() for tensor in (qkv, positions, k_cache, v_cache)]
        pointers += (*rope_pointers(tensors), pointer(tensors.slopes), out.data_ptr())
        values = (*strides(k_cache, v_cache), k_cache.shape[2], *constants(spec))
        launcher.launch(kernel, index, (parts, blocks_of(spec), rows), THREADS, *pointers, *values)
        if parts > 1:
            grid, threads = (rows * spec.heads, 1, 1), spec.head_dim // 4
            launcher.launch(adder, index, grid, threads, out.data_ptr(), y.data_ptr(), parts)
        return y

    def _load(self, spec: AttentionSpec, dtype: torch.dtype, slopes: bool, index: int) -> tuple[Any, Any]:
        of_parts, of_sum = self.programs(spec, HALF[dtype], slopes, index)
        loaded = (
            self._launcher.load(of_parts, ARGUMENTS, index),
            self._launcher.load(of_sum, SUM_ARGUMENTS, index),
        )
        self._loaded[spec, dtype, slopes, index] = loaded
        return loaded
