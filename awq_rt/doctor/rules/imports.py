"""The imports of torch and transformers, and the engine's other steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..facts import Facts
from ..report import Finding, Verdict
from .finding import finding

STEPS: Mapping[str, tuple[str, ...]] = {
    "torch": (),
    "transformers": ("torch",),
    "plugins": ("torch",),
    "selection": ("torch", "plugins"),
}
"""Of the engine, and those without which a step has nothing to say."""


def say_torch(facts: Facts) -> str:
    torch = facts.torch
    if torch is None:
        return ""
    build = f"CUDA {torch.cuda}" if torch.cuda else f"HIP {torch.hip}" if torch.hip else "the CPU only"
    arches = f", compiled for {', '.join(torch.arches)}" if torch.arches else ""
    return f"torch {torch.version}, built for {build}{arches}"


def find_torch(facts: Facts) -> Iterator[Finding]:
    yield from of_step("torch", facts)


def say_transformers(facts: Facts) -> str:
    version = facts.steps.get("transformers", {}).get("version")
    return f"transformers {version}" if version else ""


def find_transformers(facts: Facts) -> Iterator[Finding]:
    yield from of_step("transformers", facts)


def of_step(step: str, facts: Facts) -> Iterator[Finding]:
    """What raised in a step of the engine, or took it down or never returned."""
    if any("error" in facts.steps.get(before, {"error": "never got there"}) for before in STEPS[step]):
        return
    outcome = facts.transformers if step == "transformers" else facts.outcome
    wanted = {package.name: package.name + package.supported for package in facts.packages}.get(step, step)
    doing = {"plugins": "looking for backends", "selection": "asking backends what they serve"}.get(
        step, f"`import {step}`"
    )
    ours = step in ("plugins", "selection")
    family = f"AWQ-{step.upper()}"
    if step not in facts.steps:
        reason = f"{doing} {outcome.ending or 'ended its process'}: {outcome.complaint}"
        if "SIGILL" in outcome.ending:
            reason += " (the processor lacks an instruction that this build uses)"
        yield finding("AWQ-BACKEND-019" if ours else f"{family}-003", Verdict.UNUSABLE, reason)
        return
    error = facts.steps[step].get("error")
    if error is None:
        return
    if ours:
        yield finding("AWQ-BACKEND-019", Verdict.UNUSABLE, f"{doing} raised {error}")
    elif facts.steps[step]["missing"] == step:
        yield finding(f"{family}-001", Verdict.UNUSABLE, f"{step} is not installed", f"pip install '{wanted}'")
    else:
        command = f"pip install --force-reinstall '{wanted}'"
        yield finding(f"{family}-002", Verdict.UNUSABLE, f"{doing} raised {error}", command)
