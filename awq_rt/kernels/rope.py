"""Host half of fused_rope.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import AttentionSpec, AttentionTensors
from ..rtc import Program
from .heads import head_defines, rope_pointers, serves_call, strides
from .launcher import HALF, Launcher, bits

ARGUMENTS = 15
THREADS = 256


def defines(spec: AttentionSpec, half: int) -> dict[str, str | int]:
    return head_defines(spec, half) | {"HEADS": spec.heads, "KV_HEADS": spec.kv_heads, "THREADS": THREADS}


class RopeAppend:
    """`awq_rt.ops.rope_append`, or NotImplemented."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._loaded: dict[tuple[AttentionSpec, torch.dtype, int], Any] = {}

    def program(self, spec: AttentionSpec, half: int, device_index: int) -> Program:
        return self._launcher.program("fused_rope", defines(spec, half), device_index)

    def __call__(
        self,
        qkv: Tensor,
        first: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        spec: AttentionSpec,
        tensors: AttentionTensors,
    ) -> Any:
        index = self._launcher.device_index(qkv)
        if index is None or not serves_call(qkv, first, k_cache, v_cache, spec, tensors):
            return NotImplemented
        batch, count, _ = qkv.shape
        q = qkv.new_empty(batch, count, spec.heads, spec.head_dim)  # as attention is to write its result
        if q.numel():
            kernel = self._loaded.get((spec, qkv.dtype, index)) or self._load(spec, qkv.dtype, index)
            pointers = [tensor.data_ptr() for tensor in (qkv, first, q, k_cache, v_cache)]
            pointers += rope_pointers(tensors)
            values = (*strides(k_cache, v_cache), count, bits(spec.norm_eps or 0.0))
            self._launcher.launch(kernel, index, (count, batch, 1), THREADS, *pointers, *values)
        return q.transpose(1, 2)

    def _load(self, spec: AttentionSpec, dtype: torch.dtype, index: int) -> Any:
        loaded = self._launcher.load(self.program(spec, HALF[dtype], index), ARGUMENTS, index)
        self._loaded[spec, dtype, index] = loaded
        return loaded
