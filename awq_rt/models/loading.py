"""`awq_rt.load`: a checkpoint as a transformers causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import registry
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import InvalidConfig, MissingTensor, ModelMismatch, RemoteCodeRefused, UnsupportedDevice

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    id_or_path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    kernel: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    group_size: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The model in a local folder or under a hub id, ready to `generate`, with its tokenizer as `model.tokenizer`.

    `device` defaults to the best one that an installed backend drives; `device_map` places layers on several, as in
    transformers. `dtype` (of activations and dense weights) defaults to float32 on a CPU, and elsewhere to the
    checkpoint's own if that is bfloat16, else float16. `backend` and `kernel` pin what is otherwise chosen for each
    linear. `group_size` is needed only where neither configuration nor tensors state it. `model_kwargs` go to
    transformers' `from_pretrained`.

    Raises a `CheckpointError`, `BackendError` or `UnsupportedDevice` that says what is wrong and what to do.
    """
    if backend is not None:
        registry.get(backend)
    if device is not None and device_map is not None:
        raise UnsupportedDevice(f"device {str(device)!r} and device_map {device_map!r} were both given; give one")
    if device_map is None:
        target = registry.default_device() if device is None else registry.checked_device(device)
        device_map = {"": target}
    checkpoint = open_checkpoint(id_or_path, revision=revision, token=token, group_size=group_size)
    return from_checkpoint(
        checkpoint,
        device_map=device_map,
        dtype=dtype,
        backend=backend,
        kernel=kernel,
        trust_remote_code=trust_remote_code,
        model_kwargs={"attn_implementation": attn_implementation, **model_kwargs},
    )


def from_checkpoint(
    checkpoint: Checkpoint,
    *,
    device_map: str | dict[str, Any],
    dtype: str | torch.dtype | None,
    backend: str | None,
    kernel: str,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
) -> Any:
    """The model of an open checkpoint. transformers gets the dense tensors; the packed ones never pass through it."""
    from transformers import GenerationConfig

    from .quantizer import AwqRtConfig

    config, model_class = _architecture(checkpoint, trust_remote_code)
    dense: dict[str, Tensor] = {name: checkpoint.view(name) for name in checkpoint.dense}
    plan = AwqRtConfig(checkpoint, dense, backend, kernel)
    if model_kwargs.get("attn_implementation") is None:
        model_kwargs.pop("attn_implementation", None)
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dense,
            quantization_config=plan,
            dtype=_dtype(dtype, checkpoint, device_map),
            device_map=device_map,
            output_loading_info=True,
            **model_kwargs,
        )
    except (ValueError, ImportError) as error:
        if "attn_implementation" in str(error) or "attention" in str(error).lower():
            wanted = model_kwargs.get("attn_implementation")
            raise InvalidConfig(f"attn_implementation {wanted!r} cannot be used: {error}") from error
        raise
    except RuntimeError as error:
        if "size mismatch" in str(error) or "ignore_mismatched_sizes" in str(error):
            raise ModelMismatch(f"{checkpoint.root}: {error}") from error
        raise
    if missing := sorted(report["missing_keys"]):
        raise MissingTensor(
            f"{checkpoint.root} lacks {len(missing)} tensors of {model_class.__name__}: {', '.join(missing[:5])}"
        )
    model.config.use_cache = True  # AutoAWQ saves false, which would compute the whole prompt again for every token
    model.config._name_or_path = model.name_or_path = str(checkpoint.root)
    if (checkpoint.root / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.root)
    model.generation_config.use_cache = True
    model.tokenizer = _tokenizer(checkpoint.root, trust_remote_code)
    return model


def _architecture(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """(configuration without its quantisation, model class). Code in the checkpoint is used only when asked for."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not checkpoint.config:
        raise InvalidConfig(f"{checkpoint.root} has no config.json; put that of the original model beside the weights")
    remote = checkpoint.config.get("auto_map", {})
    try:
        config = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if remote and not trust_remote_code:
            raise RemoteCodeRefused(
                f"{checkpoint.root} needs the Python code that comes with it ({', '.join(remote.values())}); "
                "read it, then pass trust_remote_code=True"
            ) from error
        raise ModelMismatch(f"{checkpoint.root}/config.json: {error}") from error
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    if trust_remote_code and "AutoModelForCausalLM" in remote:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return config, get_class_from_dynamic_module(remote["AutoModelForCausalLM"], str(checkpoint.root))
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return config, getattr(transformers, name)
    raise ModelMismatch(
        f"transformers {transformers.__version__} has no causal language model for {type(config).__name__} "
        f"(architectures {config.architectures}); a newer release may"
    )


def _dtype(dtype: str | torch.dtype | None, checkpoint: Checkpoint, device_map: str | dict[str, Any]) -> torch.dtype:
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if dtype is None and isinstance(device_map, dict) and all(_is_cpu(device) for device in device_map.values()):
        return torch.float32
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if own == "bfloat16" else torch.float16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InvalidConfig(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _is_cpu(device: Any) -> bool:
    return str(device) in ("cpu", "cpu:0", "disk")


def _tokenizer(root: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer, or None when it has none (a bare llm-awq pickle)."""
    from transformers import AutoTokenizer

    if not any((root / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(root, trust_remote_code=trust_remote_code)
