"""The fused operators of `awq_rt.ops` on NVIDIA GPUs: a file each, the host half of `kernels/fused_NAME.cu`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from awq_rt.ops import AttentionSpec
from awq_rt.rtc import Program

from ..tiled import target_of
from . import attention, gated, greedy, logits, norm, rope
from .all_reduce import all_reduce_add_rms_norm
from .attention import decode_attention
from .gated import gated_activation
from .greedy import argmax
from .heads import serves_spec
from .launch import HALF, arch_of, program
from .logits import dense_linear
from .norm import add_rms_norm, rms_norm
from .rope import rope_append

OPS: dict[str, Callable[..., Any]] = {
    "dense_linear": dense_linear,
    "argmax": argmax,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "all_reduce_add_rms_norm": all_reduce_add_rms_norm,
    "gated_activation": gated_activation,
    "rope_append": rope_append,
    "decode_attention": decode_attention,
}


def programs(
    dtype: torch.dtype,
    device_index: int,
    hidden: Iterable[int],
    mlps: Iterable[tuple[int, str]],
    attentions: Iterable[tuple[AttentionSpec, bool]],
) -> list[Program]:
    """All that the operators of a decoder need, to be compiled before its first step.

    `hidden` are the sizes of its norms, `mlps` the (intermediate size, activation) and `attentions` the (spec, whether
    it has slopes) that it has. What is not served needs nothing.
    """
    half, target, arch = HALF[dtype], target_of(device_index), arch_of(device_index)
    found = [program("fused_norm", arch, norm.defines(size, half, add)) for size in hidden for add in (0, 1)]
    found += [program("fused_gated", arch, gated.defines(width, half, activation)) for width, activation in mlps]
    found += [needed for size in hidden for needed in logits.programs(size, half, arch)]
    found.append(program("fused_argmax", arch, greedy.defines(half, greedy.parts_of(target))))
    for spec, slopes in attentions:
        if serves_spec(spec):
            found.append(program("fused_rope", arch, rope.defines(spec, half)))
            found += attention.programs(spec, half, slopes, target, arch)
    return list(dict.fromkeys(found))


__all__ = [
    "OPS",
    "add_rms_norm",
    "all_reduce_add_rms_norm",
    "argmax",
    "decode_attention",
    "dense_linear",
    "gated_activation",
    "programs",
    "rms_norm",
    "rope_append",
]
