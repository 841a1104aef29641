"""tools/plot_kernels.py draws what tools/bench_kernels.py records."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "kernels-h100.json"


def test_the_recorded_grid_is_drawn_with_a_line_for_every_shape_and_one_for_their_mean() -> None:
    record = json.loads(RECORD.read_text())
    first = [row for row in record["rows"] if row["group_size"] == record["rows"][0]["group_size"]]
    shapes = {(row["k"], row["n"]) for row in first}
    figure = runpy.run_path(str(ROOT / "tools" / "plot_kernels.py"))["draw"](record)
    by_floor, by_cublas = figure.axes
    for axes in (by_floor, by_cublas):
        ours = [line for line in axes.lines if line.get_color() == "tab:blue"]
        assert len(ours) == len(shapes) + 1
    mean = next(line for line in by_cublas.lines if line.get_label() == "awq_rt")
    at_one = [row["cublas_us"] / row["us"] for row in first if row["m"] == 1]
    assert min(at_one) <= mean.get_ydata()[0] <= max(at_one)
    assert record["device"] in figure.get_suptitle()
