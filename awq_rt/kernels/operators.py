"""The fused operators of `awq_rt.ops` on a backend that can compile and launch the shared kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..ops import AttentionSpec
from ..rtc import Program
from .attention import DecodeAttention
from .gated import GatedActivation
from .greedy import Argmax
from .heads import serves_spec
from .launcher import HALF, Launcher
from .logits import DenseLinear
from .norm import Norms
from .rope import RopeAppend


class Operators:
    """A backend's `ops`, and what they need compiled."""

    def __init__(self, launcher: Launcher) -> None:
        self._norms = Norms(launcher)
        self._gated = GatedActivation(launcher)
        self._rope = RopeAppend(launcher)
        self._attention = DecodeAttention(launcher)
        self._dense = DenseLinear(launcher)
        self._argmax = Argmax(launcher)

    @property
    def by_name(self) -> dict[str, Callable[..., Any]]:
        """What `Backend.ops` is."""
        return {
            "dense_linear": self._dense,
            "argmax": self._argmax,
            "rms_norm": self._norms.rms_norm,
            "add_rms_norm": self._norms.add_rms_norm,
            "gated_activation": self._gated,
            "rope_append": self._rope,
            "decode_attention": self._attention,
        }

    def programs(
        self,
        dtype: torch.dtype,
        device_index: int,
        hidden: Iterable[int],
        mlps: Iterable[tuple[int, str]],
        attentions: Iterable[tuple[AttentionSpec, bool]],
    ) -> list[Program]:
        """All that the operators of a decoder need, to be compiled before its first step.

        `hidden` are the sizes of its norms, `mlps` the (intermediate size, activation) and `attentions` the (spec,
        whether it has slopes) that it has. What is not served needs nothing.
        """
        half = HALF[dtype]
        found = [self._argmax.program(half, device_index)]
        for size in hidden:
            found += self._norms.programs(size, half, device_index)
            found += self._dense.programs(size, half, device_index)
        found += [self._gated.program(width, half, activation, device_index) for width, activation in mlps]
        for spec, slopes in attentions:
            if serves_spec(spec):
                found.append(self._rope.program(spec, half, device_index))
                found += self._attention.programs(spec, half, slopes, device_index)
        return list(dict.fromkeys(found))
