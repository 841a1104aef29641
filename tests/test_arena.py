"""A layer's packed weights in one allocation."""

from __future__ import annotations

import torch
from torch import nn

import awq_rt
from awq_rt.bench.synthetic import SyntheticCheckpoint
from awq_rt.fusion.arena import move_together
from awq_rt.fusion.projection import Projection


def test_moved_weights_lie_together_and_compute_the_same() -> None:
    model = awq_rt.load(SyntheticCheckpoint("tiny", torch.device("cpu")), device="cpu")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        before, answer = model(tokens).logits, model.generate(tokens, max_new_tokens=6)
    layer = model.fusion.decoder.description.layers[0]
    found = [layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down]
    move_together(found)
    tensors = [tensor for projection in found for tensor in projection.tensors]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    places = [place for projection in found for place in projection.places]
    assert all(tensors[name].data_ptr() == pointer for tensors, name, pointer in places)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
        assert torch.equal(model.generate(tokens, max_new_tokens=6), answer)


def test_dense_linears_stay_where_they_are() -> None:
    move_together([Projection([nn.Linear(4, 4)])])
