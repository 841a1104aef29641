"""Generation on a fused decoder gives what transformers' own loop gives, whatever is asked of it."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build, config_of
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import awq_rt
from awq_rt.errors import InvalidInput
from awq_rt.generation import session

FAMILIES = ("llama", "mistral", "qwen3", "phi3", "gemma2", "mixtral")


class Pair:
    """The same checkpoint fused and unfused."""

    def __init__(self, folder: Path, family: str = "llama", **changes: Any):
        config = config_of(family)
        for name, value in changes.items():
            setattr(config, name, value)
        build(folder, config)
        self.fused, self.plain = awq_rt.load(folder, fuse=True), awq_rt.load(folder, fuse=False)

    def agree(self, ids: Tensor, seed: int = 0, **arguments: Any) -> Tensor:
        torch.manual_seed(seed)
        expected = self.plain.generate(ids, **arguments)
        torch.manual_seed(seed)
        found = self.fused.generate(ids, **arguments)
        assert found.tolist() == expected.tolist()
        assert found.dtype == expected.dtype
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every step of a fused decoder."""
    taken: list[int] = []
    original = session.Session.advance

    def advance(self: session.Session) -> None:
        taken.append(len(self.tokens))
        original(self)

    monkeypatch.setattr(session.Session, "advance", advance)
    return taken


def prompt(batch: int = 1, count: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (batch, count), generator=torch.Generator().manual_seed(seed))


def padded(ids: Tensor, *missing: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(ids)
    for row, count in enumerate(missing):
        mask[row, :count] = 0
    return ids * mask, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_decoding_and_padding(family: str, tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path, family)
    pair.agree(prompt(), max_new_tokens=30, do_sample=False)
    assert len(steps) == 29
    ids, mask = padded(prompt(3, 12), 0, 5, 11)
    pair.agree(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    pair.agree(ids, attention_mask=mask, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=30, top_p=0.9)
    assert set(steps) == {1, 3}


@pytest.mark.parametrize("window", [2, 5, 64])
def test_sliding_windows(window: int, tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path, "mistral", sliding_window=window)
    ids, mask = padded(prompt(2, 20), 0, 3)
    pair.agree(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert steps


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.5},
        {"do_sample": True, "top_k": 3},
        {"do_sample": True, "top_p": 0.4},
        {"do_sample": True, "min_p": 0.2},
        {"do_sample": True, "typical_p": 0.6},
        {"do_sample": True, "epsilon_cutoff": 0.001},
        {"do_sample": False, "repetition_penalty": 1.4},
        {"do_sample": True, "repetition_penalty": 0.8, "top_p": 0.9, "temperature": 1.5},
    ],
    ids=str,
)
def test_sampling_draws_the_tokens_that_transformers_draws(
    pair: Pair, sampling: dict[str, Any], steps: list[int]
) -> None:
    ids, mask = padded(prompt(2), 0, 4)
    drawn = [pair.agree(ids, seed, attention_mask=mask, max_new_tokens=16, **sampling) for seed in (1, 2)]
    assert len(steps) == 30
    if sampling["do_sample"] and sampling.get("top_k") != 1:
        assert drawn[0].tolist() != drawn[1].tolist()


def test_several_generations_leave_nothing_behind(pair: Pair) -> None:
    long, short = prompt(1, 60, seed=1), prompt(1, 3, seed=2)
    first = pair.agree(short, max_new_tokens=20, do_sample=False)
    pair.agree(long, max_new_tokens=20, do_sample=False)
    pair.agree(prompt(4, 7), max_new_tokens=5, do_sample=False)
    assert pair.agree(short, max_new_tokens=20, do_sample=False).tolist() == first.tolist()


def test_the_end_of_a_sequence(pair: Pair, steps: list[int]) -> None:
    ids = prompt(3)
    free = pair.plain.generate(ids, max_new_tokens=24, do_sample=False)
    ends = [int(free[0, 9 + 4]), int(free[1, 9 + 9])]
    found = pair.agree(ids, max_new_tokens=24, do_sample=False, eos_token_id=ends, pad_token_id=0)
    assert (found[0] == 0).any()
    assert found.shape[1] < free.shape[1] or int(free[2, -1]) not in ends
    pair.agree(ids[:1], max_new_tokens=24, do_sample=False, eos_token_id=ends[0], pad_token_id=0)


def test_every_limit_on_the_length(pair: Pair, steps: list[int]) -> None:
    ids = prompt()
    pair.agree(ids, max_new_tokens=1, do_sample=False)
    assert not steps
    pair.agree(ids, max_length=20, do_sample=False)
    assert len(steps) == 10


