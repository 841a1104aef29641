"""What device code is compiled for beside its own variant: the numbers it computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import Layout

SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""SCALE_KIND in device code. Scales are kept as the checkpoint has them."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What a weight and its activations fix when a kernel is compiled."""

    half: bool  # activations are float16, else bfloat16
    scale_kind: int  # a value of `SCALE_KINDS`
    group_size: int  # as the kernel sees it, which may be a divisor of the weight's

    @staticmethod
    def of(layout: Layout, group_size: int) -> Kind:
        return Kind(layout.dtype == torch.float16, SCALE_KINDS[layout.scale_dtype], group_size)

    def defines(self) -> dict[str, str | int]:
        return {"ACTIVATION_HALF": int(self.half), "SCALE_KIND": self.scale_kind, "GROUP_SIZE": self.group_size}
