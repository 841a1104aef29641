"""Write what tools/bench_kernels.py recorded as tables in Markdown, beside the file.

python tools/tabulate_kernels.py benchmarks/kernels-h100.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

RATIOS: dict[str, tuple[str, str]] = {
    "time / floor": ("us", "floor_us"),
    "time / floor, plain launches": ("plain_us", "floor_us"),
    "exllama / floor": ("exllama_us", "floor_us"),
    "speed / cuBLAS, 16 bits": ("cublas_us", "us"),
    "speed / torch int4": ("torch_int4_us", "us"),
}
MOST_ROWS_BY_FLOOR = 128
"""Beyond it the arithmetic is the limit, not the bytes that the floor counts."""
COLUMNS = 10
"""Of a table; more rows of x are another table."""


def main() -> None:
    """Read the record, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    options = parser.parse_args()
    page = "\n".join(written(json.loads(options.record.read_text()), options.record.stem)) + "\n"
    options.record.with_suffix(".md").write_text(page)


def written(record: dict[str, Any], name: str) -> Iterator[str]:
    """The page, line by line."""
    rows: list[Row] = record["rows"]
    first = rows[0]["group_size"]
    compared = {(row["k"], row["n"]) for row in rows if "exllama_us" in row}
    whole = [row for row in rows if row["group_size"] == first and (row["k"], row["n"]) in compared]
    yield f"# The CUDA kernels on one {record['device']}"
    yield ""
    yield (
        f"{record['date']}, commit {record['commit'][:12]}, torch {record['torch']}, reads {record['read_tbps']:.3f} "
        f"TB/s. `{record['command']}`"
    )
    yield ""
    yield (
        f"us of one linear (speed over cuBLAS in 16 bits in brackets), {rows[0]['dtype']}, weights from device memory, "
        f"kernels started early. A result is checked against float64 before it is timed. All rows, and what served "
        f"each, are in `{name}.json`; what it means in `../backends/cuda/NOTES.md`."
    )
    yield ""
    yield f"![time over the floor and speed over cuBLAS]({name}.png)"
    yield ""
    yield f"## Group size {first}"
    yield ""
    yield from times(whole)
    yield f"Geometric means over these {len(compared)} shapes:"
    yield ""
    yield from means(whole)
    for title, some in others(rows, whole, first):
        yield f"## {title}"
        yield ""
        yield from times(some)
        yield "Geometric means:"
        yield ""
        yield from means(some)
    for model, chain in record["chains"].items():
        yield (
            f"One row through the linears of a layer of {model}, each kernel started early: {chain['us']:.1f} us; "
            f"kernels that only read as many bytes: {chain['read_us']:.1f} us."
        )
        yield ""
    if compiling := record["compiling"]:
        yield (
            f"The {compiling['programs']} kernels that a Llama 2 7B needs: {compiling['first_s']:.2f} s to compile on "
            f"{compiling['cores']} cores, {compiling['cached_s'] * 1000:.0f} ms from the cache."
        )


def others(rows: Iterable[Row], whole: Sequence[Row], first: int) -> Iterator[tuple[str, list[Row]]]:
    """Titles and rows of what is not in `whole`."""
    rest = [row for row in rows if row not in whole]
    for group_size in sorted({row["group_size"] for row in rest}, reverse=True):
        title = f"Other shapes, group size {first}" if group_size == first else f"Group size {group_size}"
        yield title, [row for row in rest if row["group_size"] == group_size]


def times(rows: Sequence[Row]) -> Iterator[str]:
    """A line a shape, a column a number of rows of x."""
    shapes = list(dict.fromkeys((row["k"], row["n"], row["floor_us"]) for row in rows))

    def cell(shape: tuple[int, int, float], m: int) -> str:
        found = [row for row in rows if (row["k"], row["n"]) == shape[:2] and row["m"] == m]
        return f"{found[0]['us']:.1f} ({found[0]['cublas_us'] / found[0]['us']:.2f})" if found else ""

    labels = {shape: f"{shape[0]} x {shape[1]} ({shape[2]:.1f})" for shape in shapes}
    for counts in parts(rows):
        lines = {labels[shape]: [cell(shape, m) for m in counts] for shape in shapes}
        yield from table("K x N (floor)", counts, lines)


def means(rows: Sequence[Row]) -> Iterator[str]:
    """A line a ratio, a column a number of rows of x."""

    def cell(over: str, under: str, m: int) -> str:
        if under == "floor_us" and m > MOST_ROWS_BY_FLOOR:
            return ""
        logs = [math.log(row[over] / row[under]) for row in rows if row["m"] == m and over in row]
        return f"{math.exp(sum(logs) / len(logs)):.2f}" if logs else ""

    for counts in parts(rows):
        lines = {name: [cell(*keys, m) for m in counts] for name, keys in RATIOS.items()}
        yield from table("", counts, {name: cells for name, cells in lines.items() if any(cells)})


def parts(rows: Sequence[Row]) -> list[list[int]]:
    """The numbers of rows of x, as many as a table holds at a time."""
    counts = sorted({row["m"] for row in rows})
    return [counts[at : at + COLUMNS] for at in range(0, len(counts), COLUMNS)]


def table(corner: str, counts: Sequence[int], lines: dict[str, list[str]]) -> Iterator[str]:
    join: Callable[[Iterable[str]], str] = " | ".join
    yield f"| {join([corner, *(f'M = {m}' for m in counts)])} |"
    yield "|---" * (len(counts) + 1) + "|"
    for label, cells in lines.items():
        yield f"| {join([label, *cells])} |"
    yield ""


if __name__ == "__main__":
    main()