def test_a_prompt_in_chunks(pair: Pair, monkeypatch: pytest.MonkeyPatch, steps: list[int]) -> None:
    monkeypatch.setattr("awq_rt.fusion.decoder.CHUNK_TOKENS", 30)
    pair.agree(prompt(5, 12), max_new_tokens=8, do_sample=False)  # two rows at a time
    monkeypatch.setattr("awq_rt.fusion.decoder.CHUNK_TOKENS", 8)
    pair.agree(prompt(1, 45), max_new_tokens=8, do_sample=False)
    ids, mask = padded(prompt(2, 21), 13, 0)  # the shorter row ends in an earlier chunk
    pair.agree(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert steps


class Words(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_streaming(pair: Pair, steps: list[int]) -> None:
    streams = Words(), Words()
    for model, stream in zip((pair.plain, pair.fused), streams, strict=True):
        model.generate(prompt(), max_new_tokens=12, do_sample=False, streamer=stream)
    assert streams[0].values == streams[1].values
    assert [stream.ended for stream in streams] == [1, 1]
    assert steps


class Never(LogitsProcessor):
    """A user's own processor: it forbids a token."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.token] = -torch.inf
        return scores


class After(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **keywords: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"no_repeat_ngram_size": 2},
        {"logits_processor": LogitsProcessorList([Never(7)])},
        {"stopping_criteria": StoppingCriteriaList([After(14)])},
        {"bad_words_ids": [[5], [9]]},
    ],
    ids=lambda value: next(iter(value)),
)
def test_what_the_engine_does_not_run_goes_to_transformers(
    pair: Pair, arguments: dict[str, Any], steps: list[int]
) -> None:
    pair.agree(prompt(), max_new_tokens=10, do_sample=False, **arguments)
    assert not steps


def test_results_with_scores_and_caches_of_the_caller(pair: Pair, steps: list[int]) -> None:
    ids = prompt()
    full = pair.fused.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_scores=True)
    assert len(full.scores) == 6
    results = []
    for model in (pair.plain, pair.fused):
        cache = DynamicCache(config=model.config)
        first = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=cache)
        assert cache.get_seq_length() >= first.shape[1] - 1
        results.append(model.generate(first, max_new_tokens=6, do_sample=False, past_key_values=cache).tolist())
    assert results[0] == results[1]
    assert not steps


def test_masks_and_positions_that_are_more_than_padding(pair: Pair, steps: list[int]) -> None:
    ids = prompt(1, 10)
    hole = torch.ones_like(ids)
    hole[0, 4] = 0
    pair.agree(ids, attention_mask=hole, max_new_tokens=6, do_sample=False)
    pair.agree(ids, position_ids=torch.arange(10)[None] + 3, max_new_tokens=6, do_sample=False)
    right, mask = padded(ids, 0)
    mask[0, -2:] = 0
    pair.agree(right, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert not steps


def test_embeddings_as_a_prompt(pair: Pair, steps: list[int]) -> None:
    embedded = pair.plain.get_input_embeddings()(prompt())
    results = [
        model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False) for model in (pair.plain, pair.fused)
    ]
    assert results[0].tolist() == results[1].tolist()
    assert not steps


def test_a_model_that_was_changed_is_not_decoded_from_old_parts(tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path)
    ids = prompt()
    before = pair.agree(ids, max_new_tokens=8, do_sample=False)
    taken = len(steps)
    for model in (pair.plain, pair.fused):
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, __, y: y * 0)
    after = pair.agree(ids, max_new_tokens=8, do_sample=False)
    assert after.tolist() != before.tolist()
    assert len(steps) == taken


@pytest.mark.parametrize("path", ["", "model", "model.embed_tokens", "model.layers.0", "model.norm", "lm_head"])
def test_hooks_are_called(path: str, pair: Pair, steps: list[int]) -> None:
    called: list[str] = []
    hook = pair.fused.get_submodule(path).register_forward_hook(lambda *_: called.append(path))
    try:
        pair.fused.generate(prompt(), max_new_tokens=4, do_sample=False)
    finally:
        hook.remove()
    assert len(called) == 4
    assert not steps
    pair.agree(prompt(), max_new_tokens=4, do_sample=False)
    assert len(steps) == 3


def test_a_model_with_other_layers_is_not_decoded_from_old_parts(tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path)
    for model in (pair.plain, pair.fused):
        model.model.layers[0] = model.model.layers[1]
    pair.agree(prompt(), max_new_tokens=8, do_sample=False)
    assert not steps


def test_a_copy_has_no_decoder_and_generates(tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path)
    copied = copy.deepcopy(pair.fused)
    found = copied.generate(prompt(), max_new_tokens=8, do_sample=False)
    assert not steps
    assert found.tolist() == pair.agree(prompt(), max_new_tokens=8, do_sample=False).tolist()
    assert len(steps) == 7


def test_a_model_that_moves_gets_another_decoder(tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path)
    before = pair.agree(prompt(), max_new_tokens=8, do_sample=False)
    decoder = pair.fused.fusion.decoder
    for linear in pair.fused.modules():
        if isinstance(linear, awq_rt.AwqLinear):  # what moving to another device and back does
            linear.bind(linear.weight_canonical(), torch.float32)
    assert pair.agree(prompt(), max_new_tokens=8, do_sample=False).tolist() == before.tolist()
    assert pair.fused.fusion.decoder is not decoder
    assert len(steps) == 14


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_model_goes_when_its_last_name_goes(family: str, tmp_path: Path, steps: list[int]) -> None:
    build(tmp_path, config_of(family))
    model = awq_rt.load(tmp_path, fuse=True)
    model.generate(prompt(), max_new_tokens=4, do_sample=False)
    assert steps
    seen = weakref.ref(model), weakref.ref(model.fusion.decoder)
    gc.collect()
    gc.disable()
    try:
        del model
        assert [found() for found in seen] == [None, None]
    finally:
        gc.enable()


def test_training_and_autocast_are_left_to_transformers(tmp_path: Path, steps: list[int]) -> None:
    pair = Pair(tmp_path)
    for model in (pair.fused, pair.plain):
        model.train()
    pair.agree(prompt(), max_new_tokens=4, do_sample=False)
    assert not steps


def test_max_seq_len_is_kept(tmp_path: Path) -> None:
    build(tmp_path, config_of("llama"))
    model = awq_rt.load(tmp_path, max_seq_len=16)
    model.generate(prompt(1, 9), max_new_tokens=7, do_sample=False)
    with pytest.raises(InvalidInput, match="max_seq_len=17 or more"):
        model.generate(prompt(1, 9), max_new_tokens=8, do_sample=False)


class Interrupt(BaseStreamer):
    def __init__(self, after: int):
        self.left = after

    def put(self, value: Tensor) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    def end(self) -> None: ...


def test_an_interrupted_generation_leaves_the_model_usable(pair: Pair) -> None:
    with pytest.raises(KeyboardInterrupt):
        pair.fused.generate(prompt(), max_new_tokens=20, do_sample=False, streamer=Interrupt(5))
    pair.agree(prompt(), max_new_tokens=20, do_sample=False)


def test_threads_take_turns(pair: Pair) -> None:
    prompts = [prompt(1, 9, seed) for seed in range(4)]
    expected = [pair.plain.generate(ids, max_new_tokens=15, do_sample=False).tolist() for ids in prompts]
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        found[index] = pair.fused.generate(prompts[index], max_new_tokens=15, do_sample=False).tolist()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == expected


def test_text_as_an_iterator(shared: Path) -> None:
    model = awq_rt.load(shared / "checkpoints" / "smollm2-135m-awq-gemm-g64")
    ids = model.tokenizer("Once upon a time", return_tensors="pt").input_ids
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    text = model.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    pieces = list(awq_rt.stream(model, "Once upon a time", max_new_tokens=12, do_sample=False))
    assert len(pieces) > 1
    assert "".join(pieces) == text
    left = awq_rt.stream(model, ids, max_new_tokens=10_000, do_sample=False)
    assert next(left) == pieces[0]
    left.close()  # returns: the generation was ended, not waited for
    with pytest.raises(ValueError, match="unknown_argument"):
        list(awq_rt.stream(model, ids, unknown_argument=1))
    with pytest.raises(InvalidInput, match=r"\[2, 4\]"):
        list(awq_rt.stream(model, prompt(2, 4)))


def test_stop_strings(shared: Path, steps: list[int]) -> None:
    checkpoint = shared / "checkpoints" / "smollm2-135m-awq-gemm-g64"
    fused, plain = awq_rt.load(checkpoint), awq_rt.load(checkpoint, fuse=False)
    ids = plain.tokenizer("One, two, three,", return_tensors="pt").input_ids
    whole = plain.tokenizer.decode(plain.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :])
    arguments = {"max_new_tokens": 16, "do_sample": False, "stop_strings": [whole[12:15]], "tokenizer": plain.tokenizer}
    results = [model.generate(ids, **arguments).tolist() for model in (plain, fused)]
    assert results[0] == results[1]
    assert len(results[0][0]) < ids.shape[1] + 16
    assert steps


def test_tokens_of_a_real_model(shared: Path, steps: list[int]) -> None:
    checkpoint = shared / "checkpoints" / "smollm2-135m-awq-gemm-g64"
    fused, plain = awq_rt.load(checkpoint), awq_rt.load(checkpoint, fuse=False)
    ids = fused.tokenizer("The history of mathematics begins", return_tensors="pt").input_ids
    results = [model.generate(ids, max_new_tokens=200, do_sample=False).tolist() for model in (plain, fused)]
    assert results[0] == results[1]
    assert len(steps) > 20
