"""A mixture's experts as dense linears, one an expert, where transformers fuses them into two parameters."""

from __future__ import annotations

from torch import nn

from ..models.experts import AwqExperts


class UnfusedExperts(AwqExperts):
    """E gated feed-forward experts of dense linears: `gate_up[e]` [H -> 2I], gate before up, and `down[e]` [I -> H].

    Computes as `AwqExperts` does; parameters are on the meta device until they are loaded.
    """

    def __init__(self, replaced: nn.Module, experts: int, hidden: int, intermediate: int):
        nn.Module.__init__(self)
        self.gate_up = nn.ModuleList(
            nn.Linear(hidden, 2 * intermediate, bias=False, device="meta") for _ in range(experts)
        )
        self.down = nn.ModuleList(nn.Linear(intermediate, hidden, bias=False, device="meta") for _ in range(experts))
        self.act_fn = replaced.act_fn  # type: ignore[assignment]
        self._stacks = None
        self._gate_rule = getattr(type(replaced), "_apply_gate", None)
