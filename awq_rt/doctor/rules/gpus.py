"""Each GPU: whether torch reaches it and has code for it, whether a backend drives it, what disguises it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Iterator

from ...codes import CODES
from ...devices import Refusal
from ..facts import Facts, place
from ..report import Finding, Torch, Verdict
from .finding import finding

INSTALL_TORCH = "https://pytorch.org/get-started/locally/"

BACKEND_FOR = {
    "nvidia": ("no installed backend drives it", "pip install 'awq-rt[cuda]'"),
    "amd": ("no installed backend drives it", "pip install 'awq-rt[rocm]'"),
}
"""By a GPU's platform: what is missing, and the command that helps. The only place that knows a plugin by its name."""

TORCH_REACHES_NO_GPU = "AWQ-DEVICE-001"

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"

SLOW_VARIABLES = ("CUDA_LAUNCH_BLOCKING", "HIP_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL",
                  "PYTORCH_NO_CUDA_MEMORY_CACHING")  # fmt: skip


def say_gpus(facts: Facts) -> str:
    told = [f"{gpu}, waves of {gpu.wave_size}" for gpu in facts.gpus]
    return "; ".join(told) + _overrides() if told else ""


def _overrides() -> str:
    names = (OVERRIDE, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", *SLOW_VARIABLES)
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return f"; overrides: {', '.join(found)}" if found else ""


def find_gpus(facts: Facts) -> Iterator[Finding]:
    slow = [name for name in SLOW_VARIABLES if os.environ.get(name, "0") not in ("", "0")]
    if slow and facts.gpus:
        reason = f"{', '.join(slow)} is set: the host waits where it need not"
        yield finding("AWQ-ENV-001", Verdict.DEGRADED, reason, f"unset {' '.join(slow)}")
    if facts.torch is None:
        return
    for kind in dict.fromkeys(gpu.platform for gpu in facts.gpus):
        yield from _about_platform(kind, facts, facts.torch)


def _about_platform(kind: str, facts: Facts, torch: Torch) -> Iterator[Finding]:
    """One finding for a platform whose GPUs stay idle; those that torch cannot compute on."""
    alike = [gpu for gpu in facts.gpus if gpu.platform == kind]
    idle = f"{alike[0]}" + (f" and {len(alike) - 1} more" if len(alike) > 1 else "")
    blocked = any(plugin.refusal and plugin.refusal.code == TORCH_REACHES_NO_GPU for plugin in facts.plugins)
    if torch.unreachable and (kind == "nvidia" or blocked or not torch.hip):
        reason = f"{idle} is not used: torch {torch.version} does not reach it: {torch.unreachable}"
        yield finding(TORCH_REACHES_NO_GPU, Verdict.DEGRADED, reason, _torch_command(torch, kind))
        return
    if (kind == "nvidia") != bool(torch.cuda):
        reason = f"{idle} is not used: torch {torch.version} is built for the other vendor's GPUs"
        yield finding(TORCH_REACHES_NO_GPU, Verdict.DEGRADED, reason, _torch_command(torch, kind))
        return
    for gpu in alike:
        if torch.arches and not runs_on(gpu.arch, torch.arches):
            known = ", ".join(torch.arches)
            reason = f"torch {torch.version} has no code for {gpu}: it was compiled for {known}"
            yield finding("AWQ-TORCH-005", Verdict.DEGRADED, reason)
    driven = {place(device) for plugin in facts.plugins for device in plugin.devices if device.platform == kind}
    undriven = [gpu for gpu in alike if place(gpu) not in driven]
    if not driven:
        refusals = [(plugin, refusal) for plugin in facts.plugins for refusal in plugin.undriven
                    if _is_about(refusal, kind)]  # fmt: skip
        for plugin, refusal in refusals:
            reason = f"backend {plugin.name!r} does not drive {idle}: {refusal.reason}"
            yield Finding(refusal.code, Verdict.DEGRADED, reason, _command_of(refusal))
        missing, command = BACKEND_FOR[kind]
        if not refusals:
            yield finding("AWQ-BACKEND-004", Verdict.DEGRADED, f"{idle} is not used: {missing}", command)
    elif undriven:
        for plugin in facts.plugins:
            for refusal in plugin.undriven:
                if _is_about(refusal, kind):
                    reason = f"backend {plugin.name!r} does not drive {undriven[0]}: {refusal.reason}"
                    yield Finding(refusal.code, Verdict.DEGRADED, reason, _command_of(refusal))


def _is_about(refusal: Refusal, kind: str) -> bool:
    """Whether a backend's refusal concerns GPUs of the platform: not that of a driver which is not there at all."""
    other = {"nvidia": "AWQ-ROCM-", "amd": "AWQ-CUDA-"}[kind]
    return not refusal.code.startswith((other, "AWQ-CPU-")) and not re.fullmatch(r"AWQ-\w+-00\d", refusal.code)


def _command_of(refusal: Refusal) -> str:
    """The command for a refusal: that of its code, else, for a stranger's plugin, what it says itself."""
    return CODES[refusal.code].command if refusal.code in CODES else refusal.fix


def _torch_command(torch: Torch, kind: str) -> str:
    if kind == "nvidia" and torch.cuda:
        return "nvidia-smi"  # the right build, and a driver that does not serve it
    if kind == "nvidia" and platform.system() == "Linux":  # the package index itself holds the CUDA build there
        return "pip install --force-reinstall torch"
    return f"python -m webbrowser {INSTALL_TORCH}"


def runs_on(arch: str, compiled: Iterable[str]) -> bool:
    """Whether code compiled for `compiled` runs on a GPU of `arch`: the same, an older minor of it, or newer by PTX."""
    number = re.fullmatch(r"sm_(\d+)(\d)", arch)
    for target in compiled:
        name = target.split(":")[0].rstrip("af")
        if name == arch:
            return True
        its = re.fullmatch(r"(sm|compute)_(\d+)(\d)", name)
        if number is None or its is None:
            continue
        older = (int(its[2]), int(its[3])) <= (int(number[1]), int(number[2]))
        if older and (its[1] == "compute" or its[2] == number[1]):
            return True
    return number is None and not arch.startswith("gfx")  # an unknown word is not ours to judge
