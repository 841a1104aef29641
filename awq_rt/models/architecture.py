"""Which transformers class config.json describes. The one place where a checkpoint's own code may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ..checkpoint import Checkpoint
from ..errors import InvalidConfig, ModelMismatch, RemoteCodeRefused


def architecture(checkpoint: Checkpoint, trust_remote_code: bool) -> tuple[Any, Any]:
    """(configuration without its quantisation, model class). Code in the checkpoint is used only when asked for.

    Raises `InvalidConfig`, `RemoteCodeRefused`, or `ModelMismatch` where transformers has no such model.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = _configuration(checkpoint, trust_remote_code)
    remote = _auto_map(checkpoint).get("AutoModelForCausalLM")
    if trust_remote_code and remote:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return config, get_class_from_dynamic_module(remote, str(checkpoint.root))
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for name in config.architectures or ():
        named = getattr(transformers, str(name), None)
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return config, named
    raise ModelMismatch(
        f"transformers {transformers.__version__} has no causal language model for {type(config).__name__} "
        f"(architectures {config.architectures}); a newer release may"
    )


def tokenizer(source: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """The tokenizer of a folder, None where it holds none, or of a hub id. What its library raises goes on."""
    from transformers import AutoTokenizer

    files = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if isinstance(source, Path) and not any((source / name).is_file() for name in files):
        return None
    return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def dense_model(source: str | Path, trust_remote_code: bool, **options: Any) -> Any:
    """The model of a checkpoint that is not quantised, as transformers loads it with `options`."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def _configuration(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not checkpoint.config:
        raise InvalidConfig(f"{checkpoint.root} has no config.json; put that of the original model beside the weights")
    remote = _auto_map(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint.root, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, StrictDataclassError) as error:
        if remote and not trust_remote_code:
            raise RemoteCodeRefused(
                f"{checkpoint.root} needs the Python code that comes with it ({', '.join(remote.values())}); "
                "read it, then pass trust_remote_code=True"
            ) from error
        raise ModelMismatch(f"{checkpoint.root}/config.json describes no model here: {error}") from error
    for holder in (config, config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
        _check_depth(holder, checkpoint)
        if any(name.rpartition(".")[2] == "lm_head" for name in checkpoint.linears):
            holder.tie_word_embeddings = False  # a packed head is a matrix of its own, whatever the original's was
    return config


def _check_depth(config: Any, checkpoint: Checkpoint) -> None:
    """Raise `ModelMismatch` where there are more layers than tensors: building them could take all time and memory."""
    depth, tensors = getattr(config, "num_hidden_layers", None), len(checkpoint.linears) + len(checkpoint.dense)
    if isinstance(depth, int) and depth > tensors:
        raise ModelMismatch(
            f"{checkpoint.root}/config.json says {depth} layers, but the checkpoint holds {tensors} tensors; "
            "take config.json from where the weights come from"
        )


def _auto_map(checkpoint: Checkpoint) -> dict[str, str]:
    """Where the checkpoint's own classes are. A value may be a list: slow and fast tokenizer."""
    found = checkpoint.config.get("auto_map")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidConfig(f"{checkpoint.root}/config.json has auto_map {found!r}; an object is expected")
    return {key: value for key, value in found.items() if isinstance(value, str)}
