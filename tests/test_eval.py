"""Perplexity, and the two commands around the quantiser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from dense import some_tokens, word_tokenizer, write_dense

import awq_rt
from awq_rt.cli import cli
from awq_rt.errors import InvalidInput
from awq_rt.evaluate import perplexity

TEXT = " ".join(f"w{token}" for sample in some_tokens(6, 50) for token in sample)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


class Model:
    """Gives the next word the probability that `of` returns for (context, word), spread evenly over the others."""

    device = torch.device("cpu")

    def __init__(self, of: Any, words: int = 100):
        self.of, self.words, self.seen = of, words, []  # type: ignore[var-annotated]

    def __call__(self, ids: torch.Tensor, use_cache: bool) -> Any:
        self.seen.append(ids[0].tolist())
        logits = torch.empty(1, ids.shape[1], self.words)
        for place in range(ids.shape[1]):
            following = int(ids[0, place + 1]) if place + 1 < ids.shape[1] else 0
            right = self.of(ids[0, : place + 1].tolist())
            logits[0, place] = math.log((1 - right) / (self.words - 1))
            logits[0, place, following] = math.log(right)
        return SimpleNamespace(logits=logits)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    found = perplexity(Model(lambda context: 0.01), word_tokenizer(), TEXT, window=64)
    assert found.value == pytest.approx(100, rel=1e-5)
    assert (found.tokens, found.windows) == (4 * 63, 4)  # 300 words


def test_every_token_of_a_window_but_the_first_is_predicted() -> None:
    first = perplexity(Model(lambda context: 0.5 if len(context) == 1 else 0.25), word_tokenizer(), TEXT, window=5)
    assert first.value == pytest.approx(math.exp((math.log(2) + 3 * math.log(4)) / 4), rel=1e-5)


def test_a_smaller_stride_predicts_each_token_once_with_more_context() -> None:
    model = Model(lambda context: min(0.9, len(context) / 100))
    found = perplexity(model, word_tokenizer(), TEXT, window=60, stride=20)
    assert found.windows == 13
    assert found.tokens == 59 + 12 * 20
    logs = [-math.log(n / 100) for n in range(1, 60)] + 12 * [-math.log(n / 100) for n in range(40, 60)]
    assert found.value == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-5)
    assert model.seen[1][:40] == model.seen[0][20:]


def test_windows_can_be_limited_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    found = perplexity(
        Model(lambda context: 0.5),
        word_tokenizer(),
        TEXT,
        window=32,
        max_windows=2,
        progress=lambda *at: told.append(at),
    )
    assert found.windows == 2
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(("window", "stride"), [(1, None), (8, 0), (8, 9), (512, None)])
def test_windows_that_cannot_be_are_refused(window: int, stride: int | None) -> None:
    with pytest.raises(InvalidInput, match="window"):
        perplexity(Model(lambda context: 0.5), word_tokenizer(), TEXT, window=window, stride=stride)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, the same quantised by the command, and a text."""
    folder = tmp_path_factory.mktemp("models")
    write_dense(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(TEXT)
    done = run(
        "quantize", folder / "dense", folder / "awq", "--calibration", folder / "text.txt", "--group-size", 32,
        "--samples", 4, "--length", 32, "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"14 linears written to {folder / 'awq'} as gemm in ")
    assert "128 tokens of" in done.stdout
    return folder


def test_quantize_writes_a_model_that_eval_reads(models: Path) -> None:
    done = run("eval", models / "awq", "--text", models / "text.txt", "--window", 64, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["texts"][str(models / "text.txt")]
    model = awq_rt.load(models / "awq", device="cpu")
    expected = perplexity(model, model.tokenizer, TEXT, window=64)
    assert found == {"perplexity": expected.value, "tokens": expected.tokens, "windows": expected.windows}


def test_eval_reads_dense_models_too(models: Path) -> None:
    done = run("eval", models / "dense", "-t", models / "text.txt", "--window", 64, "--device", "cpu")
    assert done.exit_code == 0, done.output
    value = float(done.stdout.split()[0])
    # Random weights know nothing of random words: near the 128 words of the vocabulary.
    assert 60 < value < 400
    assert f"{models / 'text.txt'} (252 tokens in 4 windows of 64)" in done.stdout


def test_an_interrupted_command_goes_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt.quantization import run as run_module

    arguments = ("quantize", models / "dense", tmp_path / "out", "--calibration", models / "text.txt")
    arguments += ("--group-size", 32, "--samples", 4, "--length", 32, "--device", "cpu")  # type: ignore[assignment]
    search, blocks = run_module.search_block, []

    def interrupted(block: Any, *rest: Any) -> Any:
        blocks.append(block.path)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return search(block, *rest)

    monkeypatch.setattr(run_module, "search_block", interrupted)
    assert run(*arguments).exit_code == 130
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "1 of 2 blocks were finished by an earlier run" in done.stdout


def test_faults_are_sentences(models: Path, tmp_path: Path) -> None:
    again = run("quantize", models / "awq", tmp_path / "out")
    assert again.exit_code == 1
    assert "AWQ-QUANT-001" in again.stderr
    assert "Traceback" not in again.output
    short = run("eval", models / "awq", "--text", models / "text.txt", "--window", 4096, "--device", "cpu")
    assert short.exit_code == 1
    assert "give more text or a smaller window" in short.stderr
