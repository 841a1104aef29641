"""Many callers at once on one GPU: threads that share a model and its captured steps, processes that share the GPU."""

from __future__ import annotations

import gc
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from callers import PROMPTS, answers_of_threads
from tiny import build, config_of

import awq_rt

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build(folder, config_of("llama"))
    return folder


def answer(model: Any, prompt: list[list[int]]) -> list[list[int]]:
    ids = torch.tensor(prompt, device="cuda:0")
    tokens: list[list[int]] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    ).tolist()  # fmt: skip
    return tokens


def answers_of_a_process(folder: Path) -> list[list[list[int]]]:
    model = awq_rt.load(folder, device="cuda:0", dtype="float16")
    return [answer(model, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[list[int]]]:
    return answers_of_a_process(llama)


def test_eight_threads_share_a_model(llama: Path, expected: list[list[list[int]]]) -> None:
    model = awq_rt.load(llama, device="cuda:0", dtype="float16")
    assert model.fusion.decoder is not None
    found = answers_of_threads(lambda prompt: answer(model, prompt), 8)
    assert found == dict.fromkeys(range(8), expected)


def test_four_processes_share_the_gpu(llama: Path, expected: list[list[list[int]]]) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(answers_of_a_process, [llama] * 4) == [expected] * 4


def test_loading_again_and_again_leaves_nothing_on_the_gpu(llama: Path) -> None:
    """The first rounds take what the process keeps for good: modules of kernels, a graph's private pool."""
    held = []
    for _ in range(12):
        model = awq_rt.load(llama, device="cuda:0", dtype="float16")
        answer(model, PROMPTS[0])
        del model
        gc.collect()  # a model has cycles of references
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[3], held
