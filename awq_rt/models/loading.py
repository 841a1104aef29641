"""`awq_rt.load`: a checkpoint as a transformers causal language model."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import parallel, registry, tripwire
from ..checkpoint import Checkpoint, open_checkpoint
from ..errors import AwqRtError, InvalidConfig, MissingTensor, ModelMismatch, UnsupportedDevice
from ..memory import collector_paused, trim
from .architecture import architecture, tokenizer
from .dense import DenseTensor
from .narrow import widen

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
"""transformers' words for a device map that is worked out."""

OURS = ("config", "state_dict", "quantization_config", "output_loading_info", "pretrained_model_name_or_path")
"""Arguments of transformers' `from_pretrained` that `load` itself gives."""

HUB = {"cache_dir": "HF_HOME", "local_files_only": "HF_HUB_OFFLINE=1"}
"""Arguments that would not reach the download, and the variables that do."""

ARCHITECTURES = ("transformers.models.", "transformers_modules.")
"""Where the classes of models are: transformers' own, and those that come with a checkpoint."""


@collector_paused()
def load(
    id_or_path: str | Path | Checkpoint,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str | None = None,
    kernel: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    tp_plan: str | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    group_size: int | None = None,
    fuse: bool | str | Mapping[str, Any] = "auto",
    max_seq_len: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The model in a local folder or file, under a hub id or of an open `Checkpoint` (for which `revision`, `token` and
    `group_size` say nothing), ready to `generate`, with `model.tokenizer`.

    `device` defaults to the best one that an installed backend drives; `device_map` places layers on several, and what
    has no room there in the host's memory or in `offload_folder`, as in transformers; `tp_plan="auto"` cuts each layer
    over several, with a process for each (`torchrun`). `dtype` (of
    activations and dense weights) defaults to float32 on a CPU, and elsewhere to the checkpoint's own if that is
    bfloat16, else float16. `backend` and `kernel` pin what is otherwise chosen for each linear. `group_size` is needed
    only where neither configuration nor tensors state it. `model_kwargs` go to transformers' `from_pretrained`.

    `fuse` decides how `generate` decodes greedily and by sampling: "auto" on a fused decoder with a captured step where
    the architecture allows, as transformers does elsewhere (`model.fusion` says which, and why); True makes what cannot
    be fused an error, False turns it off, and a mapping is AWQ's `modules_to_fuse` for architectures that are not
    recognised. `max_seq_len` allots memory for so many positions (prompt and answer) once; by default it grows.

    Raises a `CheckpointError`, `BackendError` or `UnsupportedDevice` that says what is wrong and what to do;
    NotImplementedError for an architecture whose experts awq_rt cannot keep in 4 bits.
    """
    dtype = _checked(model_kwargs, dtype)
    if backend is not None:
        registry.get(backend)
    group = None if tp_plan is None else parallel.start(tp_plan, device, device_map)
    places = _places(device, device_map) if group is None else {"": group.device}
    if isinstance(places, dict) and "disk" in places.values() and "offload_folder" not in model_kwargs:
        raise InvalidConfig("device_map puts modules on the disk; pass offload_folder=, a folder with room for them")
    if isinstance(id_or_path, Checkpoint):
        checkpoint, name = id_or_path, str(id_or_path.source)
    else:
        checkpoint = open_checkpoint(id_or_path, revision=revision, token=token, group_size=group_size)
        name = str(id_or_path)
    if attn_implementation is not None:
        model_kwargs["attn_implementation"] = attn_implementation
    model = _from_checkpoint(
        checkpoint, places, _dtype(dtype, checkpoint, places), backend, kernel, trust_remote_code, model_kwargs, group
    )
    if group is not None:
        parallel.connect(model, group)
    model.config._name_or_path = model.name_or_path = name
    model.tokenizer = _tokenizer(checkpoint.root, trust_remote_code)
    fuse_as_asked(model, fuse, max_seq_len, checkpoint.quantization.raw)
    if group is not None:
        parallel.attach(model, group)
    trim()
    return model


def fuse_as_asked(
    model: Any, fuse: bool | str | Mapping[str, Any], max_seq_len: int | None, stored: Mapping[str, Any]
) -> None:
    """Give the model a fused decoder, as asked for or, where nothing was, as its configuration says."""
    from .. import fusion, generation

    if tripwire.wanted():
        tripwire.attach(model)
        model.fusion = fusion.Fusion(None, (("model", f"{tripwire.VARIABLE} is set, and watches module by module"),))
        return
    if fuse == "auto" and isinstance(stored.get("modules_to_fuse"), dict):
        fuse = stored["modules_to_fuse"]
    if max_seq_len is None and isinstance(stored.get("fuse_max_seq_len"), int):
        max_seq_len = stored["fuse_max_seq_len"]
    model.fusion = fusion.fuse(model, fuse)
    if model.fusion.decoder is None:
        widen(model)  # nothing has tried that this architecture asks no more of them than to look up and multiply
    torch.cuda.empty_cache()  # what packing needed for a moment; nothing where there is no GPU in use
    if model.fusion.decoder is not None:
        generation.attach(model, model.fusion.decoder, max_seq_len)


def _from_checkpoint(
    checkpoint: Checkpoint,
    places: str | dict[str, Any],
    dtype: torch.dtype,
    backend: str | None,
    kernel: str,
    trust_remote_code: bool,
    model_kwargs: dict[str, Any],
    group: parallel.Group | None = None,
) -> Any:
    """The model of an open checkpoint. transformers gets the dense tensors; the packed ones never pass through it."""
    from .quantizer import AwqRtConfig

    config, model_class = architecture(checkpoint, trust_remote_code)
    dense = {name: DenseTensor(checkpoint, name) for name in checkpoint.dense}
    how = (checkpoint, dense, backend, kernel)
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=dense,
            quantization_config=AwqRtConfig(*how) if group is None else parallel.quantization_config(*how, group),
            dtype=dtype,
            device_map=places,
            output_loading_info=True,
            **model_kwargs,
        )
    except (ValueError, ImportError) as error:
        wanted = model_kwargs.get("attn_implementation")
        if wanted is not None and wanted in str(error):
            raise InvalidConfig(f"attn_implementation {wanted!r} cannot be used: {error}") from error
        raise
    except Exception as error:
        if isinstance(error, (ImportError, AwqRtError)) or not _in_an_architecture(error):
            raise
        raise ModelMismatch(
            f"{checkpoint.root}/config.json describes a {model_class.__name__} that cannot be built: {error}; "
            "take config.json from where the weights come from"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise MissingTensor(f"{checkpoint.root} lacks {', '.join(missing[:5])} of {model_class.__name__}")
    if mismatched := sorted(report["mismatched_keys"]):
        raise ModelMismatch(f"{checkpoint.root}: {mismatched[0]} has another size than config.json makes it")
    model.config.use_cache = True  # AutoAWQ saves false, which would compute the whole prompt again for every token
    _set_generation_config(model, checkpoint.root)
    return model


def _in_an_architecture(error: Exception) -> bool:
    """Whether it was raised while a class of transformers' models was at work, which makes modules of numbers."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(str(frame.f_globals.get("__name__")).startswith(ARCHITECTURES) for frame, _ in frames)


def _checked(model_kwargs: dict[str, Any], dtype: str | torch.dtype | None) -> str | torch.dtype | None:
    """The dtype, under transformers' old name too. Raises TypeError for arguments that could not have their meaning."""
    for name in model_kwargs:
        if name in OURS:
            raise TypeError(f"load() makes {name!r} itself; change the checkpoint's config.json instead")
        if name in HUB:
            raise TypeError(f"load() has no argument {name!r}; set the environment variable {HUB[name]}")
    if "torch_dtype" in model_kwargs:
        old = model_kwargs.pop("torch_dtype")
        return old if dtype is None else dtype
    return dtype


def _places(device: str | torch.device | None, device_map: str | dict[str, Any] | None) -> str | dict[str, Any]:
    """A device map for transformers. Without a GPU that a backend drives, every word for one means the CPU."""
    if device is not None and device_map is not None:
        raise UnsupportedDevice(f"device {str(device)!r} and device_map {device_map!r} were both given; give one")
    if device is not None:
        return {"": registry.checked_device(device)}
    if device_map is None or device_map in PLACEMENTS:
        best = registry.default_device()
        return {"": best} if device_map is None or best.type == "cpu" else device_map
    if isinstance(device_map, dict):
        return device_map
    return {"": registry.checked_device(device_map)}


def _dtype(dtype: str | torch.dtype | None, checkpoint: Checkpoint, places: str | dict[str, Any]) -> torch.dtype:
    own = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if dtype is None and isinstance(places, dict) and {*map(str, places.values())} <= {"cpu", "cpu:0", "disk"}:
        return torch.float32
    if dtype is None:
        return torch.bfloat16 if own == "bfloat16" else torch.float16
    if dtype == "auto":
        return DTYPES.get(str(own), torch.float16)
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise InvalidConfig(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _set_generation_config(model: Any, root: Path) -> None:
    from transformers import GenerationConfig

    path = root / "generation_config.json"
    if path.is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(root)
        except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise InvalidConfig(f"{path} cannot be used ({error}); correct or remove it") from error
    model.generation_config.use_cache = True


def _tokenizer(root: Path, trust_remote_code: bool) -> Any:
    """The checkpoint's tokenizer; None when it has none, and with a warning when it cannot be used."""
    try:
        return tokenizer(root, trust_remote_code)
    except Exception as error:  # tokenizers raise whatever their library does; the model is whole without one
        warnings.warn(f"{root}: the tokenizer cannot be used, so model.tokenizer is None: {error}", stacklevel=3)
        return None
