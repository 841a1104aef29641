"""The figures of one run, as Markdown and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from .. import __version__

NO_FIGURE = "-"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one model. `failure` says why it has no figures, where it has none."""

    model: str
    batch: int
    prefill: int
    decode: int
    fused: bool
    prefill_tps: float | None = None  # tokens of all prompts over the time to the first answer token
    decode_tps: float | None = None  # tokens of all rows over the time from there on
    memory_gb: float | None = None  # 1e9 bytes, over what was taken before the model was loaded
    share_of_limit: float | None = None  # decode_tps over what the read bandwidth allows
    gpu_idle_share: float | None = None  # of a decoding step
    engine_prefill_tps: float | None = None  # tokens of all prompts over the time from the ids to the first token
    share_of_matmul: float | None = None  # operations of the prompt over the rate of a large matrix product
    fp16_prefill_tps: float | None = None
    fp16_decode_tps: float | None = None
    beside_gb: float | None = None  # of memory_gb, what is neither weights nor keys and values; None on a CPU
    failure: str | None = None

    @property
    def speed_up(self) -> float | None:
        """Of a token, over float16."""
        if self.decode_tps is None or self.fp16_decode_tps is None:
            return None
        return self.decode_tps / self.fp16_decode_tps


@dataclass(frozen=True, slots=True)
class LoadTime:
    """`awq_rt.load` beside reading the same files to the device, both from the page cache."""

    model: str
    seconds: float
    read_seconds: float
    nbytes: int


@dataclass(slots=True)
class Result:
    """Everything that one command measured."""

    device: str
    command: str
    read_tbps: float
    matmul_tflops: float | None = None  # of torch's product of two float16 matrices of 8192 x 8192; None on a CPU
    rows: list[Row] = field(default_factory=list)
    loads: list[LoadTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "date": date.today().isoformat(),
            "commit": commit(),
            "command": self.command,
            "torch": torch.__version__,
            "read_tbps": round(self.read_tbps, 4),
            "matmul_tflops": _rounded(self.matmul_tflops),
            "rows": [{name: _rounded(value) for name, value in asdict(row).items()} for row in self.rows],
            "loads": [asdict(load) for load in self.loads],
            "notes": self.notes,
        }

    def write_json(self, path: Path) -> None:
        """Whole or not at all."""
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, path.name)
            part.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)


@dataclass(frozen=True, slots=True)
class Table:
    """Names of columns, and rows of as many cells."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]


def speed_table(result: Result) -> Table:
    """AWQ's table: tokens a second by batch and lengths. Columns with no figure at all are left out."""
    names = (
        "model", "batch", "prefill", "decode", "decoder", "prefill tokens/s", "decode tokens/s", "of the limit",
        "GPU idle", "memory", "beside weights and cache", "engine's prefill", "of a matmul",
        "fp16 prefill tokens/s", "fp16 decode tokens/s",
    )  # fmt: skip
    rows = [
        (
            row.model,
            str(row.batch),
            str(row.prefill),
            str(row.decode),
            "fused" if row.fused else "unfused",
            _figure(row.prefill_tps, ".0f"),
            _figure(row.decode_tps, ".1f"),
            _figure(row.share_of_limit, ".1%"),
            _figure(row.gpu_idle_share, ".1%"),
            _figure(row.memory_gb, ".2f", " GB"),
            _figure(row.beside_gb, ".2f", " GB"),
            _figure(row.engine_prefill_tps, ".0f"),
            _figure(row.share_of_matmul, ".1%"),
            _figure(row.fp16_prefill_tps, ".0f"),
            _figure(row.fp16_decode_tps, ".1f"),
        )
        for row in result.rows
    ]
    return _without_empty_columns(Table(names, rows))


def latency_table(result: Result) -> Table:
    """The AutoAWQ README's form: milliseconds a token in float16 and in 4 bits, and how many times faster that is."""
    names = ("model", "batch", "prefill", "decoder", "FP16 latency (ms)", "INT4 latency (ms)", "speed-up")
    rows = [
        (
            row.model,
            str(row.batch),
            str(row.prefill),
            "fused" if row.fused else "unfused",
            _figure(_step_ms(row.batch, row.fp16_decode_tps), ".2f"),
            _figure(_step_ms(row.batch, row.decode_tps), ".2f"),
            _figure(row.speed_up, ".2f", "x"),
        )
        for row in result.rows
        if row.speed_up is not None
    ]
    return Table(names, rows)


def sentences(result: Result) -> Iterable[str]:
    """What a reader of the tables needs to know beside them."""
    multiplies = "" if result.matmul_tflops is None else f", multiplies {result.matmul_tflops:.0f} TFLOP/s"
    yield f"{result.device}; reads {result.read_tbps:.3f} TB/s{multiplies}"
    for load in result.loads:
        yield (
            f"{load.model} loads in {load.seconds:.2f} s; its {load.nbytes / 1e9:.2f} GB are read to the device in "
            f"{load.read_seconds:.2f} s: {load.seconds / load.read_seconds:.2f}x"
        )
    yield from result.notes
    for row in result.rows:
        if row.failure is not None:
            yield f"{row.model}, batch {row.batch}, prefill {row.prefill}: {row.failure}"


def markdown(table: Table) -> str:
    """The table as Markdown, its columns aligned for reading as they are."""
    widths = [max(map(len, column)) for column in zip(table.names, *table.rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))} |"

    return "\n".join(map(line, (table.names, rule, *table.rows)))


def commit() -> str:
    """The commit of the sources in use, or their release where they are installed."""
    if not (ROOT / ".git").exists():
        return f"release {__version__}"
    done = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "uncommitted"


def _step_ms(batch: int, tps: float | None) -> float | None:
    return None if tps is None else 1e3 * batch / tps


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return NO_FIGURE if value is None else f"{value:{form}}{unit}"


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


def _without_empty_columns(table: Table) -> Table:
    kept = [column for column in range(len(table.names)) if any(row[column] != NO_FIGURE for row in table.rows)]
    return Table([table.names[column] for column in kept], [[row[column] for column in kept] for row in table.rows])
