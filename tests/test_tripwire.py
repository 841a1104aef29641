"""AWQ_RT_CHECK=1 names the module where a number left the range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import awq_rt
from awq_rt import tripwire
from awq_rt.errors import AwqRtError, NonFiniteOutput

IDS = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny.build(folder, tiny.config_of("llama"))
    return folder


def load(checkpoint: Path, **keywords: Any) -> Any:
    return awq_rt.load(checkpoint, device="cpu", **keywords)


@pytest.mark.parametrize(
    ("scale", "named"),
    [
        (30000.0, "model.layers.1.post_attention_layernorm (LlamaRMSNorm)"),
        (5000.0, "model.layers.1.mlp (LlamaMLP)"),  # what its linears give is finite; their product is not
    ],
)
def test_the_first_module_that_overflows_is_named(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, scale: float, named: str
) -> None:
    monkeypatch.setenv("AWQ_RT_CHECK", "1")
    model = load(checkpoint, dtype="float16")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.fill_(scale)
    with pytest.raises(NonFiniteOutput) as caught:
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    message = str(caught.value)
    assert message.startswith(f"{named}: ")
    assert "infinite of 256 values" in message or "NaN" in message
    assert "torch.float16[1, 4, 64], first at [0, " in message
    assert "its inputs were finite, at most " in message
    assert "dtype='bfloat16', whose range is larger than float16's 65504" in message
    assert message.endswith("[AWQ-NUMERIC-001]")


def test_the_fused_decoder_gives_way_so_that_modules_have_names(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(checkpoint).fusion.decoder is not None
    monkeypatch.setenv("AWQ_RT_CHECK", "1")
    model = load(checkpoint)
    assert str(model.fusion) == "not fused: model: AWQ_RT_CHECK is set, and watches module by module"


def test_a_healthy_model_answers_as_ever(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(checkpoint, fuse=False).generate(IDS, max_new_tokens=6, do_sample=False)
    monkeypatch.setenv("AWQ_RT_CHECK", "1")
    assert torch.equal(load(checkpoint).generate(IDS, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("value", ["", "0"])
def test_nothing_is_watched_unless_asked(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWQ_RT_CHECK", value)
    assert not any(module._forward_hooks for module in load(checkpoint, fuse=False).modules())


class Branches(nn.Module):
    """Gives what it is told, in the forms in which modules give tensors."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.output


BAD = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])


@pytest.mark.parametrize("output", [BAD, (None, BAD), {"states": [BAD]}, (torch.ones(2), {"x": (BAD,)})])
def test_tensors_are_found_in_whatever_a_module_gives(output: Any) -> None:
    module = nn.Sequential(Branches(output))
    tripwire.attach(module)
    with pytest.raises(NonFiniteOutput, match=r"^0 \(Branches\): 1 NaN and 2 infinite of 4 values .* first at \[1\]"):
        module(torch.ones(2))


@pytest.mark.parametrize("given", [(BAD,), ({"mask": BAD},)])
def test_what_came_in_not_finite_is_not_the_modules_fault(given: Any) -> None:
    module = Branches(BAD)
    tripwire.attach(module)
    assert module(*given) is BAD
    assert module(torch.ones(1), keyword=BAD) is BAD


def test_tensors_without_floating_values_are_left_alone() -> None:
    module = Branches((torch.ones(2, dtype=torch.int64), torch.empty(2, device="meta")))
    tripwire.attach(module)
    module(torch.ones(2, dtype=torch.bool))


def test_a_module_that_is_given_nothing_floating_is_named_too() -> None:
    model = nn.Sequential(nn.Embedding(4, 2))
    tripwire.attach(model)
    with torch.no_grad():
        model[0].weight[2, 1] = torch.nan
    with pytest.raises(AwqRtError, match=r"^0 \(Embedding\): 1 NaN of 2 values .*it was given no floating tensor"):
        model(torch.tensor([2]))
