"""Plugins, what they compile with, what they serve, and what came of running their kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..facts import Facts
from ..report import SHORT, Finding, KernelRun, Verdict
from .finding import finding
from .gpus import TORCH_REACHES_NO_GPU
from .imports import of_step

KERNEL_CODES = {"wrong": "AWQ-KERNEL-001", "hung": "AWQ-KERNEL-002", "not finite": "AWQ-KERNEL-003",
                "died": "AWQ-KERNEL-004", "raised": "AWQ-KERNEL-005"}  # fmt: skip


def say_compiler(facts: Facts) -> str:
    return "; ".join(
        f"{tool.name} {tool.version}" + (f" in {tool.path}" if tool.path else "")
        for plugin in facts.plugins
        for tool in plugin.tools
    )


def say_plugins(facts: Facts) -> str:
    told = []
    for plugin in facts.plugins:
        if plugin.refusal is not None:
            told.append(f"{plugin.name} {plugin.version} quarantined [{plugin.refusal.code}]")
        else:
            state = "loaded" if plugin.devices else "loaded, drives nothing here"
            told.append(f"{plugin.name} {plugin.version} {state}")
    return ", ".join(told)


def find_plugins(facts: Facts) -> Iterator[Finding]:
    yield from of_step("plugins", facts)
    for plugin in facts.plugins:
        if plugin.refusal is not None and plugin.refusal.code != TORCH_REACHES_NO_GPU:  # `find_gpus` says that
            reason = f"backend {plugin.name!r} is quarantined: {plugin.refusal.reason}; {plugin.refusal.fix}"
            action = "uninstall" if plugin.refusal.code == "AWQ-BACKEND-017" else "install --upgrade --force-reinstall"
            yield Finding(plugin.refusal.code, Verdict.DEGRADED, reason, f"pip {action} {plugin.distribution}")
        for refusal in plugin.undriven:
            if refusal.code in ("AWQ-CPU-001", "AWQ-CPU-002"):
                reason = f"backend {plugin.name!r} drives nothing: {refusal.reason}"
                yield finding(refusal.code, Verdict.DEGRADED, reason)
    known = "plugins" in facts.steps.get("plugins", {})
    if known and all(plugin.refusal is not None for plugin in facts.plugins):
        yield finding("AWQ-BACKEND-005", Verdict.UNUSABLE, "no backend could be loaded")


def say_selection(facts: Facts) -> str:
    selected = [offer for offer in facts.offers if offer.status == "selected"]
    by_place: dict[tuple[str, str], list[str]] = {}
    for offer in selected:
        names = by_place.setdefault((offer.device, offer.backend), [])
        if SHORT[offer.dtype] not in names:
            names.append(SHORT[offer.dtype])
    return "; ".join(f"{device}: {backend} for {'/'.join(names)}" for (device, backend), names in by_place.items())


def find_selection(facts: Facts) -> Iterator[Finding]:
    yield from of_step("selection", facts)


def say_kernels(facts: Facts) -> str:
    if not facts.kernels:
        return ""
    right = sum(run.status == "right" for run in facts.kernels)
    return f"{right} of {len(facts.kernels)} agree with the reference"


def find_kernels(facts: Facts) -> Iterator[Finding]:
    kept = ("AWQ_RT_CACHE", "AWQ_RT_EXAMINATION_TIMEOUT")
    ours = sorted(name for name in os.environ if name.startswith("AWQ_RT_") and name not in kept)
    settings = [f"{name}={os.environ[name]}" for name in ours]
    by_fault: dict[tuple[str, str, str], list[KernelRun]] = {}
    for run in facts.kernels:
        if run.status in KERNEL_CODES:
            by_fault.setdefault((run.status, run.backend, run.device), []).append(run)
    for (status, backend, device), runs in by_fault.items():
        named = ", ".join(f"{run.kernel} {SHORT[run.dtype]}" for run in runs)
        reason = f"backend {backend!r} on {device}, {named}: {runs[0].reason}"
        if settings:
            reason += f"; {', '.join(settings)} is set"
        yield finding(KERNEL_CODES[status], Verdict.DEGRADED, reason)
    ran = [run for run in facts.kernels if run.kernel == "auto"]
    if ran and all(run.status != "right" for run in ran):
        yield finding("AWQ-KERNEL-006", Verdict.UNUSABLE, "no backend's own choice of kernels gave right results")
