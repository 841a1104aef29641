"""The definitions of the fused operators: transformers' own functions say the same, and float64 agrees."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import exact_ops
import pytest
import torch
from exact_ops import layer
from torch import Tensor
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config
from transformers.activations import ACT2FN
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen3 import modeling_qwen3

from awq_rt import ops
from awq_rt.ops import AttentionSpec, AttentionTensors, Ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIXTEEN = DTYPES[1:]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_norms_agree_with_float64(dtype: torch.dtype) -> None:
    x, weight = normal(5, 264, dtype=dtype) * 3, normal(264)
    assert exact_ops.rms_norm(x, weight, 1e-5).excess(ops.rms_norm(x, weight, 1e-5)) <= 1
    residual = normal(5, 264, dtype=dtype, seed=1)
    expected = residual + x
    y = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected)
    assert exact_ops.rms_norm(expected, weight, 1e-5).excess(y) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_logit_is_the_first_of_equal_ones_and_nan_is_larger(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1, 5, 5, -torch.inf], [-torch.inf] * 4, [0, torch.nan, torch.inf, 9], [-0.0, 0.0, -1, -2]])
    assert ops.argmax(logits.to(dtype)).tolist() == [1, 0, 1, 0]


def test_the_norm_is_transformers_own() -> None:
    x, weight = normal(5, 64), normal(64)
    for module, given in (
        (modeling_llama.LlamaRMSNorm(64, 1e-5), weight),
        (modeling_gemma2.Gemma2RMSNorm(64, 1e-5), 1 + weight),
    ):
        module.weight.data.copy_(weight)
        torch.testing.assert_close(ops.rms_norm(x, given, 1e-5), module(x).detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gated_activations_agree_with_float64(activation: str, dtype: torch.dtype) -> None:
    gate_up = normal(3, 512, dtype=dtype) * 4
    y = ops.gated_activation(gate_up, activation)
    exact = exact_ops.gated_activation(gate_up, activation)
    assert exact.excess(y) <= 1
    assert exact.excess(ops.gated_activation(gate_up.flip(1), activation)) > 1


@pytest.mark.parametrize(
    ("ours", "theirs"), [("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu")]
)
def test_activations_are_transformers_own(ours: str, theirs: str) -> None:
    gate_up = normal(3, 64)
    gate, up = gate_up.chunk(2, dim=1)
    torch.testing.assert_close(ops.gated_activation(gate_up, ours), ACT2FN[theirs](gate) * up, rtol=1e-6, atol=1e-6)


SPECS = {
    "whole head": AttentionSpec(4, 4, 64, 0.125, 64),
    "grouped": AttentionSpec(6, 2, 80, 80**-0.5, 80),
    "partial": AttentionSpec(4, 2, 64, 0.125, 32),
    "interleaved": AttentionSpec(4, 4, 64, 0.125, 48, interleaved=True),
    "normed": AttentionSpec(4, 2, 64, 0.125, 64, norm_eps=1e-6),
    "window": AttentionSpec(4, 2, 64, 0.125, 64, window=7),
    "softcap": AttentionSpec(4, 2, 64, 0.125, 64, softcap=5.0),
    "no rotation": AttentionSpec(4, 2, 64, 0.125),
}


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("name", SPECS)
def test_attention_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    made = layer(SPECS[name], [20, 0, 3], 24, dtype, slopes=name == "no rotation")
    assert made.excess(ops.decode_attention(*made.arguments)) <= 1


@pytest.mark.parametrize("name", SPECS)
def test_steps_one_by_one_are_a_prefill(name: str) -> None:
    spec = replace(SPECS[name], window=None)
    made = layer(spec, [0, 0], 12, torch.float32)
    tokens = normal(2, 12, made.qkv.shape[1])
    stepwise = [cache.clone() for cache in (made.k_cache, made.v_cache)]
    for step in range(12):
        at = torch.full((2,), step, dtype=torch.int32)
        ops.decode_attention(tokens[:, step], at, *stepwise, spec, made.tensors)
    ops.rope_append(tokens, made.positions, made.k_cache, made.v_cache, spec, made.tensors)
    torch.testing.assert_close(stepwise[0], made.k_cache, rtol=1e-6, atol=1e-6)
    assert torch.equal(stepwise[1], made.v_cache)


def test_a_chunk_lands_behind_what_is_there() -> None:
    spec = SPECS["grouped"]
    made = layer(spec, [0, 0], 12, torch.float32)
    tokens, start = normal(2, 12, made.qkv.shape[1]), torch.zeros(2, dtype=torch.int32)
    chunked = [cache.clone() for cache in (made.k_cache, made.v_cache)]
    whole = ops.rope_append(tokens, start, made.k_cache, made.v_cache, spec, made.tensors)
    parts = [
        ops.rope_append(tokens[:, :5].contiguous(), start, *chunked, spec, made.tensors),
        ops.rope_append(tokens[:, 5:].contiguous(), start + 5, *chunked, spec, made.tensors),
    ]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(chunked[0], made.k_cache)


def prefilled(
    spec: AttentionSpec, tensors: AttentionTensors, tokens: Tensor, slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `tokens` [B, T, features] as the definitions place them, in caches of `slots`."""
    caches = [torch.full((len(tokens), spec.kv_heads, slots, spec.head_dim), torch.nan) for _ in range(2)]
    first = torch.zeros(len(tokens), dtype=torch.int32)
    return ops.rope_append(tokens, first, *caches, spec, tensors), *caches


