"""Fused decoders: found in a model, tried against it, refused with a reason where they would compute something else."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from torch import Tensor

import awq_rt
from awq_rt.errors import CannotFuseModel, InvalidConfig
from awq_rt.fusion import fuse
from awq_rt.fusion.prefill import BLOCK, prefill_attention
from awq_rt.ops import AttentionSpec

FUSED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "mixtral", "qwen2_moe", "qwen3_moe")
REASONS = {
    "stablelm": "does not compute an RMS norm",
    "cohere": "it has no norms named",
    "opt": "no rotary_emb",
    "bloom": "no decoder with a list of layers",
}


def loaded(folder: Path, family: str, changes: dict[str, Any] | None = None, **arguments: Any) -> Any:
    config = config_of(family)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    build(folder, config)
    return awq_rt.load(folder, **arguments)


@pytest.mark.parametrize("family", FUSED)
def test_a_family_is_fused(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    assert model.fusion.decoder is not None, str(model.fusion)
    mixture = [path for path, _ in model.fusion.unfused]
    assert len(mixture) == (2 if "mix" in family or "moe" in family else 0)
    assert type(model).__name__ == type(model).__mro__[2].__name__  # saved under the name that transformers knows


@pytest.mark.parametrize("family", REASONS)
def test_what_cannot_be_fused_says_why(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, family)
    assert model.fusion.decoder is None
    assert REASONS[family] in str(model.fusion)
    with pytest.raises(CannotFuseModel, match=REASONS[family]):
        fuse(model, True)


def test_fusing_can_be_turned_off(tmp_path: Path) -> None:
    assert loaded(tmp_path, "llama", fuse=False).fusion.decoder is None


def _residual_factor(model: Any) -> None:
    """What Granite does: a factor on each branch before it is added."""
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda _, __, y: (y[0] * 0.5, *y[1:]))


def _logit_factor(model: Any) -> None:
    """What Cohere does: a factor on the logits."""
    model.register_forward_hook(lambda _, __, y: y.__class__(logits=y.logits * 0.9))


def _another_input(model: Any) -> None:
    """What parallel branches do: the MLP reads something else."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, x: (x[0].flip(-1),))


CHANGES = [
    (_residual_factor, "differ from transformers' own"),
    (_logit_factor, "differ from transformers' own"),
    (_another_input, "does not compute an RMS norm"),
]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_another_computation_under_known_names_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", fuse=False)
    assert fuse(model).decoder is not None
    change(model)
    refused = fuse(model)
    assert refused.decoder is None
    assert said in str(refused)


def test_embeddings_may_be_scaled_but_nothing_else(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", fuse=False)
    hook = model.model.embed_tokens.register_forward_hook(lambda _, __, y: y * 3)
    assert fuse(model).decoder is not None  # the module itself is called, hook and all
    hook.remove()
    model.model.layers[0].register_forward_pre_hook(lambda _, x, k: ((x[0].flip(-1), *x[1:]), k), with_kwargs=True)
    assert "embeddings" in str(fuse(model))


def test_names_that_are_not_known_come_from_a_mapping(tmp_path: Path) -> None:
    model = loaded(tmp_path, "llama", fuse=False)
    for layer in model.model.layers:
        layer.add_module("first_norm", layer.input_layernorm)
        layer.mlp.add_module("in_gate", layer.mlp.gate_proj)
    mapping = {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["in_gate", "up_proj", "down_proj"],
        "layernorm": ["first_norm", "post_attention_layernorm", "norm"],
        "use_alibi": False,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    assert fuse(model, mapping).decoder is not None
    with pytest.raises(CannotFuseModel, match="missing_proj"):
        fuse(model, {**mapping, "mlp": ["missing_proj", "up_proj", "down_proj"]})


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"attentions": ["q_proj"]}, "'attentions'"),
        ({"mlp": "gate_proj"}, "at least 2 names"),
        ({"layernorm": ["norm"]}, "at least 3 names"),
    ],
)
def test_a_mapping_is_checked(mapping: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=said):
        fuse(loaded(tmp_path, "llama", fuse=False), mapping)


