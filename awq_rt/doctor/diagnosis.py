"""From facts to a report."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from .. import devices
from ..devices import Device
from . import checks, facts
from .facts import Request
from .report import Report
from .rules.gpus import OVERRIDE, SLOW_VARIABLES
from .verdict import summary

ENVIRONMENT = (
    *devices.VISIBILITY,
    OVERRIDE,
    *SLOW_VARIABLES,
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)


def diagnose(
    request: Request | None = None, *, strict: bool = False, progress: Callable[[str], None] = lambda doing: None
) -> Report:
    """Examine this machine, and a model where `request` names one. Never raises for what it finds.

    `strict` lets nothing that was found pass as ready. `progress` hears what is done next.
    """
    found = facts.gather(request or Request(), progress)
    checked = checks.make(found)
    findings = sorted((f for check in checked for f in check.findings), key=lambda finding: -finding.verdict)
    return Report(
        summary=summary(found, findings),
        checks=checked,
        system=_system(found.host),
        environment=_environment(),
        packages=found.packages,
        torch=found.torch,
        devices=(found.host, *found.gpus),
        refusals=(*found.nvidia.refusals, *found.amd.refusals),
        plugins=found.plugins,
        selection=found.offers,
        kernels=found.kernels,
        model=found.model,
        strict=strict,
    )


def _system(host: Device) -> dict[str, str]:
    return {
        "system": platform.platform(),
        "processor": f"{host.name} ({host.arch}), {os.cpu_count()} cores",
        "memory": f"{host.memory_bytes / 2**30:.1f} GiB",
        "python": f"{platform.python_version()} ({sys.executable})",
        "awq_rt": str(Path(__file__).parents[1]),
    }


def _environment() -> dict[str, str]:
    """Variables that matter: those of `ENVIRONMENT`, and whatever is called AWQ_RT_something."""
    ours = sorted(name for name in os.environ if name.startswith("AWQ_RT_"))
    return {name: os.environ[name] for name in dict.fromkeys((*ENVIRONMENT, *ours)) if name in os.environ}
