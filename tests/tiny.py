"""Tiny random transformers models as 4-bit checkpoints, beside the dense model that they must agree with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.core_model_loading import revert_weight_conversion

from awq_rt.conversion import describe, stored_tensors
from awq_rt.rounding import round_to_nearest

GROUP_SIZE = 32

COMMON = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_local_experts": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, **HEADS},
    "mistral": {**COMMON, **HEADS},
    "qwen2": {**COMMON, **HEADS, "tie_word_embeddings": True},
    "qwen3": {**COMMON, **HEADS, "head_dim": 16},
    "phi3": {**COMMON, **HEADS, "pad_token_id": 0},
    "gemma2": {**COMMON, **HEADS, "head_dim": 16},
    "stablelm": {**COMMON, **HEADS},
    "cohere": {**COMMON, **HEADS},
    "starcoder2": {**COMMON, **HEADS},
    "opt": {
        "vocab_size": 128,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
    },
    "bloom": {"vocab_size": 128, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"vocab_size": 128, "d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "falcon": {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "tie_word_embeddings": False},
    "gpt_neox": {**COMMON, "num_attention_heads": 4},
    "gpt_bigcode": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "mixtral": {**COMMON, **HEADS, **MIXTURE},
    "qwen2_moe": {**COMMON, **HEADS, **MIXTURE, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**COMMON, **HEADS, **MIXTURE, "head_dim": 16},
    "deepseek_v2": {
        **COMMON,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
}


SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TEXT = {**COMMON, **HEADS, **SPECIAL}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 28, "patch_size": 14}

VISION_FAMILIES: dict[str, dict[str, Any]] = {  # on disk their text model has other names than in transformers
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **VISION, **IMAGE},
        "image_token_index": 120,
    },
    "gemma3": {"text_config": {**TEXT, "head_dim": 16}, "vision_config": {**VISION, **IMAGE}},
    "qwen2_vl": {
        "text_config": {
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64},
        "image_token_id": 120,
        "video_token_id": 121,
        "vision_start_token_id": 122,
        "vision_end_token_id": 123,
    },
}
ALL_FAMILIES = (*FAMILIES, *VISION_FAMILIES)


def config_of(family: str) -> Any:
    if family in VISION_FAMILIES:
        return AutoConfig.for_model(family, **copy.deepcopy(VISION_FAMILIES[family]))
    return AutoConfig.for_model(family, **{**SPECIAL, **FAMILIES[family]})


def packable(name: str, tensor: Tensor) -> bool:
    """What AWQ tools quantise: matrices inside decoder blocks, routers excepted."""
    inside = any(f".{part}." in name for part in ("layers", "h", "blocks")) and "vis" not in name
    router = name.endswith((".gate.weight", ".shared_expert_gate.weight"))
    fits = tensor.dim() == 2 and tensor.shape[0] % 8 == 0 and tensor.shape[1] % GROUP_SIZE == 0
    return name.endswith(".weight") and inside and fits and not router


def rounded(tensor: Tensor) -> Tensor:
    return tensor.half().to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()


def build(
    folder: Path,
    config: Any,
    *,
    layout: str = "gemm",
    choose: Callable[[str, Tensor], bool] = packable,
    extra: dict[str, Tensor] | None = None,
) -> Any:
    """Write a random model of `config` to `folder` in 4 bits; returns the dense model with the same weights."""
    torch.manual_seed(0)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and config.model_type not in VISION_FAMILIES
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are initialised to constants, which would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    tied = set(model.all_tied_weights_keys)
    # Dense tensors are in float16 on disk, as in nearly every checkpoint, so that loading has to cast them.
    dense = {name: rounded(tensor) for name, tensor in model.state_dict().items() if name not in tied}
    dense = {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, dense).items()}
    stored = dict(extra or {})
    chosen = [name for name, tensor in dense.items() if choose(name, tensor)]
    for name in chosen:
        prefix = name.removesuffix(".weight")
        bias = dense.get(f"{prefix}.bias")
        weight = round_to_nearest(dense[name], GROUP_SIZE, bias=bias)
        stored.update({f"{prefix}.{suffix}": t.contiguous() for suffix, t in stored_tensors(weight, layout).items()})
        dense[name] = weight.dequantize().T.contiguous()
    for name, tensor in dense.items():
        if name not in chosen and f"{name.removesuffix('.bias')}.weight" not in chosen:
            stored[name] = tensor.half() if tensor.is_floating_point() else tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": describe(layout, GROUP_SIZE, dense=[])}
    written["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(written))
    return type(model).from_pretrained(None, config=config, state_dict={**dense, **(extra or {})}).eval()


TOKENS = torch.arange(3, 35).view(2, 16)


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


def assert_agree(model: Any, dense: Any) -> None:
    """Equal up to the order of float32 additions, a few units of 2^-24 of the largest logit a layer."""
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() < 2e-5 * expected.abs().max()
