"""lm-evaluation-harness takes a model that was loaded here. Skipped where it is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import LENGTH, some_tokens, word_tokenizer, write_dense

import awq_rt
from awq_rt import quantize

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

WORDS = [" ".join(f"w{token}" for token in tokens) for tokens in some_tokens(samples=6, length=24, seed=7)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small quantised model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("lm-eval")
    write_dense(folder / "dense")
    tokenizer = word_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "w1"
    tokenizer.save_pretrained(folder / "dense")
    quantize(
        folder / "dense", folder / "awq", calibration=some_tokens(), group_size=32, length=LENGTH, samples=8,
        device="cpu",
    )  # fmt: skip
    return awq_rt.load(folder / "awq", device="cpu")


@pytest.fixture(scope="module")
def harness(model: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=2, max_length=64)


@torch.no_grad()
def log_likelihood(model: Any, context: str, continuation: str) -> float:
    """Of `continuation` after `context`, in one run of the model."""
    ids = model.tokenizer(f"{context} {continuation}", return_tensors="pt").input_ids
    first = len(model.tokenizer(context).input_ids)
    logs = model(ids).logits[0, first - 1 : -1].float().log_softmax(-1)
    return float(logs.gather(1, ids[0, first:, None]).sum())


def test_log_likelihoods_are_those_of_the_model(model: Any, harness: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [(words.rsplit(" ", 3)[0], " " + " ".join(words.split(" ")[-3:])) for words in WORDS]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    found = [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]
    expected = [log_likelihood(model, context, continuation.strip()) for context, continuation in pairs]
    # Rows are padded and computed in pairs: sums in another order. Another model's are off by whole nats.
    assert found == pytest.approx(expected, abs=1e-3)
    assert max(abs(one - other) for one, other in zip(found, expected[1:] + expected[:1], strict=True)) > 0.1


def test_a_local_task_runs(model: Any, harness: Any, tmp_path: Path) -> None:
    choices = [[" w5", " w50", " w77"] for _ in WORDS]
    best = [
        max(range(3), key=lambda number: log_likelihood(model, words, options[number].strip()))
        for words, options in zip(WORDS, choices, strict=True)
    ]
    rows = [
        {"question": words, "choices": options, "answer": answer}
        for words, options, answer in zip(WORDS, choices, best, strict=True)
    ]
    (tmp_path / "task.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    task = {
        "task": "local", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "task.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0, random_seed=0)
    assert found["results"]["local"]["acc,none"] == 1.0  # the answers are those that this very model likes best
