"""The figures of one run as a picture. Needs matplotlib."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from .report import Result, Row

PANELS = (
    ("prefill_tps", "prefill, tokens/s"),
    ("decode_tps", "decode, tokens/s"),
    ("share_of_limit", "decode, share of the bandwidth limit"),
)


def write_png(result: Result, path: Path) -> None:
    """Prefill, decoding, and decoding as a share of the limit, over the prompt's length. A colour for each batch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    figure.suptitle(f"{', '.join(dict.fromkeys(row.model for row in result.rows))} in 4 bits on {result.device}")
    lengths = sorted({row.prefill for row in result.rows})
    axes: Any = figure.subplots(1, len(PANELS))
    for axis, (values, title) in zip(axes, PANELS, strict=True):
        axis.set_title(title)
        axis.set_xlabel("tokens of a prompt")
        axis.set_xscale("log")
        axis.set_xticks(lengths, labels=map(str, lengths))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
        _draw(axis, result.rows, values)
        axis.set_ylim(bottom=0)
    axes[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder, path.name)
        figure.savefig(part, format="png", dpi=120)
        os.replace(part, path)


def _draw(axis: Any, rows: list[Row], values: str) -> None:
    """`values` of every batch: solid fused, dashed unfused, dotted in float16."""
    kinds = (("fused", values, True, "o-"), ("unfused", values, False, "s--"), ("fp16", f"fp16_{values}", None, "x:"))
    for number, batch in enumerate(dict.fromkeys(row.batch for row in rows)):
        for kind, name, fused, style in kinds:
            points = {
                row.prefill: getattr(row, name)
                for row in rows
                if row.batch == batch and fused in (None, row.fused) and getattr(row, name, None) is not None
            }
            if points:
                axis.plot(points.keys(), points.values(), style, color=f"C{number}", label=f"batch {batch}, {kind}")
