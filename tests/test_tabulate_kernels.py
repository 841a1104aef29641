"""tools/tabulate_kernels.py writes what tools/bench_kernels.py records."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def row(k: int, group_size: int, m: int, us: float, **more: float) -> dict[str, Any]:
    return {"k": k, "n": 64, "group_size": group_size, "m": m, "dtype": "float16", "us": us, "floor_us": 2.0} | more


RECORD = {
    "device": "a GPU",
    "date": "2026-01-02",
    "commit": "0123456789abcdef",
    "command": "python tools/bench_kernels.py",
    "torch": "2.11",
    "read_tbps": 3.0,
    "chains": {"7b": {"us": 36.5, "read_us": 33.4}},
    "compiling": {"programs": 22, "cores": 16, "first_s": 1.5, "cached_s": 0.014},
    "rows": [
        row(128, 128, 1, 2.5, cublas_us=10.0, exllama_us=3.0, plain_us=2.6),
        row(256, 128, 1, 10.0, cublas_us=10.0, exllama_us=3.0, plain_us=2.6),
        row(128, 128, 512, 20.0, cublas_us=30.0, exllama_us=40.0),
        row(512, 128, 1, 3.0, cublas_us=9.0),
        row(128, 32, 1, 4.0, cublas_us=8.0),
    ],
}


def test_every_row_stands_in_a_table_of_its_kind() -> None:
    written = list(runpy.run_path(str(ROOT / "tools" / "tabulate_kernels.py"))["written"](RECORD, "kernels"))
    titles = [line for line in written if line.startswith("#")]
    assert titles == [
        "# The CUDA kernels on one a GPU",
        "## Group size 128",
        "## Other shapes, group size 128",
        "## Group size 32",
    ]
    assert "| 128 x 64 (2.0) | 2.5 (4.00) | 20.0 (1.50) |" in written
    assert "| 256 x 64 (2.0) | 10.0 (1.00) |  |" in written
    assert "| 512 x 64 (2.0) | 3.0 (3.00) |" in written
    assert "| 128 x 64 (2.0) | 4.0 (2.00) |" in written
    assert "| time / floor | 2.50 |  |" in written  # the root of 1.25 * 5; with 512 rows the floor means nothing
    assert "| speed / cuBLAS, 16 bits | 2.00 | 1.50 |" in written
    assert any("36.5 us; kernels that only read as many bytes: 33.4 us" in line for line in written)
    assert any("1.50 s to compile on 16 cores, 14 ms from the cache" in line for line in written)


def test_many_numbers_of_rows_are_several_tables() -> None:
    module = runpy.run_path(str(ROOT / "tools" / "tabulate_kernels.py"))
    rows = [row(128, 128, m, 1.0, cublas_us=1.0) for m in range(1, 25)]
    assert [len(counts) for counts in module["parts"](rows)] == [10, 10, 4]
    assert all(line.count("|") <= 12 for line in module["times"](rows))
