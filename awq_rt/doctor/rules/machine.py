"""The system, the required packages, the cache, and the GPUs' drivers."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator

from ..facts import Facts
from ..report import Finding, Verdict
from .finding import finding
from .imports import STEPS

SUSPECT = ("AWQ-CUDA-002", "AWQ-ROCM-004")
"""A driver is there and does not answer: there is a GPU, most likely."""

HIDDEN = ("AWQ-CUDA-003", "AWQ-ROCM-003")

DRIVER_FOR_CUDA = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
"""The oldest Linux driver for each CUDA release (NVIDIA's CUDA compatibility guide, minor version compatibility)."""


def say_system(facts: Facts) -> str:
    memory = f"{facts.host.memory_bytes / 2**30:.1f} GiB" if facts.host.memory_bytes else "memory unknown"
    return f"{platform.platform()}; {facts.host.name}, {memory}; Python {platform.python_version()}"


def say_packages(facts: Facts) -> str:
    good = sum(package.status == "ok" for package in facts.packages)
    return f"{good} of {len(facts.packages)} required packages have a supported version" if facts.packages else ""


def find_packages(facts: Facts) -> Iterator[Finding]:
    if not facts.packages:
        reason = (
            "awq-rt runs from a source tree that is not installed: versions are unchecked, plugins may not be found"
        )
        yield finding("AWQ-PACKAGE-003", Verdict.READY, reason)
    for name, copies in facts.twice.items():
        reason = f"{name} is installed in several versions: {', '.join(copies)}; the first is in use"
        yield finding("AWQ-PACKAGE-004", Verdict.DEGRADED, reason, f"pip uninstall --yes {name} && pip install {name}")
    for package in facts.packages:
        wanted = f"{package.name}{package.supported}"
        command = f"pip install '{wanted}'"
        if package.name == "torch" and package.status == "unsupported":
            reason = f"torch {package.installed} is installed; {package.supported} is needed"
            yield finding("AWQ-TORCH-004", Verdict.UNUSABLE, reason, command)
        elif package.status == "unsupported":
            reason = f"{package.name} {package.installed} is outside the supported versions, {package.supported}"
            yield finding("AWQ-PACKAGE-001", Verdict.DEGRADED, reason, command)
        elif package.status == "missing" and package.name not in STEPS:
            # A backend may be missing as long as another one serves; `find_plugins` judges that.
            verdict = Verdict.DEGRADED if package.name.startswith("awq-rt-") else Verdict.UNUSABLE
            yield finding("AWQ-PACKAGE-002", verdict, f"{wanted} is required and not installed", command)


def say_cache(facts: Facts) -> str:
    return str(facts.cache.folder)


def find_cache(facts: Facts) -> Iterator[Finding]:
    if facts.cache.unwritable:
        reason = f"the cache {facts.cache.folder} cannot be written: {facts.cache.unwritable}"
        yield finding("AWQ-CACHE-001", Verdict.DEGRADED, reason)
    if facts.cache.exposed:
        yield finding("AWQ-CACHE-002", Verdict.DEGRADED, facts.cache.exposed)


def say_driver(facts: Facts) -> str:
    found = {f"{gpu.platform} {gpu.driver}".strip(): None for gpu in facts.gpus}
    return ", ".join(found) if found else "no GPU driver: " + "; ".join(
        refusal.reason for refusal in (*facts.nvidia.refusals, *facts.amd.refusals)
    )  # fmt: skip


def find_driver(facts: Facts) -> Iterator[Finding]:
    for refusal in (*facts.nvidia.refusals, *facts.amd.refusals):
        if refusal.code in SUSPECT or refusal.code in HIDDEN:
            verdict = Verdict.DEGRADED if refusal.code in SUSPECT else Verdict.READY
            yield finding(refusal.code, verdict, f"{refusal.reason}; {refusal.fix}")
    torch = facts.torch
    if torch is None or not torch.cuda or not facts.nvidia.devices:
        return
    needed = DRIVER_FOR_CUDA.get(torch.cuda.split(".")[0])
    gpu = facts.nvidia.devices[0]
    if needed and platform.system() == "Linux" and (0,) < _numbers(gpu.driver) < needed:
        wanted = ".".join(map(str, needed))
        reason = f"the NVIDIA driver is {gpu.driver}; torch {torch.version} is built for CUDA {torch.cuda}, " \
                 f"which needs {wanted} or later"  # fmt: skip
        yield finding("AWQ-CUDA-004", Verdict.DEGRADED, reason)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) or (0,)
