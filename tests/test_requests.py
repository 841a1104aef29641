"""A request that was prepared before is served without transformers' preparations, and as they would have served it."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generation import Pair, Words, padded, prompt, steps
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from awq_rt.generation import requests
from awq_rt.generation.engine import Engine

__all__ = ["steps"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> list[int]:
    """Grows whenever transformers prepares a request of the fused model."""
    pair.fused.awq_rt_engine.requests = requests.Requests()
    taken: list[int] = []
    original = GenerationMixin._prepare_generation_config

    def prepare(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self is pair.fused:
            taken.append(len(taken))
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(GenerationMixin, "_prepare_generation_config", prepare)
    return taken


WAYS: list[dict[str, Any]] = [
    {"do_sample": False},
    {"do_sample": False, "min_new_tokens": 4},
    {"do_sample": True, "top_k": 5, "temperature": 0.7},
    {"do_sample": True, "repetition_penalty": 1.3},
    {"generation_config": GenerationConfig(max_new_tokens=9, top_p=0.5, do_sample=True)},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_another_prompt_of_another_length_needs_no_preparation(
    pair: Pair, prepared: list[int], steps: list[int], way: dict[str, Any]
) -> None:
    way = way if "generation_config" in way else {"max_new_tokens": 9, **way}
    for seed, (batch, count) in enumerate(((1, 9), (1, 4), (3, 12), (1, 20))):
        ids, mask = padded(prompt(batch, count, seed), *range(batch))
        pair.agree(ids, seed, attention_mask=mask, **way)
    assert prepared == [0]
    assert steps


def test_ends_and_padding(pair: Pair, prepared: list[int]) -> None:
    free = pair.plain.generate(prompt(3), max_new_tokens=24, do_sample=False)
    way = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [int(free[0, 13])], "pad_token_id": 0}
    for seed in (0, 0, 1):
        ids, mask = padded(prompt(3, 9, seed), 0, 0, 2)
        pair.agree(ids, attention_mask=mask, **way)
    assert prepared == [0]


def test_without_a_mask_padding_tokens_in_the_prompt_are_left_to_transformers(pair: Pair, prepared: list[int]) -> None:
    way = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    pair.agree(prompt(2), **way)
    pair.agree(prompt(2, seed=1), **way)
    assert prepared == [0]
    ids, _ = padded(prompt(2), 0, 4)
    pair.agree(ids, **way)
    assert prepared == [0, 1]


def test_streamers_hear_the_prompt_and_every_token(pair: Pair, prepared: list[int]) -> None:
    streams = [Words() for _ in range(3)]
    for stream in streams:
        pair.fused.generate(prompt(), max_new_tokens=7, do_sample=False, streamer=stream)
    assert prepared == [0]
    assert streams[0].values == streams[1].values == streams[2].values
    assert [stream.ended for stream in streams] == [1, 1, 1]


def changed(pair: Pair, owner: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in (pair.plain, pair.fused):
        monkeypatch.setattr(getattr(model, owner), name, value)


def test_what_a_request_depends_on_is_not_taken_from_an_earlier_one(
    pair: Pair, prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt()
    way = {"max_new_tokens": 8, "do_sample": False}
    first = pair.agree(ids, **way)
    assert pair.agree(ids, max_new_tokens=9, do_sample=False).shape[1] == 18
    assert prepared == [0, 1]
    pair.agree(ids, max_new_tokens=8, do_sample=True)
    assert prepared == [0, 1, 2]
    changed(pair, "generation_config", "repetition_penalty", 1.8, monkeypatch)
    assert pair.agree(ids, **way).tolist() != first.tolist()
    assert prepared == [0, 1, 2, 3]
    monkeypatch.undo()


def test_a_setting_in_the_models_configuration_is_refused_as_ever(
    pair: Pair, prepared: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.fused.generate(prompt(), max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(pair.fused.config, "temperature", 0.3, raising=False)
    with pytest.raises(ValueError, match="temperature"):
        pair.fused.generate(prompt(), max_new_tokens=4, do_sample=False)


def test_a_configuration_changed_in_place_is_another(pair: Pair, prepared: list[int]) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=[120])
    first = pair.agree(prompt(), generation_config=config)
    config.eos_token_id.append(int(first[0, 9]))
    assert pair.agree(prompt(), generation_config=config).shape[1] == 10
    assert prepared == [0, 1]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 15},
        {"max_new_tokens": 5, "min_length": 12},
        {"max_new_tokens": 5, "num_return_sequences": 2, "do_sample": True},
        {"max_new_tokens": 5, "max_time": 100.0},
        {"max_new_tokens": 5, "num_beams": 2},
        {"max_new_tokens": 5, "return_dict_in_generate": True},
        {"max_new_tokens": 5, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_what_depends_on_more_is_prepared_every_time(
    pair: Pair, prepared: list[int], arguments: dict[str, Any]
) -> None:
    for count in (9, 11):
        results = []
        for model in (pair.plain, pair.fused):
            torch.manual_seed(0)
            found = model.generate(prompt(1, count), eos_token_id=120, pad_token_id=0, **arguments)
            results.append((found if isinstance(found, Tensor) else found.sequences).tolist())
        assert results[0] == results[1]
    assert prepared == [0, 1]


def test_masks_with_holes_and_hooks_leave_the_short_way(pair: Pair, prepared: list[int], steps: list[int]) -> None:
    ids, way = prompt(1, 10), {"max_new_tokens": 6, "do_sample": False}
    pair.agree(ids, attention_mask=torch.ones_like(ids), **way)
    hole = torch.ones_like(ids)
    hole[0, 4] = 0
    pair.agree(ids, attention_mask=hole, **way)
    taken = len(steps)
    handles = [model.model.norm.register_forward_hook(lambda _, __, y: -y) for model in (pair.plain, pair.fused)]
    try:
        pair.agree(ids, attention_mask=torch.ones_like(ids), **way)
    finally:
        for handle in handles:
            handle.remove()
    assert prepared == [0, 1, 2]
    assert len(steps) == taken


def test_no_more_is_kept_than_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MOST_KEPT", 2)
    kept = requests.Requests()
    values: list[Any] = [object() for _ in range(3)]
    for key, value in enumerate(values):
        kept.keep(key, value)
    assert [kept.get(key) for key in range(3)] == [None, values[1], values[2]]


def test_generate_has_the_signature_and_the_words_of_transformers(pair: Pair) -> None:
    assert inspect.signature(pair.fused.generate) == inspect.signature(pair.plain.generate)
    assert pair.fused.generate.__doc__ == GenerationMixin.generate.__doc__


def test_a_copied_engine_keeps_nothing(tmp_path: Path) -> None:
    engine = Engine(None, None)
    engine.requests.keep("key", object())  # type: ignore[arg-type]
    assert engine.__deepcopy__({}).requests.get("key") is None


def test_least_lengths_give_the_tokens_of_transformers(pair: Pair, steps: list[int]) -> None:
    ids, mask = padded(prompt(2), 0, 4)
    free = pair.plain.generate(ids, attention_mask=mask, max_new_tokens=16, do_sample=False)
    ends = [int(free[0, 10]), int(free[1, 12]), -1, 999]
    way = {"attention_mask": mask, "max_new_tokens": 16, "eos_token_id": ends, "pad_token_id": 0}
    early = pair.agree(ids, do_sample=False, **way)
    for least in ({"min_new_tokens": 7}, {"min_length": 16}, {"min_new_tokens": 3, "min_length": 3}):
        for sampling in ({"do_sample": False}, {"do_sample": True, "top_k": 4}):
            found = pair.agree(ids, **least, **sampling, **way)
            count = 7 if least != {"min_new_tokens": 3, "min_length": 3} else 3
            assert not set(ends) & set(found[:, 9 : 9 + count].flatten().tolist())
    assert early.tolist() != pair.agree(ids, do_sample=False, min_new_tokens=7, **way).tolist()
    assert steps
