"""A model, from its headers and its configuration."""

from __future__ import annotations

from collections.abc import Iterator

from ...codes import CODES
from ..facts import Facts
from ..report import Finding, Verdict
from .finding import finding


def say_model(facts: Facts) -> str:
    model = facts.model
    if model is None:
        return f"{facts.request.model} was not read" if facts.request.model is not None else ""
    groups = ", ".join(map(str, model.group_sizes))
    memory = model.memory
    return (
        f"{model.source}: {model.architecture}, layout {model.layout}, group size {groups}, {model.linears} linears; "
        f"needs {memory.peak / 2**30:.2f} GiB on {memory.device} for {memory.positions} positions, "
        f"{memory.available / 2**30:.2f} GiB are free"
    )


def find_model(facts: Facts) -> Iterator[Finding]:
    if facts.model_error is not None:
        code, reason = facts.model_error
        yield _about_model(code, Verdict.UNUSABLE, reason, facts.request.model or "MODEL")
    model = facts.model
    if model is None:
        return
    memory = model.memory
    if memory.peak > memory.available:
        reason = (
            f"{model.source} needs about {memory.peak / 2**30:.2f} GiB on {memory.device} ({memory.positions} "
            f"positions); {memory.available / 2**30:.2f} GiB are free"
        )
        yield _about_model("AWQ-MODEL-001", Verdict.UNUSABLE, reason, model.source)
    if model.needs_remote_code:
        reason = f"{model.source} needs the Python code that comes with it: {', '.join(model.remote_code)}"
        yield _about_model("AWQ-CKPT-014", Verdict.DEGRADED, reason, model.source)
    if model.unsupported:
        name, why = model.unsupported[0]
        reason = f"{len(model.unsupported)} linears, {name} first, run on the reference: {why}"
        yield _about_model("AWQ-MODEL-002", Verdict.DEGRADED, reason, model.source)
    if model.pickles:
        reason = f"{model.source} keeps its weights in pickles: {', '.join(model.pickles)}"
        yield _about_model("AWQ-MODEL-003", Verdict.READY, reason, model.source)


def _about_model(code: str, verdict: Verdict, reason: str, source: str) -> Finding:
    return finding(code, verdict, reason, CODES[code].command.replace("MODEL", source))
