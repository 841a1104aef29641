"""PEFT's LoRA on a 4-bit model, with the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from transformers import AutoModelForCausalLM

import awq_rt
from awq_rt.errors import UnsupportedAdapter
from awq_rt.linear import AwqLinear

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("registered"),
    # PEFT asks models of the newest transformers under the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOKENS = torch.arange(3, 35).view(2, 16)


@pytest.fixture(params=["load", "from_pretrained"])
def base(request: pytest.FixtureRequest, llama: Path) -> Any:
    """A 4-bit model from either road."""
    if request.param == "load":
        return awq_rt.load(llama)
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **options})


def train(model: Any, steps: int = 12, autocast: bool = False) -> list[float]:
    """The loss before each step of Adam on one batch."""
    model.train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def packed(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): module.weight_canonical()
        for name, module in model.named_modules()
        if isinstance(module, AwqLinear)
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS).logits
    return found


def test_an_adapter_learns_and_the_4_bit_weights_stay(base: Any) -> None:
    torch.manual_seed(0)
    before, untouched = packed(base), logits(base)
    model = peft.get_peft_model(base, lora())
    assert torch.equal(logits(model), untouched)  # B starts at zero
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * model.config.num_hidden_layers
    assert all("lora_" in name for name in trained)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == sorted(losses, reverse=True)
    after = packed(model)
    assert before.keys() == after.keys()
    assert all(after[name].equal(weight) for name, weight in before.items())
    with model.disable_adapter():
        assert torch.equal(logits(model), untouched)


def test_an_adapter_is_saved_and_loaded_again(base: Any, llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora())
    train(model, steps=3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(awq_rt.load(llama), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), logits(awq_rt.load(llama)))
    by_transformers = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    by_transformers.load_adapter(str(tmp_path))
    assert torch.equal(logits(by_transformers), logits(model))


def test_generation_goes_through_the_adapter(llama: Path) -> None:
    """The fused decoder knows no adapters: transformers' own loop runs a model that has them."""
    torch.manual_seed(0)
    base = awq_rt.load(llama)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = base.generate(TOKENS, **options)
    model = peft.get_peft_model(base, lora())
    train(model, steps=8)
    told = model.generate(input_ids=TOKENS, **options)
    expected = TOKENS
    for _ in range(8):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(told, expected)
    assert not torch.equal(told, plain)
    restored = model.unload()
    assert torch.equal(restored.generate(TOKENS, **options), plain)


def test_merging_is_refused_with_a_reason(base: Any) -> None:
    model = peft.get_peft_model(base, lora())
    with pytest.raises(UnsupportedAdapter, match="rounding the sum to 4 bits"):
        model.merge_and_unload()
    with pytest.raises(UnsupportedAdapter, match="rounding the sum to 4 bits"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_the_weight_itself_is_refused(base: Any, options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAdapter, match="packed in 4 bits"):
        peft.get_peft_model(base, lora(**options))


def adapted(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


def test_all_linear_finds_what_would_be_a_linear_in_a_dense_model(tmp_path: Path) -> None:
    dense = build(tmp_path, config_of("llama"))
    model = peft.get_peft_model(awq_rt.load(tmp_path), lora(target_modules="all-linear"))
    assert adapted(model) == adapted(peft.get_peft_model(dense, lora(target_modules="all-linear")))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # it looks for experts
def test_all_linear_leaves_experts_alone(tmp_path: Path) -> None:
    build(tmp_path, config_of("qwen3_moe"))
    found = adapted(peft.get_peft_model(awq_rt.load(tmp_path), lora(target_modules="all-linear")))
    assert sum(".self_attn." in name for name in found) == 2 * 4
    assert not any(".experts." in name for name in found)


def test_experts_can_be_adapted_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build(tmp_path, config_of("qwen3_moe"))
    model = peft.get_peft_model(awq_rt.load(tmp_path), lora(target_modules=["down.0", "down.1", "down.2", "down.3"]))
    losses = train(model)
    assert losses[-1] < losses[0]


def test_half_precision_trains_under_autocast(llama: Path) -> None:
    torch.manual_seed(0)
    base = awq_rt.load(llama, dtype=torch.bfloat16)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), lora())
    losses = train(model, steps=8, autocast=True)
    assert losses[-1] < losses[0]


def test_two_adapters_serve_one_batch(base: Any) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    model.eval()
    apart = []
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        with torch.no_grad():
            apart.append(model(TOKENS[row : row + 1]).logits)
    with torch.no_grad():
        mixed = model(TOKENS, adapter_names=["default", "other"]).logits
    assert torch.allclose(mixed, torch.cat(apart), atol=1e-5)
    assert not torch.allclose(apart[0], logits(model)[:1], atol=1e-5)


def test_without_register_peft_says_that_it_does_not_know_the_linear(llama: Path) -> None:
    awq_rt.unregister()
    with pytest.raises(ValueError, match="AwqLinear"):
        peft.get_peft_model(awq_rt.load(llama), lora())
