"""The doctor's answer as values: what was found wrong, how bad that is, and the facts behind it."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__
from ..devices import Device, Refusal

SCHEMA = "awq-rt.doctor/1"
"""Grows by new keys under the same number; a key that changes its meaning or goes away raises it."""


class Verdict(enum.IntEnum):
    """How much works; the value is the exit code."""

    READY = 0
    DEGRADED = 1
    UNUSABLE = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing: a stable code, the reason, and a command to copy. `verdict` is the best it allows."""

    code: str
    verdict: Verdict
    reason: str
    command: str


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that awq_rt requires: the versions it supports, the one installed ("" when absent), what of it."""

    name: str
    supported: str
    installed: str
    status: str  # "ok", "unsupported" or "missing"


@dataclass(frozen=True, slots=True)
class PluginState:
    """An installed backend plugin: loaded, with what its probe found and did not, or quarantined (`refusal`)."""

    name: str
    distribution: str
    version: str
    priority: int | None
    kernels: tuple[str, ...]
    devices: tuple[Device, ...]
    undriven: tuple[Refusal, ...]
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Torch:
    """What torch says of itself after it was imported."""

    version: str
    cuda: str  # the CUDA version it was built for, or ""
    hip: str
    path: str
    threads: int
    unreachable: str  # why it reaches no GPU, or ""
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the doctor knows, worst finding first."""

    summary: str
    findings: tuple[Finding, ...]
    system: dict[str, str]
    environment: dict[str, str]
    packages: tuple[Package, ...]
    torch: Torch | None
    devices: tuple[Device, ...]
    refusals: tuple[Refusal, ...]
    plugins: tuple[PluginState, ...]

    @property
    def verdict(self) -> Verdict:
        return max((finding.verdict for finding in self.findings), default=Verdict.READY)

    def to_json(self) -> dict[str, Any]:
        """Plain values under `SCHEMA`."""
        answer: dict[str, Any] = {
            "schema": SCHEMA,
            "awq_rt": __version__,
            "verdict": self.verdict.name.lower(),
            "exit_code": int(self.verdict),
            **asdict(self),
        }
        for finding in answer["findings"]:
            finding["verdict"] = Verdict(finding["verdict"]).name.lower()
        return answer
