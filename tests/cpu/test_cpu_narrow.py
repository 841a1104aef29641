"""A float32 model on the CPU holds its embedding and head in the checkpoint's 16 bits, and nobody can tell."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from torch import Tensor, nn

import awq_rt
from awq_rt.models.narrow import NarrowEmbedding, NarrowHead

TOKENS = torch.arange(3, 15).reshape(2, 6)
ROUNDINGS = 2e-5
"""As tests/test_models.py has it: the order of float32 additions, a few units of 2^-24 of the largest logit a layer."""


@pytest.fixture(params=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    config = config_of("llama")
    config.tie_word_embeddings = request.param == "tied"
    return tmp_path, build(tmp_path, config)


def ends(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_both_ends_hold_the_16_bits_of_the_file_and_compute_in_float32(checkpoint: tuple[Path, Any]) -> None:
    folder, dense = checkpoint
    model = awq_rt.load(folder, device="cpu", backend="cpu")
    embedding, head = ends(model)
    assert isinstance(embedding, NarrowEmbedding)
    assert isinstance(head, NarrowHead)
    assert embedding.weight.dtype == head.weight.dtype == torch.float16
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings
    assert torch.equal(embedding.weight.float(), dense.get_input_embeddings().weight)
    assert model.dtype == embedding(TOKENS).dtype == torch.float32
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() < ROUNDINGS * expected.abs().max()
    with torch.no_grad():
        embedding.weight[TOKENS[0, 0], 0] += 1  # the tolerance sees one wrong value of one row
    assert (logits(model) - expected).abs().max() > ROUNDINGS * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{"dtype": "bfloat16"}, {"fuse": False}, {"backend": "reference"}], ids=lambda o: next(iter(o))
)
def test_the_ends_are_plain_where_that_could_not_serve(checkpoint: tuple[Path, Any], options: dict[str, Any]) -> None:
    folder, dense = checkpoint
    model = awq_rt.load(folder, **{"device": "cpu", "backend": "cpu", **options})
    embedding, head = ends(model)
    assert type(embedding) is nn.Embedding
    assert type(head) is nn.Linear
    assert isinstance(embedding.weight, nn.Parameter)
    assert (embedding.weight is head.weight) == model.config.tie_word_embeddings
    assert embedding.weight.dtype == model.dtype
    if model.dtype == torch.float32:
        assert torch.equal(embedding.weight, dense.get_input_embeddings().weight)


def test_a_saved_model_is_the_checkpoint_again(checkpoint: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = checkpoint
    model = awq_rt.load(folder, device="cpu", backend="cpu")
    model.save_pretrained(tmp_path / "saved")
    before, after = awq_rt.open_checkpoint(folder), awq_rt.open_checkpoint(tmp_path / "saved")
    dtypes = {name: info.dtype for name, info in after.dense.items()}
    assert before.dense.keys() == after.dense.keys()
    assert dtypes["model.embed_tokens.weight"] == torch.float16
    again = awq_rt.load(tmp_path / "saved", device="cpu", backend="cpu")
    assert torch.equal(logits(model), logits(again))


def test_the_ends_follow_a_model_that_is_cast_and_a_copy_is_its_own(checkpoint: tuple[Path, Any]) -> None:
    model = awq_rt.load(checkpoint[0], device="cpu", backend="cpu")
    other = copy.deepcopy(model)
    cast = other.to(torch.bfloat16)
    assert logits(cast).dtype == ends(cast)[0](TOKENS).dtype == torch.bfloat16
    assert ends(model)[0].weight.dtype == torch.float16
    assert logits(model).dtype == torch.float32


def test_gradients_pass_through_the_head(checkpoint: tuple[Path, Any]) -> None:
    model = awq_rt.load(checkpoint[0], device="cpu", backend="cpu")
    head = ends(model)[1]
    x = torch.randn(2, 3, head.in_features, requires_grad=True)
    head(x).sum().backward()
    expected = head.weight.float().sum(0).expand(x.shape)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-5)


def test_training_an_end_is_refused_with_the_way_out(checkpoint: tuple[Path, Any]) -> None:
    model = awq_rt.load(checkpoint[0], device="cpu", backend="cpu")
    for end in ends(model):
        with pytest.raises(NotImplementedError, match="fuse=False"):
            end.requires_grad_(True)
        assert end.requires_grad_(False) is end


def test_more_tokens_can_be_added(checkpoint: tuple[Path, Any]) -> None:
    model = awq_rt.load(checkpoint[0], device="cpu", backend="cpu")
    before = logits(model)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    assert logits(model).shape[-1] == before.shape[-1] + 8
    assert torch.equal(logits(model)[..., : before.shape[-1]], before)
