"""Scaling groups of every family: found by trying, complete, and without effect on what a block computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import some_tokens, write_dense
from tiny import ALL_FAMILIES
from torch import Tensor, nn

from awq_rt.quantization.groups import TOKENS, ScalingGroup, apply_scales, find_structure
from awq_rt.quantization.source import DenseSource
from awq_rt.quantization.streaming import Block, Call, StreamedModel

QKV = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
GATED = {"mlp.gate_proj", "mlp.up_proj"}
PLAIN = {
    "input_layernorm": QKV,
    "post_attention_layernorm": GATED,
    "self_attn.v_proj": {"self_attn.o_proj"},
    "mlp.up_proj": {"mlp.down_proj"},
}
ATTENTION = {name: PLAIN[name] for name in ("input_layernorm", "self_attn.v_proj")}
ROUTED = {f"mlp.experts.gate_up.{number}" for number in range(4)}
EXPERTS = {f"mlp.experts.gate_up.{number}": {f"mlp.experts.down.{number}"} for number in range(4)}

EXPECTED: dict[str, dict[str, set[str]]] = {  # of the last block: producer -> consumers
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "stablelm", "llava", "qwen2_vl"), PLAIN),
    "gemma2": {**ATTENTION, "pre_feedforward_layernorm": GATED, "mlp.up_proj": {"mlp.down_proj"}},
    "gemma3": {**ATTENTION, "pre_feedforward_layernorm": GATED, "mlp.up_proj": {"mlp.down_proj"}},
    "phi3": {
        "input_layernorm": {"self_attn.qkv_proj"},
        "post_attention_layernorm": {"mlp.gate_up_proj"},
        "self_attn.qkv_proj": {"self_attn.o_proj"},
        "mlp.gate_up_proj": {"mlp.down_proj"},
    },
    "cohere": {**PLAIN, "input_layernorm": QKV | GATED, "post_attention_layernorm": set()},
    "starcoder2": {**ATTENTION, "post_attention_layernorm": {"mlp.c_fc"}, "mlp.act": {"mlp.c_proj"}},
    "opt": {
        "self_attn_layer_norm": QKV,
        "final_layer_norm": {"fc1"},
        "self_attn.v_proj": {"self_attn.out_proj"},
        "fc1": {"fc2"},
    },
    "bloom": {
        "input_layernorm": {"self_attention.query_key_value"},
        "post_attention_layernorm": {"mlp.dense_h_to_4h"},
        "self_attention.query_key_value": {"self_attention.dense"},
        "mlp.gelu_impl": {"mlp.dense_4h_to_h"},
    },
    "mpt": {
        "norm_1": {"attn.Wqkv"},
        "norm_2": {"ffn.up_proj"},
        "attn.Wqkv": {"attn.out_proj"},
        "ffn.act": {"ffn.down_proj"},
    },
    "falcon": {
        "input_layernorm": {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        "self_attention.query_key_value": {"self_attention.dense"},
    },
    "gptj": {
        "ln_1": {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"},
        "attn.v_proj": {"attn.out_proj"},
        "mlp.act": {"mlp.fc_out"},
    },
    "gpt_neox": {
        "input_layernorm": {"attention.query_key_value"},
        "post_attention_layernorm": {"mlp.dense_h_to_4h"},
        "attention.query_key_value": {"attention.dense"},
        "mlp.act": {"mlp.dense_4h_to_h"},
    },
    "gpt_bigcode": {
        "ln_1": {"attn.c_attn"},
        "ln_2": {"mlp.c_fc"},
        "attn.c_attn": {"attn.c_proj"},
        "mlp.act": {"mlp.c_proj"},
    },
    "mixtral": {**ATTENTION, **EXPERTS, "post_attention_layernorm": {"mlp.gate"} | ROUTED},
    "qwen3_moe": {**ATTENTION, **EXPERTS, "post_attention_layernorm": {"mlp.gate"} | ROUTED},
    "qwen2_moe": {
        **ATTENTION,
        **EXPERTS,
        "post_attention_layernorm": {
            "mlp.gate", "mlp.shared_expert_gate", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", *ROUTED,
        },
        "mlp.shared_expert.up_proj": {"mlp.shared_expert.down_proj"},
    },
    "deepseek_v2": {
        **EXPERTS,
        "input_layernorm": {"self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"},
        "self_attn.q_a_layernorm": {"self_attn.q_b_proj"},
        "self_attn.kv_a_layernorm": {"self_attn.kv_b_proj"},
        "self_attn.kv_b_proj": {"self_attn.o_proj"},
        "post_attention_layernorm": {
            "mlp.gate", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj", *ROUTED,
        },
        "mlp.shared_experts.up_proj": {"mlp.shared_experts.down_proj"},
    },
}  # fmt: skip

EPS = torch.finfo(torch.float32).eps


class Loaded:
    """A family's model with its last block in memory."""

    def __init__(self, folder: Path, family: str):
        write_dense(folder, family)
        self.streamed = StreamedModel(DenseSource(folder), torch.device("cpu"))
        hidden, calls = self.streamed.embed(torch.tensor(some_tokens(1, TOKENS)))
        for block, call in list(zip(self.streamed.blocks, calls, strict=True))[:-1]:
            with self.streamed.loaded(block), torch.no_grad():
                hidden = call(block.module, hidden)
        self.hidden: Tensor = hidden
        self.call: Call = calls[-1]
        self.block: Block = self.streamed.blocks[-1]

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.call(self.block.module, self.hidden.clone())


