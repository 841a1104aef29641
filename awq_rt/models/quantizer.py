"""The hook in transformers' loader: packed modules go in before the weights are loaded, and are filled after.

transformers loads the dense tensors, places modules on devices and ties weights; the packed linears are read by
`Checkpoint` alone, one at a time. Only members that exist from transformers 5.16 on are used.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import registry
from ..backend import LinearSpec
from ..checkpoint import Checkpoint
from ..conversion import quantization_config, stored_tensors
from ..errors import InvalidTensor, LayoutCannotHold
from ..formats import WRITABLE, LinearShape
from ..linear import AwqLinear
from ..memory import Trimmer
from ..warmup import spec_of, warmup
from ..weights import AwqWeight
from .activation import ScaledActivation
from .experts import AwqExperts, empty_linear
from .narrow import narrow, settle
from .offload import Homes, offload_folder
from .placement import Experts, Placement, place
from .reading import weights_of

METHOD = "awq_rt"


@register_quantization_config(METHOD)
class AwqRtConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How one load is to be done. Saved with a model it becomes what the checkpoint's layout needs."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dense: dict[str, Any],
        backend: str | None = None,
        kernel: str = "auto",
        method: str = METHOD,
    ):
        self.quant_method = method
        self.checkpoint: Checkpoint | None = checkpoint
        self.dense = dense  # what transformers will load, by checkpoint name; the quantizer may add to it
        self.backend = backend
        self.kernel = kernel
        self.layout, self._saved = _saved_as(checkpoint)

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
        self.dtype = torch.float32  # of activations; told by `update_dtype`
        self._unplaced: Any = None  # the model, while its device map is still a word
        self._homes: Homes | None = None

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype  # `model.dtype` is that of its first parameter, which may be kept in float32
        return dtype

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")  # transformers asks again when it has resolved "auto"
        if self._unplaced is not None:
            self._place(self._unplaced, device_map)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        checkpoint = self._checkpoint()
        self._put_in_place(model)
        self._narrow(model, kwargs.get("device_map"))
        self._place(model, kwargs.get("device_map"))
        wanted = self._wanted_dtypes(model)
        for name, target in self.placement.targets.items():
            self.quantization_config.dense[name].dtype = wanted.get(target)
        for name, target in self.placement.dense.items():
            weight = checkpoint[name]
            self.quantization_config.dense[f"{name}.weight"] = matrix(weight, wanted[target])
            if weight.bias is not None:
                self.quantization_config.dense[f"{name}.bias"] = weight.bias

    def _put_in_place(self, model: Any, *, new_heads: bool = False) -> None:
        """Find every tensor's place and give `model` the modules for packed ones."""
        checkpoint = self._checkpoint()
        self.placement = place(model, checkpoint, new_heads=new_heads)
        for path, name in self.placement.linears.items():
            _replace(model, path, empty_linear(checkpoint.linears[name].shape))
        for path, experts in self.placement.experts.items():
            gate_up = [_joined_shape(checkpoint, experts.gate_up[e]) for e in sorted(experts.gate_up)]
            down = [_joined_shape(checkpoint, experts.down[e]) for e in sorted(experts.down)]
            _replace(model, path, AwqExperts(model.get_submodule(path), gate_up, down))
        for path, name in self.placement.activations.items():
            scales = checkpoint.view(name)
            if not bool((scales.isfinite() & (scales != 0)).all()):
                raise InvalidTensor(
                    f"{checkpoint.root}: {name} holds 0, NaN or infinity; activations are divided by it"
                )
            _replace(model, path, ScaledActivation(model.get_submodule(path), len(scales)))

    def _place(self, model: Any, device_map: dict[str, Any] | str | None) -> None:
        """See which linears will rest away from their device, before room for them is taken there.

        Raises `UnsupportedDevice` for a device that is not here.
        """
        self._unplaced = model if isinstance(device_map, str) else None
        if isinstance(device_map, dict):
            for place in {*device_map.values()} - {"cpu", "disk"}:
                registry.checked_device(f"cuda:{place}" if isinstance(place, int) else place)
            self._homes = Homes(model, device_map)

    def _narrow(self, model: Any, device_map: dict[str, Any] | str | None) -> None:
        """Keep embedding and head in 16 bits on a CPU whose backend reads them so. `loading` undoes it where the model
        is not fused."""
        if isinstance(device_map, str):
            return  # a word for a placement on several GPUs, which transformers works out later
        places = {str(place) for place in ({"": "cpu"} if device_map is None else device_map).values()}
        if self.dtype != torch.float32 or places != {"cpu"}:
            return
        checkpoint, config = self._checkpoint(), self.quantization_config
        spec = spec_of([next(iter(checkpoint.linears.values()))], self.dtype, config.kernel)
        choice = registry.select(spec, registry.device_for(torch.device("cpu")), config.backend)
        if dense_linear := choice.backend.ops.get("dense_linear"):
            stored = {target: checkpoint.dense[name].dtype for name, target in self.placement.targets.items()}
            narrow(model, stored, dense_linear)

    def _wanted_dtypes(self, model: Any) -> dict[str, torch.dtype]:
        """The dtype of every dense tensor of `model` by name: float32 where the architecture insists on it."""
        plan = model._get_dtype_plan(self.dtype)
        return {name: _kept_dtype(plan, name) or tensor.dtype for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        checkpoint = self._checkpoint()
        self.quantization_config.dense.clear()  # loaded by now
        settle(model)
        slow: dict[tuple[str, str], list[str]] = {}
        filled, memory = list(self._linears(model)), Trimmer()
        self._compile_ahead(filled)
        folder = offload_folder(model)
        read = weights_of(checkpoint, filled)
        for linear, names, weight in logging.tqdm(read, total=len(filled), desc="Packing weights"):
            device = linear.packed_0.device
            config = self.quantization_config
            choice = linear.bind(weight, self.dtype, device, backend=config.backend, kernel=config.kernel)
            if self._homes is not None:
                self._homes.take(linear, folder)
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
        self._homes = None  # of the linears now
        self.quantization_config.checkpoint = None  # its files can be closed
        return model

    def _compile_ahead(self, filled: list[tuple[AwqLinear, tuple[str, ...]]]) -> None:
        """Compile what `filled` will need, all side by side and where somebody can see how far it is."""
        checkpoint, config = self._checkpoint(), self.quantization_config
        specs: dict[torch.device, list[LinearSpec]] = {}
        for linear, names in filled:
            parts = [checkpoint.linears[name] for name in names]
            specs.setdefault(linear.packed_0.device, []).append(spec_of(parts, self.dtype, config.kernel))
        for device, its in specs.items():
            bar = None
            for kernel in warmup(its, device, config.backend):
                bar = bar or logging.tqdm(total=kernel.total, desc="Compiling kernels")
                bar.update()
            if bar is not None:
                bar.close()

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The model as a checkpoint stores it, in the layout it came in (gemm where that cannot be written).

        Under the model's own names: transformers gives them those of the checkpoint, as it does for dense tensors.
        """
        state = dict(model.state_dict())
        saved: list[tuple[AwqLinear, tuple[str, ...]]] = [
            (linear, (path,)) for path, linear in self._plain_linears(model)
        ]
        for path, experts in self.placement.experts.items():
            for linear, names in _expert_linears(model.get_submodule(path), experts):
                # `path.17.up_proj` from `model.layers.3.mlp.experts.17.up_proj`
                saved.append((linear, tuple(f"{path}.{'.'.join(name.rsplit('.', 2)[1:])}" for name in names)))
        for linear, names in saved:
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
        for path, linear in self._plain_linears(model):
            yield linear, (self.placement.linears[path],)
        for path, experts in self.placement.experts.items():
            yield from _expert_linears(model.get_submodule(path), experts)

    def _plain_linears(self, model: Any) -> Iterator[tuple[str, AwqLinear]]:
        for path in self.placement.linears:
            yield path, model.get_submodule(path)


def _saved_as(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """(layout, quantization_config) with which a loaded checkpoint is saved again."""
    layout = checkpoint.layout if checkpoint.layout in WRITABLE else "gemm"
    try:
        return layout, quantization_config(checkpoint, layout)
    except LayoutCannotHold:  # several group sizes
        return "compressed-tensors", quantization_config(checkpoint, "compressed-tensors")


def _kept_dtype(plan: dict[str, torch.dtype], name: str) -> torch.dtype | None:
    """float32 where the architecture asks for it whatever the model's dtype, else None."""
    patterns = ((re.escape(key).replace(r"\*", ".*"), dtype) for key, dtype in plan.items())
    return next((dtype for pattern, dtype in patterns if re.search(pattern, name)), None)


def matrix(weight: AwqWeight, dtype: torch.dtype) -> Tensor:
    """The weight as a plain linear holds it, [N, K]."""
    return weight.dequantize().T.contiguous().to(dtype)


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


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