def tables(config: Any, positions: int, module: Any) -> AttentionTensors:
    """The cos and sin that transformers computes, one of each pair."""
    rotary = module(config)
    at = torch.arange(positions)[None]
    cos, sin = rotary(torch.zeros(1), at)
    half = cos.shape[-1] // 2
    return AttentionTensors(cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())


COMMON = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 1,
}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen 3", "gemma 2"])
def test_a_step_is_transformers_own_attention(name: str) -> None:
    """The layer of transformers on all tokens; its last token is a step of ours."""
    kinds: dict[str, tuple[Any, Any, str, dict[str, Any], dict[str, Any]]] = {
        "llama": (modeling_llama, LlamaConfig, "Llama", {}, {}),
        "mistral": (modeling_mistral, MistralConfig, "Mistral", {"sliding_window": 5}, {"window": 5}),
        "qwen 3": (modeling_qwen3, Qwen3Config, "Qwen3", {}, {"norm_eps": 1e-6}),
        "gemma 2": (
            modeling_gemma2,
            Gemma2Config,
            "Gemma2",
            {"sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 100},
            {"window": 5, "softcap": 3.0, "scale": 0.1},
        ),
    }
    module, config_class, prefix, extra, ours = kinds[name]
    config = config_class(**COMMON, **extra, attn_implementation="eager")
    torch.manual_seed(0)
    theirs = getattr(module, f"{prefix}Attention")(config, layer_idx=0).eval()
    count = 12
    table = tables(config, count, getattr(module, f"{prefix}RotaryEmbedding"))
    spec = AttentionSpec(**{"heads": 4, "kv_heads": 2, "head_dim": 64, "scale": 0.125, "rotary_dim": 64} | ours)
    tensors = table
    if name == "qwen 3":
        for norm in (theirs.q_norm, theirs.k_norm):
            norm.weight.data.copy_(normal(64, seed=3))
        tensors = replace(table, q_norm=theirs.q_norm.weight.data, k_norm=theirs.k_norm.weight.data)
    hidden = normal(2, count, 256, seed=4)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    unseen = (distance < 0) | (distance >= (spec.window or count))
    mask = torch.zeros(count, count).masked_fill(unseen, torch.finfo(torch.float32).min)[None, None]
    both = (torch.cat((t, t), dim=-1)[None] for t in (table.cos, table.sin))
    theirs.o_proj = torch.nn.Identity()
    with torch.no_grad():
        expected, _ = theirs(hidden, position_embeddings=tuple(both), attention_mask=mask)
        qkv = torch.cat((theirs.q_proj(hidden), theirs.k_proj(hidden), theirs.v_proj(hidden)), dim=-1)
    _, k_cache, v_cache = prefilled(spec, tensors, qkv[:, :-1], count + 3)
    at = torch.full((2,), count - 1, dtype=torch.int32)
    y = ops.decode_attention(qkv[:, -1].contiguous(), at, k_cache, v_cache, spec, tensors)
    torch.testing.assert_close(y, expected[:, -1], rtol=1e-5, atol=1e-5)


def test_interleaved_rotation_is_gptjs() -> None:
    spec, count = AttentionSpec(4, 4, 64, 0.125, 32, interleaved=True), 9
    angles = modeling_gptj.create_sinusoidal_positions(count, 32)
    sin, cos = angles.chunk(2, dim=1)
    tokens = normal(2, count, 12 * 64)
    q, k_cache, _ = prefilled(spec, AttentionTensors(cos.contiguous(), sin.contiguous()), tokens, count)
    for found, raw in zip((q, k_cache), exact_ops.heads_of(tokens, spec), strict=False):
        turned = modeling_gptj.apply_rotary_pos_emb(
            raw[..., :32].transpose(1, 2), sin[None].expand(2, -1, -1), cos[None].expand(2, -1, -1)
        )
        expected = torch.cat((turned.transpose(1, 2), raw[..., 32:]), dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_operator_that_declines_falls_back() -> None:
    asked = []

    def own(x: Tensor, weight: Tensor, eps: float) -> Any:
        asked.append(len(x))
        return NotImplemented if len(x) > 1 else x * 0 + 7

    chosen = Ops(SimpleNamespace(ops={"rms_norm": own}))
    weight = torch.ones(8)
    assert torch.equal(chosen.rms_norm(normal(1, 8), weight, 1e-5), torch.full((1, 8), 7.0))
    x = normal(2, 8)
    assert torch.equal(chosen.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    assert asked == [1, 2]
    assert chosen.gated_activation is ops.gated_activation


def test_the_reference_backend_runs_the_definitions() -> None:
    from awq_rt_reference import backend

    chosen = Ops(backend)
    assert {name: getattr(chosen, name) for name in ops.DEFINITIONS} == ops.DEFINITIONS
