"""The hook in transformers' loader: packed modules go in before the weights are loaded, and are filled after.

transformers loads the dense tensors, places modules on devices and ties weights; the packed linears are read by
`Checkpoint` alone, one at a time. Only members that exist from transformers 5.16 on are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import Checkpoint
from ..conversion import quantization_config, stored_tensors
from ..errors import UnsupportedDevice
from ..formats import WRITABLE, LinearShape
from ..linear import AwqLinear
from ..memory import Trimmer
from ..weights import AwqWeight
from .activation import ScaledActivation
from .experts import AwqExperts
from .placement import Experts, Placement, place

METHOD = "awq_rt"


@register_quantization_config(METHOD)
class AwqRtConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How one load is to be done. Saved with a model it becomes what the checkpoint's layout needs."""

    def __init__(self, checkpoint: Checkpoint, dense: dict[str, Tensor], backend: str | None, kernel: str):
        self.quant_method = METHOD
        self.checkpoint: Checkpoint | None = checkpoint
        self.dense = dense  # what transformers will load, by checkpoint name; the quantizer may add to it
        self.backend = backend
        self.kernel = kernel
        self.layout = checkpoint.layout if checkpoint.layout in WRITABLE else "gemm"
        self._saved = quantization_config(checkpoint, self.layout)

    def to_dict(self) -> dict[str, Any]:
        return dict(self._saved)

    def to_diff_dict(self) -> dict[str, Any]:
        return dict(self._saved)

    def __deepcopy__(self, memo: dict[int, Any]) -> AwqRtConfig:
        return self  # transformers copies configurations; the open checkpoint is one


@register_quantizer(METHOD)
class AwqRtQuantizer(HfQuantizer):  # type: ignore[misc]
    requires_calibration = True

    def __init__(self, quantization_config: AwqRtConfig, **kwargs: Any):
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})
        self.placement = Placement()

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UnsupportedDevice(
                "device_map places modules on 'disk'; packed linears stay in memory: give more devices or max_memory"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint = self._checkpoint()
        self.placement = place(model, checkpoint)
        for path, name in self.placement.linears.items():
            _replace(model, path, _empty(checkpoint.linears[name].shape))
        for path, experts in self.placement.experts.items():
            gate_up = [_joined_shape(checkpoint, experts.gate_up[e]) for e in sorted(experts.gate_up)]
            down = [_joined_shape(checkpoint, experts.down[e]) for e in sorted(experts.down)]
            _replace(model, path, AwqExperts(model.get_submodule(path), gate_up, down))
        for path, name in self.placement.activations.items():
            features = checkpoint.dense[name].shape[0]
            _replace(model, path, ScaledActivation(model.get_submodule(path), features))
        for name in self.placement.dense:
            weight = checkpoint[name]
            self.quantization_config.dense[f"{name}.weight"] = weight.dequantize().T.contiguous()
            if weight.bias is not None:
                self.quantization_config.dense[f"{name}.bias"] = weight.bias

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        checkpoint = self._checkpoint()
        self.quantization_config.dense.clear()  # loaded by now; the file pages that were read for them can go
        slow: dict[tuple[str, str], list[str]] = {}
        filled, memory = list(self._linears(model)), Trimmer()
        for linear, names in logging.tqdm(filled, desc="Packing weights"):
            device = linear.packed_0.device
            weights = [checkpoint.read(name, device) for name in names]
            weight = weights[0] if len(weights) == 1 else AwqWeight.concatenate(weights)
            config = self.quantization_config
            choice = linear.bind(weight, model.dtype, device, backend=config.backend, kernel=config.kernel)
            memory.worked_through(sum(tensor.nbytes for tensor in linear.packed.tensors))
            if device.type != "cpu" and choice.backend.priority == 0 and config.backend is None:
                why = "; ".join(f"{name}: {refusal}" for name, refusal in choice.refusals)
                why = why or "no backend for it is installed [AWQ-BACKEND-004]"
                slow.setdefault((choice.backend.name, why), []).append(names[0])
        for (backend, why), names in slow.items():
            warnings.warn(
                f"{len(names)} linears, {names[0]} first, run slowly on backend {backend!r}: {why}",
                RuntimeWarning,
                stacklevel=2,
            )
        self.quantization_config.checkpoint = None  # its files can be closed
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model as a checkpoint stores it, in the layout it came in (gemm where that cannot be written)."""
        state = dict(model.state_dict())
        for linear, names in self._linears(model):
            weight = linear.weight_canonical().to("cpu")
            for name, part in zip(names, _split(weight, len(names)), strict=True):
                stored = stored_tensors(part, self.quantization_config.layout)
                state.update({f"{name}.{suffix}": tensor for suffix, tensor in stored.items()})
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside frozen 4-bit weights: gradients pass through to x

    @property
    def is_compileable(self) -> bool:
        return True

    def _checkpoint(self) -> Checkpoint:
        checkpoint: Checkpoint = self.quantization_config.checkpoint
        return checkpoint

    def _linears(self, model: Any) -> Iterator[tuple[AwqLinear, tuple[str, ...]]]:
        """Every packed linear of the model with the checkpoint names that make it up."""
        for path, name in self.placement.linears.items():
            yield model.get_submodule(path), (name,)
        for path, experts in self.placement.experts.items():
            yield from _expert_linears(model.get_submodule(path), experts)


def _expert_linears(module: AwqExperts, experts: Experts) -> Iterator[tuple[AwqLinear, tuple[str, ...]]]:
    for linears, sources in ((module.gate_up, experts.gate_up), (module.down, experts.down)):
        for expert, linear in enumerate(linears):
            assert isinstance(linear, AwqLinear)
            yield linear, sources[expert]


def _split(weight: AwqWeight, parts: int) -> Iterator[AwqWeight]:
    """The inverse of `AwqWeight.concatenate` for parts of equal width."""
    width = weight.out_features // parts
    for part in range(parts):
        n = slice(part * width, (part + 1) * width)
        bias = None if weight.bias is None else weight.bias[n].clone()
        yield AwqWeight(weight.codes[:, n], weight.zeros[:, n], weight.scales[:, n].contiguous(), bias)


def _joined_shape(checkpoint: Checkpoint, names: tuple[str, ...]) -> LinearShape:
    shapes = [checkpoint.linears[name].shape for name in names]
    return LinearShape(shapes[0].in_features, sum(s.out_features for s in shapes), shapes[0].group_size)


def _empty(shape: LinearShape) -> AwqLinear:
    return AwqLinear(shape.in_features, shape.out_features, shape.group_size)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
