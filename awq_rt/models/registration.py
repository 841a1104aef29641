"""`register` and `unregister`: transformers' own `from_pretrained` loads 4-bit checkpoints on awq_rt.

transformers finds the loader of a quantised checkpoint in two dictionaries and discovers none by itself, so what is
there for AWQ, compressed-tensors and auto-round is replaced, and put back by `unregister`. Checkpoints of the latter
two that are not 4-bit AWQ by another name still go to the loader that was there.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import AwqConfig, QuantizationConfigMixin

from .. import registry
from ..checkpoint import Checkpoint
from ..checkpoint.config import parse
from ..checkpoint.files import CheckpointFiles
from ..errors import BackendError, InvalidConfig, NotQuantized, UnsupportedFormat
from ..warmup import spec_of
from .awq_config import widened, wishes_of
from .loading import fuse_as_asked
from .placement import DOWN, GATE_UP
from .quantizer import AwqRtConfig, AwqRtQuantizer, matrix

_undo: list[Callable[[], None]] = []
"""What `unregister` calls, the last first. Empty while awq_rt is not registered."""


def register() -> None:
    """Let transformers' `from_pretrained` load AWQ checkpoints, compressed-tensors' 4-bit ones among them, on awq_rt.

    `AwqConfig` takes the versions, `do_fuse`, `fuse_max_seq_len` and `modules_to_fuse` of transformers 4 again, and
    PEFT, where it is installed, puts LoRA beside awq_rt's linears. Calling it again changes nothing.
    """
    if _undo:
        return
    _put(QUANTIZERS, "awq", RegisteredQuantizer)
    for method in ("compressed-tensors", "auto-round"):
        _put(QUANTIZERS, method, _ahead_of(QUANTIZERS[method]))
    if importlib.util.find_spec("compressed_tensors") is None:
        _put(CONFIGS, "compressed-tensors", StatedConfig)
    for name, function in widened().items():
        _put(AwqConfig, name, function)
    if importlib.util.find_spec("peft") is not None:
        from .. import adapters

        for module, name, function in adapters.dispatching():
            _put(module, name, function)


def unregister() -> None:
    """Put everything that `register` changed back. Models that were loaded meanwhile go on working."""
    while _undo:
        _undo.pop()()


def _put(holder: Any, name: str, value: Any) -> None:
    """Set an entry of a dictionary, or an attribute, and remember what was there."""
    if isinstance(holder, dict):
        before = holder[name]
        holder[name] = value
        _undo.append(lambda: holder.__setitem__(name, before))
        return
    own = name in vars(holder)  # an inherited method is not set again, but uncovered
    before = getattr(holder, name)
    setattr(holder, name, value)
    _undo.append(lambda: setattr(holder, name, before) if own else delattr(holder, name))


class StatedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A compressed-tensors configuration as it stands in config.json, for where that library is not installed."""

    def __init__(self, **stated: Any):
        self.__dict__.update(stated)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class RegisteredQuantizer(AwqRtQuantizer):
    """The hook for `from_pretrained` called by a user: the files, the dtype and the places are transformers' choice."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        if not kwargs.get("pre_quantized", True):
            raise NotQuantized(
                "quantization_config was passed for a checkpoint whose config.json has none; it says how a 4-bit "
                "checkpoint is loaded. awq_rt.quantize makes one of a dense model, and awq_rt.load reads those whose "
                "config.json is silent"
            )
        super().__init__(quantization_config, **kwargs)
        self._method = quantization_config.quant_method
        self._wishes = wishes_of(quantization_config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        if not files:
            raise InvalidConfig("a 4-bit model is loaded from files; pass from_pretrained a folder or a hub id")
        with torch.device("cpu"):  # the model is being built on the meta device
            checkpoint = Checkpoint(CheckpointFiles(files[0].parent, files[0].parent, tuple(files), None))
        self.quantization_config = AwqRtConfig(checkpoint, {}, method=self._method)
        self._put_in_place(model, new_heads=True)
        self._place(model, kwargs.get("device_map"))
        self._wanted = self._wanted_dtypes(model)
        for path in self.placement.linears:  # a packed head is tied to nothing, whatever the original's was
            if model.all_tied_weights_keys.pop(f"{path}.weight", None) is not None:
                model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
        model._keys_to_ignore_on_load_unexpected |= _read_elsewhere(checkpoint, self.placement.linears)
        model._keys_to_ignore_on_load_missing |= {rf"^{re.escape(target)}$" for target in self.placement.dense.values()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        checkpoint = self._checkpoint()
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point():  # older releases (5.16, 5.17) leave what they rename as it is in the file
                tensor.data = tensor.data.to(self._wanted.get(name, tensor.dtype))
        state = model.state_dict()
        for name, target in self.placement.dense.items():
            if state[target].is_meta:
                raise NotImplementedError(
                    f"{target} is packed in the checkpoint and dense in the model, and device_map offloads it; name a "
                    "device for it in device_map, or load the model with awq_rt.load"
                )
            state[target].copy_(matrix(checkpoint[name], self._wanted[target]))
        self.quantization_config.kernel = self._kernel(model, checkpoint)
        super()._process_model_after_weight_loading(model, **kwargs)
        if checkpoint.config.get("use_cache") is False:  # left by AutoAWQ; it would read the prompt for every token
            model.config.use_cache = True
            if model.generation_config is not None:
                model.generation_config.use_cache = True
        if model.can_generate():
            fuse_as_asked(model, self._wishes.fuse, self._wishes.max_seq_len, checkpoint.quantization.raw)
        return model

    def _kernel(self, model: Any, checkpoint: Checkpoint) -> str:
        """The family that was asked for where it serves the whole model, else "auto", with a warning."""
        wanted = self._wishes.kernel
        if wanted == "auto":
            return wanted
        try:
            for linear, names in self._linears(model):
                spec = spec_of([checkpoint.linears[name] for name in names], self.dtype, wanted)
                registry.select(spec, registry.device_for(linear.packed_0.device))
        except BackendError as error:
            warnings.warn(
                f"the kernels {wanted!r} that AwqConfig asks for do not serve this model here; each linear gets what "
                f"suits it: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return "auto"
        return wanted


def _ahead_of(before: type[HfQuantizer]) -> type[HfQuantizer]:
    """A class that makes the quantizer `before` for whatever awq_rt does not read."""

    class Chosen(RegisteredQuantizer):
        def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
            if _is_ours(quantization_config):
                return super().__new__(cls)
            return before(quantization_config, **kwargs)

    return Chosen


def _is_ours(config: Any) -> bool:
    """Whether a configuration describes 4-bit weights that are to stay in 4 bits."""
    if getattr(config, "dequantize", False):
        return False
    method = getattr(config.quant_method, "value", config.quant_method)
    try:
        parse({**config.to_dict(), "quant_method": method}, "quantization_config")
    except (UnsupportedFormat, InvalidConfig):
        return False
    return True


def _read_elsewhere(checkpoint: Checkpoint, linears: dict[str, str]) -> set[str]:
    """Patterns of the tensors that transformers meets in the files, cannot place and need not: awq_rt reads them.

    Under the names that transformers gives them: it knows the experts' by their beginning, and fuses it.
    """
    suffixes = {suffix for linear in checkpoint.linears.values() for suffix in linear.tensors} - {"bias"}
    fused = {suffix.removeprefix("weight") for suffix in suffixes if suffix.startswith("weight_")}
    patterns = {rf"\.({'|'.join(sorted(suffixes))})$"}
    if fused:
        patterns.add(rf"({GATE_UP}|{DOWN})({'|'.join(sorted(fused))})$")
    biases = [path for path, name in linears.items() if checkpoint.linears[name].bias]
    biases += [name for name, linear in checkpoint.linears.items() if linear.bias]
    if biases:
        patterns.add(rf"^({'|'.join(re.escape(name) for name in sorted(set(biases)))})\.bias$")
    return patterns
