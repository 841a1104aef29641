"""Tiny random transformers models as 4-bit checkpoints, beside the dense model that they must agree with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
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


def config_of(family: str) -> Any:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(family, **{**special, **FAMILIES[family]})


def packable(name: str, tensor: Tensor) -> bool:
    """What AWQ tools quantise: matrices inside decoder blocks, routers excepted."""
    inside = any(f".{part}." in name for part in ("layers", "h", "blocks"))
    router = name.endswith((".gate.weight", ".shared_expert_gate.weight"))
    fits = tensor.dim() == 2 and tensor.shape[0] % 8 == 0 and tensor.shape[1] % GROUP_SIZE == 0
    return name.endswith(".weight") and inside and fits and not router


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
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are initialised to constants, which would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    tied = set(model.all_tied_weights_keys)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
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
            stored[name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    written = config.to_dict() | {"quantization_config": describe(layout, GROUP_SIZE, dense=[])}
    written["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(written))
    return type(model).from_pretrained(None, config=config, state_dict={**dense, **(extra or {})}).eval()