@pytest.fixture
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Loaded]:
    made = Loaded(tmp_path / "dense", request.param)
    with made.streamed.loaded(made.block):
        yield made


def groups_of(loaded: Loaded) -> tuple[ScalingGroup, ...]:
    return find_structure(loaded.block.module, loaded.call, loaded.hidden, loaded.streamed.config).groups


def smooth(loaded: Loaded, groups: tuple[ScalingGroup, ...]) -> None:
    generator = torch.Generator().manual_seed(7)
    for group in groups:
        apply_scales(loaded.block.module, group, torch.randn(group.size, generator=generator).mul(0.7).exp())


def tolerance(loaded: Loaded) -> float:
    """Eight times what it does to the output to move every weight by as much as smoothing rounds it.

    Smoothing multiplies a weight once and divides its producer once, each rounded: 2 * eps / 2 in all. The output's
    answer to errors of that size is measured, with random signs; a sum of other such errors is within a few of it.
    """
    before = loaded.output()
    generator = torch.Generator().manual_seed(3)
    saved = {name: p.clone() for name, p in loaded.block.module.named_parameters()}
    with torch.no_grad():
        for parameter in loaded.block.module.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(EPS * signs * parameter.abs().clamp_min(1e-3))
    moved = float((loaded.output() - before).abs().max())
    with torch.no_grad():
        for name, parameter in loaded.block.module.named_parameters():
            parameter.copy_(saved[name])
    return 8 * max(moved, EPS * float(before.abs().max()))


@pytest.mark.parametrize("loaded", ALL_FAMILIES, indirect=True)
def test_smoothing_alone_changes_nothing(loaded: Loaded, request: pytest.FixtureRequest) -> None:
    family = request.node.callspec.params["loaded"]
    weights = {name: p.clone() for name, p in loaded.block.module.named_parameters()}
    groups = groups_of(loaded)
    assert all(torch.equal(p, weights[name]) for name, p in loaded.block.module.named_parameters())
    expected = {producer: consumers for producer, consumers in EXPECTED[family].items() if consumers}
    assert {group.producer: set(group.consumers) for group in groups} == expected

    before, allowed = loaded.output(), tolerance(loaded)
    smooth(loaded, groups)
    assert float((loaded.output() - before).abs().max()) <= allowed
    # One channel of one consumer that was forgotten is seen.
    spoilt: Any = loaded.block.module.get_submodule(groups[0].consumers[-1])
    with torch.no_grad():
        spoilt.weight[:, 5] *= 1.5
    assert float((loaded.output() - before).abs().max()) > allowed


@pytest.mark.parametrize("loaded", ["llama"], indirect=True)
def test_heads_of_o_that_share_one_of_v_share_its_scales(loaded: Loaded) -> None:
    (group,) = (group for group in groups_of(loaded) if group.producer == "self_attn.v_proj")
    assert group.channels is not None
    head = torch.arange(16)
    assert group.channels.tolist() == torch.cat([head, head, head + 16, head + 16]).tolist()


@pytest.mark.parametrize("loaded", ["llama"], indirect=True)
def test_a_norm_that_something_else_reads_too_is_left_alone(loaded: Loaded) -> None:
    norm: Any = loaded.block.module.input_layernorm
    attention: Any = loaded.block.module.self_attn
    forward = attention.forward
    attention.forward = lambda hidden_states, **kwargs: (  # the norm's output goes on beside the attention
        forward(hidden_states=hidden_states, **kwargs)[0] + hidden_states,
        None,
    )
    found = {group.producer for group in groups_of(loaded)}
    assert "input_layernorm" not in found
    assert "post_attention_layernorm" in found
    assert norm.weight.isfinite().all()


class Odd(nn.Module):
    """A decoder block that no table knows: two linears read a norm, and what they make is multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.left, self.right, self.out = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)
        self.lonely = nn.Linear(32, 32)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        return hidden + self.out(torch.tanh(self.left(x)) * self.right(x)) + self.lonely(torch.sin(hidden))


def test_an_unknown_block_is_scaled_where_it_can_be() -> None:
    torch.manual_seed(0)
    block, hidden = Odd(), torch.randn(1, TOKENS, 32)
    config: Any = type("Config", (), {"get_text_config": lambda self: self, "model_type": "odd", "hidden_size": 32})()
    structure = find_structure(block, Call((), {}), hidden, config)
    found = {group.producer: set(group.consumers) for group in structure.groups}
    assert found == {"norm": {"left", "right"}, "right": {"out"}}
    assert structure.sites == {"left": "left", "right": "left", "out": "out", "lonely": "lonely"}