def test_old_keys_of_the_configuration_are_honoured(tmp_path: Path) -> None:
    import json

    build(tmp_path, config_of("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"do_fuse": True, "fuse_max_seq_len": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = awq_rt.load(tmp_path)
    assert model.awq_rt_engine.max_seq_len == 24
    assert awq_rt.load(tmp_path, max_seq_len=48).awq_rt_engine.max_seq_len == 48


def test_a_backend_may_prepare_its_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt import registry

    told: list[Any] = []
    backend = registry.get("reference")
    monkeypatch.setattr(type(backend), "prepare_ops", lambda self, *sizes: told.append(sizes), raising=False)
    model = loaded(tmp_path, "gemma2", {"sliding_window": 9}, backend="reference")
    (dtype, device, hidden, mlps, attentions) = told[0]
    assert (dtype, device.type, hidden, mlps) == (torch.float32, "cpu", {64}, {(128, "gelu_tanh")})
    assert {spec.window for spec, _ in attentions} == {9, None}
    assert model.fusion.decoder is not None


# --- attention while a prompt is read --------------------------------------------------------------------------------


def by_definition(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, slopes: Tensor | None) -> Tensor:
    """Every score written out, in float64."""
    share = spec.heads // spec.kv_heads
    k, v = k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = q.double() @ k.transpose(2, 3) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    count, seen = q.shape[2], k.shape[2]
    for row in range(count):
        for column in range(seen):
            distance = column - (seen - count + row)
            if slopes is not None:
                scores[:, :, row, column] += slopes.double() * distance
            if distance > 0 or (spec.window is not None and distance <= -spec.window):
                scores[:, :, row, column] = -torch.inf
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize(("count", "seen"), [(1, 1), (20, 20), (5, 20), (1, 20)])
def test_attention_over_a_prompt(
    window: int | None, softcap: float | None, alibi: bool, count: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("awq_rt.fusion.prefill.BLOCK", 8)
    generator = torch.Generator().manual_seed(count + seen)
    q = torch.randn(2, 4, count, 16, generator=generator)
    k, v = torch.randn(2, 2, 2, seen, 16, generator=generator)
    spec = AttentionSpec(4, 2, 16, 0.25, window=window, softcap=softcap)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if alibi else None
    expected = by_definition(q, k, v, spec, slopes)
    found = prefill_attention(q, k, v, spec, slopes)
    # Scores up to 4, sums of 16 products and of `seen` shares: 40 roundings of float32 on values below max |v|.
    assert (found - expected).abs().max() <= 40 * torch.finfo(torch.float32).eps * v.abs().max()


@pytest.mark.parametrize("window", [None, 7])
def test_flash_attn_is_told_everything(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which needs a GPU, that has the meaning its documentation gives."""

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **said: Any) -> Tensor:
        assert said["causal"]
        told = AttentionSpec(
            q.shape[2],
            k.shape[2],
            q.shape[3],
            said["softmax_scale"],
            window=None if said["window_size"] == (-1, -1) else said["window_size"][0] + 1,
            softcap=said["softcap"] or None,
        )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return by_definition(q, k, v, told, said["alibi_slopes"]).transpose(1, 2)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q, k, v = torch.randn(3, 1, 4, 12, 16, generator=torch.Generator().manual_seed(0))
    k, v = k[:, :2], v[:, :2]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    spec = AttentionSpec(4, 2, 16, 0.3, window=window, softcap=4.0)
    assert torch.equal(prefill_attention(q, k, v, spec, slopes, flash=True), by_definition(q, k, v, spec, slopes))


def test_a_block_is_far_smaller_than_a_long_prompt() -> None:
    assert BLOCK * 32768 * 4 < 100e6  # bytes of float32 scores of a head: no square of 32768 positions is written


# --- experts that the device chooses ---------------------------------------------------------------------------------


def test_experts_chosen_on_the_device_compute_what_the_loop_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = loaded(tmp_path, "mixtral", fuse=False).model.layers[0].mlp.experts
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([[0.7, 0.3], [0.9, 0.1]])
    chosen = torch.tensor([[3, 0], [1, 4]])  # 4 is past the last: none
    looped = experts(x, chosen, weights)
    assert experts.stack()
    found = experts(x, chosen, weights)
    assert torch.allclose(found, looped, rtol=0, atol=1e-6)  # two float32 terms are added in another order
    assert not torch.allclose(experts(x, chosen.clamp(max=3), weights), looped, rtol=0, atol=1e-6)
    many = [torch.cat([part, part, part]) for part in (x, chosen, weights)]  # more than there are experts: all of them
    assert torch.allclose(experts(*many), torch.cat([looped, looped, looped]), rtol=0, atol=1e-6)
    monkeypatch.setattr("awq_rt.models.experts.FEW_TOKENS", 0)
    assert torch.equal(experts(x, chosen, weights), looped)  # the loop again, on views
