"""Draw what tools/bench_kernels.py recorded: time over the floor, and speed beside cuBLAS, over the rows of x.

    python tools/plot_kernels.py benchmarks/kernels-h100.json

The picture lies beside the file. Thin lines are shapes, thick ones geometric means over them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = {
    # label: (key of the time, colour)
    "awq_rt": ("us", "tab:blue"),
    "awq_rt, kernel=exllama": ("exllama_us", "tab:orange"),
    "torch int4 (bfloat16)": ("torch_int4_us", "tab:green"),
    "cuBLAS, 16 bits": ("cublas_us", "tab:gray"),
}
MOST_ROWS_BY_FLOOR = 128
"""Beyond it the arithmetic is the limit, not the bytes that the floor counts."""


def main() -> None:
    """Read the record, write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    options = parser.parse_args()
    drawn = draw(json.loads(options.record.read_text()))
    drawn.savefig(options.record.with_suffix(".png"), dpi=110)


def draw(record: dict[str, Any]) -> Figure:
    """Two panels for the first group size of the record."""
    group_size = record["rows"][0]["group_size"]
    rows = [row for row in record["rows"] if row["group_size"] == group_size]
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for label, (key, colour) in SERIES.items():
        few = [row for row in rows if row["m"] <= MOST_ROWS_BY_FLOOR]
        _lines(left, few, label, key, "floor_us", colour)
        if key != "cublas_us":
            _lines(right, rows, label, "cublas_us", key, colour)
    _labels(left, "time / floor (1 is the time to read the packed weight)")
    _labels(right, "speed / cuBLAS, 16 bits")
    left.set_ylim(0.9, 8)
    figure.suptitle(
        f"{record['device']}, {record['date']}, commit {record['commit'][:12]}, torch {record['torch']}: "
        f"{rows[0]['dtype']}, group {group_size}, reads {record['read_tbps']:.2f} TB/s"
    )
    return figure


def _lines(axes: Axes, rows: Iterable[dict[str, Any]], label: str, over: str, under: str, colour: str) -> None:
    by_shape: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in rows:
        if over in row and under in row:
            by_shape[row["k"], row["n"]][row["m"]] = row[over] / row[under]
    for points in by_shape.values():
        axes.plot(list(points), list(points.values()), color=colour, linewidth=0.5, alpha=0.4)
    together: dict[int, list[float]] = defaultdict(list)
    for points in by_shape.values():
        for m, ratio in points.items():
            together[m].append(math.log(ratio))
    if together:
        means = {m: math.exp(sum(logs) / len(logs)) for m, logs in sorted(together.items())}
        axes.plot(list(means), list(means.values()), color=colour, linewidth=2, marker=".", label=label)


def _labels(axes: Axes, what: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("rows of x")
    axes.set_ylabel(what)
    axes.grid(visible=True, which="both", linewidth=0.3)
    axes.legend()


if __name__ == "__main__":
    main()
