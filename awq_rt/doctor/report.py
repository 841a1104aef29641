"""The doctor's answer as values: what was found wrong, how bad that is, and the facts behind it."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

from .. import __version__, codes
from ..devices import Device, Refusal, Tool

SCHEMA = "awq-rt.doctor/1"
"""Grows by new keys under the same number; a key that changes its meaning or goes away raises it. See schema.json."""


SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Dtypes of activations, as verdicts call them."""


class Verdict(enum.IntEnum):
    """How much works; the value is the exit code."""

    READY = 0
    DEGRADED = 1
    UNUSABLE = 2


BUG = 3
"""The exit code of a doctor that failed itself."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing worth knowing: a stable code, the reason, and a command to copy. `verdict` is the best it allows."""

    code: str
    verdict: Verdict
    reason: str
    command: str

    @property
    def cause(self) -> str:
        """Why such a thing happens; "" for the code of a stranger's plugin."""
        known = codes.known(self.code)
        return known.cause if known else ""

    @property
    def page(self) -> str:
        """Where the documentation explains it; "" for the code of a stranger's plugin."""
        known = codes.known(self.code)
        return known.page if known else ""


class Status(enum.Enum):
    """What came of a check."""

    OK = "ok"
    NOTE = "note"  # there are findings, all of which leave the machine ready
    DEGRADED = "degraded"
    UNUSABLE = "unusable"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of one check: `says` is what was found in a line, or why nothing was looked at."""

    name: str
    status: Status
    says: str
    findings: tuple[Finding, ...]


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
    tools: tuple[Tool, ...] = ()


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
    arches: tuple[str, ...] = ()  # GPU architectures it was compiled for: sm_90, compute_90, gfx942


@dataclass(frozen=True, slots=True)
class Offer:
    """What a backend answers when asked for a kernel family and a dtype, for checkpoints in any of `layouts`."""

    device: str
    backend: str
    kernel: str
    dtype: str
    layouts: tuple[str, ...]
    status: str  # "selected" (what kernel="auto" takes), "available" (when asked for) or "rejected"
    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelRun:
    """A kernel that was run against the reference, in a process of its own.

    `excess` is the largest error over its bound, at most 1 for a right kernel; None where there is no such number.
    `latency_us` is one product of a vector with the matrix `shape` (K, N), `bandwidth_share` the packed weight's bytes
    over that time over the device's read bandwidth.
    """

    device: str
    backend: str
    kernel: str
    dtype: str
    status: str  # "right", "wrong", "not finite", "hung", "died", "raised" or "not run"
    excess: float | None = None
    latency_us: float | None = None
    bandwidth_share: float | None = None
    shape: tuple[int, int] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Memory:
    """The memory that a model is predicted to take on `device`, in bytes; `available` is what is free there now."""

    device: str
    weights: int
    cache: int  # keys and values of `positions`
    positions: int
    moment: int  # what packing the largest linear, or reading the prompt, needs beside
    runtime: int  # the device's context, kernels and libraries
    available: int

    @property
    def peak(self) -> int:
        """What must be free."""
        return self.weights + self.cache + self.moment + self.runtime


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a checkpoint from its headers and its configuration."""

    source: str
    architecture: str
    layout: str
    group_sizes: tuple[int, ...]
    linears: int
    file_bytes: int
    served: tuple[tuple[str, int], ...]  # (backend, linears that it serves)
    unsupported: tuple[tuple[str, str], ...]  # (linear, why the device's backend does not serve it)
    memory: Memory
    tensor_parallel: tuple[int, ...]  # legal numbers of processes
    tensor_parallel_limit: str  # why no more, or none
    remote_code: tuple[str, ...]  # classes of its own that the configuration names
    needs_remote_code: bool
    pickles: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything the doctor knows; `checks` in the order of looking, `findings` worst first."""

    summary: str
    checks: tuple[Checked, ...]
    system: dict[str, str]
    environment: dict[str, str]
    packages: tuple[Package, ...]
    torch: Torch | None
    devices: tuple[Device, ...]
    refusals: tuple[Refusal, ...]
    plugins: tuple[PluginState, ...]
    selection: tuple[Offer, ...]
    kernels: tuple[KernelRun, ...]
    model: Model | None = None
    strict: bool = False

    @property
    def findings(self) -> tuple[Finding, ...]:
        found = [finding for check in self.checks for finding in check.findings]
        return tuple(sorted(found, key=lambda finding: -finding.verdict))

    @property
    def verdict(self) -> Verdict:
        """The worst that a finding allows; where `strict`, nothing that was found leaves the machine ready."""
        least = Verdict.DEGRADED if self.strict and self.findings else Verdict.READY
        return max((least, *(finding.verdict for finding in self.findings)))

    def to_json(self) -> dict[str, Any]:
        """Plain values under `SCHEMA`."""
        facts = asdict(self)
        del facts["strict"]
        answer: dict[str, Any] = {
            "schema": SCHEMA,
            "awq_rt": __version__,
            "verdict": self.verdict.name.lower(),
            "exit_code": int(self.verdict),
            **facts,
            "findings": [_finding(finding) for finding in self.findings],
            "checks": [
                {
                    "name": check.name,
                    "status": check.status.value,
                    "says": check.says,
                    "codes": [finding.code for finding in check.findings],
                }
                for check in self.checks
            ],
        }
        if self.model is not None:
            answer["model"]["memory"]["peak"] = self.model.memory.peak
        return answer


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "verdict": finding.verdict.name.lower(),
        "reason": finding.reason,
        "cause": finding.cause,
        "command": finding.command,
        "page": finding.page,
    }
