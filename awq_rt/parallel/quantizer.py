"""The hook in transformers' loader for one process of several: its parts go into smaller modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.quantizers import register_quantization_config, register_quantizer

from ..checkpoint import Checkpoint
from ..formats import LinearShape
from ..models.experts import AwqExperts, empty_linear
from ..models.quantizer import AwqRtConfig, AwqRtQuantizer
from .group import Group
from .linears import RowParallelLinear, cut_experts
from .plan import plan
from .sharding import ShardedCheckpoint

METHOD = "awq_rt_parallel"


@register_quantization_config(METHOD)
class ParallelConfig(AwqRtConfig):
    """How one load by the processes of `group` is to be done."""

    def __init__(self, checkpoint: Checkpoint, dense: dict[str, Any], backend: str | None, kernel: str, group: Group):
        super().__init__(checkpoint, dense, backend, kernel, METHOD)
        self.group = group


@register_quantizer(METHOD)
class ParallelQuantizer(AwqRtQuantizer):
    def _put_in_place(self, model: Any, *, new_heads: bool = False) -> None:
        super()._put_in_place(model, new_heads=new_heads)
        config = self.quantization_config
        group = config.group
        found = plan(model, self.placement, config.checkpoint, group.rank, group.size)
        parts = config.checkpoint = ShardedCheckpoint(config.checkpoint, found, group.rank)
        for path, name in self.placement.linears.items():
            shape = parts.linears[name].shape
            linear = RowParallelLinear(shape, group) if path in found.summed else empty_linear(shape)
            model.set_submodule(path, linear)
        for path, experts in self.placement.experts.items():
            module = model.get_submodule(path)
            assert isinstance(module, AwqExperts)
            gate_up = [_joined(parts, experts.gate_up[e]) for e in sorted(experts.gate_up)]
            down = [_joined(parts, experts.down[e]) for e in sorted(experts.down)]
            cut_experts(module, gate_up, down, group)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotImplementedError(
            "a model loaded with tp_plan holds this process's parts only, and cannot be saved; load it without tp_plan "
            "to save it, or convert the checkpoint itself: awq-rt convert"
        )

    @property
    def is_trainable(self) -> bool:
        return False  # gradients do not pass between processes


def _joined(checkpoint: Checkpoint, names: tuple[str, ...]) -> LinearShape:
    """The shape of several linears side by side."""
    shapes = [checkpoint.linears[name].shape for name in names]
    return LinearShape(shapes[0].in_features, sum(shape.out_features for shape in shapes), shapes[0].group_size)
