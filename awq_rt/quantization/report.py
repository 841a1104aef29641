"""What a run did, layer by layer: JSON for programs, a plot for people."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_NAME, PLOT_NAME = "quantization_report.json", "quantization_report.png"


@dataclass(frozen=True, slots=True)
class GroupReport:
    """A scaling group's search: exact losses with the identity and with what was chosen, both of nearest rounding."""

    producer: str
    consumers: tuple[str, ...]
    choice: str
    loss_before: float
    loss_after: float


@dataclass(frozen=True, slots=True)
class LinearReport:
    """A linear: E|(W - Q) x|^2 over E|W x|^2, W smoothed, by nearest rounding and as stored; share of groups
    clipped.

    Losses are None where no text was used. `tokens` is what it saw; an expert with too few is in `notes` of its block.
    """

    name: str
    loss_before: float | None
    loss_after: float | None
    clipped: float
    tokens: int


@dataclass(frozen=True, slots=True)
class BlockReport:
    """A decoder block. `dense` are linears left in floating point with the reason; `unscaled` those in no scaling
    group."""

    name: str
    seconds: float
    groups: tuple[GroupReport, ...] = ()
    linears: tuple[LinearReport, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)
    unscaled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> BlockReport:
        groups = tuple(GroupReport(**{**g, "consumers": tuple(g["consumers"])}) for g in value["groups"])
        linears = tuple(LinearReport(**linear) for linear in value["linears"])
        rest = {name: tuple(value[name]) for name in ("unscaled", "notes")}
        return cls(value["name"], value["seconds"], groups, linears, value["dense"], **rest)


@dataclass(frozen=True, slots=True)
class TuningReport:
    """`tokens` were written and learnt from in `steps`; the mean divergence (nats a token) on held-out samples."""

    steps: int
    tokens: int
    divergence_before: float
    divergence_after: float


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run."""

    destination: Path
    settings: dict[str, Any]
    calibration: str | None
    tokens: int
    device: str
    seconds: float
    blocks: tuple[BlockReport, ...]
    resumed_blocks: int = 0
    tuning: TuningReport | None = None

    @property
    def linears(self) -> int:
        return sum(len(block.linears) for block in self.blocks)

    @property
    def dense(self) -> dict[str, str]:
        """Linears of blocks that were left in floating point -> why."""
        return {name: reason for block in self.blocks for name, reason in block.dense.items()}

    @property
    def notes(self) -> list[str]:
        """What a person should know: unpacked and unscaled linears, experts that saw too little."""
        said = [note for block in self.blocks for note in block.notes]
        if dense := self.dense:
            first, reason = next(iter(dense.items()))
            said.append(f"{len(dense)} linears were left in floating point, {first} first: {reason}")
        unscaled = [name for block in self.blocks for name in block.unscaled]
        if unscaled:
            said.append(
                f"{len(unscaled)} linears were left unscaled, as nothing before them can be divided: {unscaled[0]}"
            )
        return said

    def to_json(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in ("settings", "calibration", "tokens", "device", "seconds")}
        tuning = None if self.tuning is None else asdict(self.tuning)
        blocks = [block.to_json() for block in self.blocks]
        return {**value, "resumed_blocks": self.resumed_blocks, "tuning": tuning, "blocks": blocks}


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write the JSON and, where matplotlib is installed, the plot into `folder`; returns what was written."""
    written = [folder / JSON_NAME]
    _replace(written[0], (json.dumps(report.to_json(), indent=1) + "\n").encode())
    plot = _plot(report.blocks)
    if plot is not None:
        written.append(folder / PLOT_NAME)
        _replace(written[1], plot)
    return written


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _plot(blocks: Sequence[BlockReport]) -> bytes | None:
    """A PNG of every linear's relative loss over the blocks; None without matplotlib, or without losses to show."""
    try:
        import io

        from matplotlib.figure import Figure
    except ImportError:
        return None
    kinds: dict[str, list[tuple[int, float, float]]] = {}
    for number, block in enumerate(blocks):
        for linear in block.linears:
            if linear.loss_before is not None and linear.loss_after is not None and ".experts." not in linear.name:
                kind = linear.name.removeprefix(f"{block.name}.")
                kinds.setdefault(kind, []).append((number, linear.loss_before, linear.loss_after))
    if not kinds:
        return None
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for kind, points in kinds.items():
        numbers, before, after = zip(*points, strict=True)
        (line,) = axes.semilogy(numbers, after, label=kind)
        axes.semilogy(numbers, before, color=line.get_color(), linestyle=":")
    axes.set_xlabel("decoder block")
    axes.set_ylabel("E|(W - Q)x|² / E|Wx|²   (dotted: nearest rounding)")
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
