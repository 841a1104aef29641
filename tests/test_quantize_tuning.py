"""Scales and norms tuned through the whole model, on text that the dense model writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import LENGTH, dense_model, some_tokens, write_dense
from safetensors.torch import load_file

import awq_rt
from awq_rt import quantize
from awq_rt.errors import InvalidSetting
from awq_rt.quantization import tuning
from awq_rt.quantization.report import JSON_NAME
from awq_rt.quantization.tuning import Teacher, write_text

STEPS = 12
SETTINGS: dict[str, Any] = {
    "group_size": 32, "calibration": some_tokens(), "length": LENGTH, "samples": 8, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short() -> Any:
    """Little text, written quickly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "STEP_TOKENS", 256)
        patch.setattr(tuning, "LENGTH", LENGTH)
        yield


@pytest.fixture(scope="module")
def plain(dense: Path) -> Path:
    """It in 4 bits, as it is before it is tuned; not to be written to."""
    quantize(dense, dense.parent / "plain", **SETTINGS)
    return dense.parent / "plain"


@pytest.fixture(scope="module")
def tuned(dense: Path) -> Path:
    """It in 4 bits and tuned; not to be written to."""
    quantize(dense, dense.parent / "tuned", tuning=STEPS, **SETTINGS)
    return dense.parent / "tuned"


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def divergence(family: str, folder: Path) -> float:
    """From the dense model's predictions to those of the checkpoint, in nats a token."""
    with torch.no_grad():
        tokens = write_text(dense_model(family), STEPS, 99, ignore)
        expected = dense_model(family)(input_ids=tokens).logits.log_softmax(-1)
        found = awq_rt.load(folder, device="cpu")(input_ids=tokens).logits.float().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def test_tuning_brings_predictions_nearer_to_the_dense_models(plain: Path, tuned: Path) -> None:
    assert divergence("llama", tuned) < 0.97 * divergence("llama", plain)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "bloom"])
def test_mixtures_capped_logits_and_biases_are_tuned_too(family: str, tmp_path: Path) -> None:
    write_dense(tmp_path / "dense", family)
    report = quantize(tmp_path / "dense", tmp_path / "out", tuning=STEPS, **SETTINGS)
    assert report.tuning is not None
    assert report.tuning.divergence_after < 0.99 * report.tuning.divergence_before
    assert divergence(family, tmp_path / "out") == pytest.approx(report.tuning.divergence_after, rel=0.5)


def test_scales_and_norms_change_and_codes_stay(plain: Path, tuned: Path) -> None:
    before, after = tensors_of(plain), tensors_of(tuned)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        changes = name.endswith(".scales") or "norm" in name
        assert torch.equal(tensor, after[name]) != changes, name
        assert tensor.dtype == after[name].dtype


def test_the_report_says_what_tuning_was_worth(tuned: Path) -> None:
    found = json.loads((tuned / JSON_NAME).read_text())["tuning"]
    assert found["steps"] == STEPS
    assert found["tokens"] == STEPS * 256 // tuning.PASSES
    assert 0 < found["divergence_after"] < found["divergence_before"]


def test_progress_is_told_of_every_part(dense: Path, tmp_path: Path) -> None:
    told: dict[str, list[tuple[int, int]]] = {}
    quantize(
        dense,
        tmp_path / "out",
        tuning=2,
        progress=lambda what, *done: told.setdefault(what, []).append(done),
        **SETTINGS,
    )
    for what in ("tuning: writing text", "tuning: reading it", "tuning"):
        parts = [done for done, _ in told[what]]
        assert parts == sorted(set(parts))
        assert told[what][-1] == (parts[-1], parts[-1])
    assert len(told["tuning: writing text"]) == LENGTH
    assert len(told["tuning"]) == 2


def test_a_tuning_that_does_harm_is_undone(
    dense: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "RATE", 1.0)
    report = quantize(dense, tmp_path / "out", tuning=STEPS, **SETTINGS)
    assert report.tuning is not None
    assert report.tuning.divergence_after == report.tuning.divergence_before
    before, after = tensors_of(plain), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("steps", [0, STEPS])
def test_blocks_of_an_interrupted_tuning_serve_with_and_without_it(
    steps: int, dense: Path, plain: Path, tuned: Path, tmp_path: Path
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "tuning" and done == STEPS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", tuning=STEPS, progress=stop, **SETTINGS)
    report = quantize(dense, tmp_path / "out", tuning=steps, **SETTINGS)
    assert report.resumed_blocks == 2
    expected, found = tensors_of(tuned if steps else plain), tensors_of(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_written_text_depends_on_the_seed_alone() -> None:
    model = dense_model("llama")
    state = torch.get_rng_state()
    first, again, other = (write_text(model, STEPS, seed, ignore) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape[1] == LENGTH
    assert len(first[:, 0].unique()) > len(first) // 2


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("qwen3_moe", 2), ("opt", 4), ("bloom", 4)])
def test_samples_are_written_side_by_side_where_their_cache_fits(
    family: str, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dense_model(family)
    each = 2 * model.config.num_hidden_layers * heads * 16 * 4 * LENGTH  # heads of 16 numbers of 4 bytes
    for room, samples in ((5 * each, 5), (6 * each - 1, 5), (each - 1, 1)):
        monkeypatch.setattr(tuning, "CACHE_BYTES", room)
        assert tuning.written_at_once(model) == samples


def test_tokens_are_drawn_as_often_as_they_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pearson's statistic of 20,000 draws, whose mean is the degrees of freedom and its variance twice these."""
    monkeypatch.setattr(tuning, "LENGTH", 2)
    draws, model = 20_000, dense_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
        first = torch.full((draws, 1), 5)
        likely = model(input_ids=first[:1]).logits[0, -1].softmax(-1)
        _, drawn = tuning._written(model, first, torch.Generator().manual_seed(0))
    counts = drawn[:, 0].bincount(minlength=len(likely)).double()
    common = draws * likely > 5  # rarer ones are counted together
    gathered = [torch.cat([each[common], each[~common].sum(0, keepdim=True)]) for each in (counts, draws * likely)]

    def statistic(expected: torch.Tensor) -> float:
        return float(((gathered[0] - expected) ** 2 / expected).sum())

    freedom = len(gathered[0]) - 1
    bound = freedom + 5 * (2 * freedom) ** 0.5
    assert freedom > 50
    assert statistic(gathered[1]) < bound
    flatter = gathered[1] ** 0.95
    assert statistic(flatter * draws / flatter.sum()) > bound


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "opt"])
def test_the_teachers_predictions_are_the_dense_models(family: str) -> None:
    model, tokens = dense_model(family), torch.tensor(some_tokens())
    with torch.no_grad():
        expected = model(input_ids=tokens[[2, 5]]).logits
    found = Teacher(model, tokens, ignore).logits(model, torch.tensor([2, 5]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{"tuning": -1}, {"tuning": 1, "method": "rtn"}])
def test_tuning_needs_text_and_a_number_of_steps(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="tuning is"):
        quantize(tmp_path, tmp_path / "out", **settings)
