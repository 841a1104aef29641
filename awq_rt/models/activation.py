"""An activation whose output AWQ divides, so that the linear after it could be multiplied when it was quantised."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledActivation(nn.Module):
    """`activation(x) / scales`. MPT, Falcon, Bloom, GPT-J, GPT-NeoX and GPT-BigCode checkpoints hold `scales` [ffn]."""

    def __init__(self, activation: nn.Module, features: int):
        super().__init__()
        self.act = activation
        self.scales = nn.Parameter(torch.ones(features, device="meta"), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(x)
        return y / self.scales
