"""The quantiser on a GPU: captured steps do what plain ones do, and a checkpoint comes out that is as good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense import LENGTH, some_tokens, write_dense

import awq_rt
from awq_rt import quantize
from awq_rt.quantization import tuning
from awq_rt.quantization.feedback import round_with_feedback
from awq_rt.quantization.grid import Scheme
from awq_rt.quantization.ranges import whole_ranges


@pytest.mark.parametrize(("rows", "columns"), [(40, 192), (300, 224), (8, 32)])
def test_feedback_rounds_as_on_the_cpu(rows: int, columns: int) -> None:
    """With 64 columns at a time, with some left over, and with fewer than that."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    x = torch.randn(500, columns) @ torch.randn(columns, columns) * (2 / columns**0.5) + torch.randn(500, columns)
    moments = x.T @ x / 500
    chosen = whole_ranges(weight, Scheme(32)).grid
    expected = round_with_feedback(weight.clone(), moments, chosen, damping=0.1)
    on_gpu = type(chosen)(chosen.scales.cuda(), chosen.zeros.cuda())
    found = round_with_feedback(weight.cuda(), moments.cuda(), on_gpu, damping=0.1).cpu()
    # Sums in another order move a weight that lies between two codes; what follows then compensates another error.
    assert float((found != expected).float().mean()) < 0.05
    error, other = (((codes - chosen.zeros) * chosen.scales).flatten(1) - weight for codes in (expected, found))
    losses = [float(((part @ moments) * part).sum()) for part in (error, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    plain = chosen.rounded(weight.view(rows, -1, 32)).flatten(1) - weight
    assert float(((plain @ moments) * plain).sum()) > 1.1 * losses[0]


def test_a_model_is_as_close_to_the_dense_one_as_from_the_cpu(tmp_path: Path) -> None:
    dense = write_dense(tmp_path / "dense")
    ids = torch.tensor(some_tokens(seed=99))
    with torch.no_grad():
        expected = dense(input_ids=ids).logits
        errors = {}
        for device in ("cpu", "cuda"):
            quantize(
                tmp_path / "dense", tmp_path / device, calibration=some_tokens(), group_size=32, length=LENGTH,
                samples=8, device=device,
            )  # fmt: skip
            found = awq_rt.load(tmp_path / device, device="cpu")(input_ids=ids).logits
            errors[device] = float((found - expected).norm() / expected.norm())
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.2)


def test_tuning_brings_predictions_nearer_to_the_dense_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "STEP_TOKENS", 256)
    monkeypatch.setattr(tuning, "LENGTH", LENGTH)
    write_dense(tmp_path / "dense")
    report = quantize(
        tmp_path / "dense", tmp_path / "out", calibration=some_tokens(), group_size=32, length=LENGTH, samples=8,
        tuning=12, device="cuda",
    )  # fmt: skip
    assert report.tuning is not None
    assert report.tuning.divergence_after < 0.99 * report.tuning.divergence_before
