"""What the operators on heads share: awq_rt/kernels/heads.py, for tensors on a GPU."""

from __future__ import annotations

from torch import Tensor

from awq_rt.kernels import heads
from awq_rt.kernels.heads import HEAD_DIMS, head_defines, serves_spec
from awq_rt.kernels.launcher import pointer
from awq_rt.ops import AttentionSpec, AttentionTensors


def serves_call(
    qkv: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, spec: AttentionSpec, tensors: AttentionTensors
) -> bool:
    """Whether a kernel can take these arguments."""
    return qkv.is_cuda and heads.serves_call(qkv, positions, k_cache, v_cache, spec, tensors)


__all__ = ["HEAD_DIMS", "head_defines", "pointer", "serves_call", "serves_spec"]
