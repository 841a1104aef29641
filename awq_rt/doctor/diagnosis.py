"""From facts to findings: each rule is one function that yields what is wrong, why, and the command that helps."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import devices
from ..devices import Device, Refusal
from ..examination import Outcome, ask
from .report import Finding, Package, PluginState, Report, Torch, Verdict
from .requirements import required_packages

TIME_LIMIT_S = 600
"""For torch, transformers and every plugin's self-test together; a first import from a slow disk takes a minute."""

STEPS = ("torch", "transformers", "plugins")
ENVIRONMENT = (
    *devices.VISIBILITY,
    "AWQ_RT_CACHE",
    "AWQ_RT_EXAMINATION_TIMEOUT",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "PYTHONPATH",
    "VIRTUAL_ENV",
)

INSTALL_TORCH = "https://pytorch.org/get-started/locally/"
BACKEND_FOR = {
    "nvidia": ("no installed backend drives it", "pip install 'awq-rt[cuda]'"),
    "amd": ("no installed backend drives it", "pip install 'awq-rt[rocm]'"),
}
"""By a GPU's platform: what is missing, and the command that helps. The only place that knows a plugin by its name."""

COMMANDS = {
    "AWQ-CUDA-001": "lspci | grep -i nvidia",
    "AWQ-CUDA-002": "nvidia-smi",
    "AWQ-CUDA-003": "env | grep CUDA_VISIBLE_DEVICES; nvidia-smi -L",
    "AWQ-ROCM-001": "ls -l /dev/kfd",
    "AWQ-ROCM-002": "dmesg | grep amdgpu",
    "AWQ-ROCM-003": "env | grep VISIBLE_DEVICES",
    "AWQ-ROCM-004": "sudo usermod --append --groups render,video $USER",
}
"""By a probe's code: what shows or mends it."""

SUSPECT = ("AWQ-CUDA-002", "AWQ-ROCM-004")
"""A driver is there and does not answer: there is a GPU, most likely."""

TORCH_REACHES_NO_GPU = "AWQ-DEVICE-001"
HIDDEN = ("AWQ-CUDA-003", "AWQ-ROCM-003")


def diagnose(time_limit_s: float = TIME_LIMIT_S) -> Report:
    """Examine this machine. Never raises for what it finds."""
    host, nvidia, amd = devices.cpu(), devices.nvidia(), devices.amd()
    gpus = (*nvidia.devices, *amd.devices)
    refusals = (*nvidia.refusals, *amd.refusals)

    outcome = ask("awq_rt.doctor.engine", limit_s=time_limit_s)
    steps = {answer["step"]: answer for answer in outcome.answers}
    imported = {step: steps[step]["version"] for step in steps if "version" in steps[step]}
    packages = tuple(required_packages(imported))
    torch = _torch(steps.get("torch", {}))
    states = steps.get("plugins", {}).get("plugins")
    plugins = tuple(_plugin(state) for state in states or ())

    findings = [
        *_about_packages(packages),
        *_about_steps(steps, outcome, packages),
        *_about_plugins(plugins, known=states is not None),
        *_about_probes(refusals),
    ]
    if torch is not None:
        findings += _about_gpus(gpus, torch, plugins)
    findings.sort(key=lambda finding: -finding.verdict)
    return Report(
        summary=_summary(findings, torch, host.devices[0], plugins),
        findings=tuple(findings),
        system=_system(host.devices[0]),
        environment=_environment(),
        packages=packages,
        torch=torch,
        devices=(*host.devices, *gpus),
        refusals=refusals,
        plugins=plugins,
    )


def _environment() -> dict[str, str]:
    """Variables that matter here: those of `ENVIRONMENT`, and whatever plugins call AWQ_RT_something."""
    ours = sorted(name for name in os.environ if name.startswith("AWQ_RT_"))
    return {name: os.environ[name] for name in dict.fromkeys((*ENVIRONMENT, *ours)) if name in os.environ}


def _about_packages(packages: Sequence[Package]) -> Iterator[Finding]:
    if not packages:
        reason = (
            "awq-rt runs from a source tree that is not installed: versions are unchecked, plugins may not be found"
        )
        yield Finding("AWQ-PACKAGE-003", Verdict.READY, reason, "pip install --editable .")
    for package in packages:
        wanted = f"{package.name}{package.supported}"
        command = f"pip install '{wanted}'"
        if package.name == "torch" and package.status == "unsupported":
            reason = f"torch {package.installed} is installed; {package.supported} is needed"
            yield Finding("AWQ-TORCH-004", Verdict.UNUSABLE, reason, command)
        elif package.status == "unsupported":
            reason = f"{package.name} {package.installed} is outside the supported versions, {package.supported}"
            yield Finding("AWQ-PACKAGE-001", Verdict.DEGRADED, reason, command)
        elif package.status == "missing" and package.name not in STEPS:
            # A backend may be missing as long as another one serves; `_about_plugins` judges that.
            verdict = Verdict.DEGRADED if package.name.startswith("awq-rt-") else Verdict.UNUSABLE
            yield Finding("AWQ-PACKAGE-002", verdict, f"{wanted} is required and not installed", command)


def _about_steps(
    steps: Mapping[str, Mapping[str, Any]], outcome: Outcome, packages: Sequence[Package]
) -> Iterator[Finding]:
    """What raised, and what took the process down or never returned."""
    wanted = {package.name: package.name + package.supported for package in packages}
    for step in STEPS:
        doing, shown = f"`import {step}`", f"python -X faulthandler -c 'import {step}'"
        codes = {
            "missing": f"AWQ-{step.upper()}-001",
            "raised": f"AWQ-{step.upper()}-002",
            "died": f"AWQ-{step.upper()}-003",
        }
        if step == "plugins":
            doing, shown = "looking for backends", "python -X faulthandler -m awq_rt.testing.conformance reference"
            codes = dict.fromkeys(codes, "AWQ-BACKEND-019")
        if step not in steps:
            reason = f"{doing} {outcome.ending or 'ended its process'}: {outcome.complaint}"
            if "SIGILL" in outcome.ending:
                reason += " (the processor lacks an instruction that this build uses)"
            yield Finding(codes["died"], Verdict.UNUSABLE, reason, shown)
            return  # the later steps were never reached
        error = steps[step].get("error")
        if error is None:
            continue
        if steps[step]["missing"] == step:
            command = f"pip install '{wanted.get(step, step)}'"
            yield Finding(codes["missing"], Verdict.UNUSABLE, f"{step} is not installed", command)
        else:
            command = shown if step == "plugins" else f"pip install --force-reinstall '{wanted.get(step, step)}'"
            yield Finding(codes["raised"], Verdict.UNUSABLE, f"{doing} raised {error}", command)
        if step == "torch":
            return


def _about_plugins(plugins: Sequence[PluginState], *, known: bool) -> Iterator[Finding]:
    for plugin in plugins:
        if plugin.refusal is not None and plugin.refusal.code != TORCH_REACHES_NO_GPU:  # `_about_gpus` says that
            reason = f"backend {plugin.name!r} is quarantined: {plugin.refusal.reason}; {plugin.refusal.fix}"
            action = "uninstall" if plugin.refusal.code == "AWQ-BACKEND-017" else "install --upgrade --force-reinstall"
            yield Finding(plugin.refusal.code, Verdict.DEGRADED, reason, f"pip {action} {plugin.distribution}")
    if known and all(plugin.refusal is not None for plugin in plugins):
        command = "pip install --force-reinstall awq-rt-reference"
        yield Finding("AWQ-BACKEND-005", Verdict.UNUSABLE, "no backend could be loaded", command)


def _about_probes(refusals: Sequence[Refusal]) -> Iterator[Finding]:
    for refusal in refusals:
        if refusal.code in SUSPECT or refusal.code in HIDDEN:
            verdict = Verdict.DEGRADED if refusal.code in SUSPECT else Verdict.READY
            yield Finding(refusal.code, verdict, f"{refusal.reason}; {refusal.fix}", COMMANDS[refusal.code])


def _about_gpus(gpus: Sequence[Device], torch: Torch, plugins: Sequence[PluginState]) -> Iterator[Finding]:
    """One finding for each platform whose GPUs stay idle."""
    for kind in dict.fromkeys(gpu.platform for gpu in gpus):
        alike = [gpu for gpu in gpus if gpu.platform == kind]
        idle = f"{alike[0]}" + (f" and {len(alike) - 1} more" if len(alike) > 1 else "")
        missing, command = BACKEND_FOR[kind]
        blocked = any(plugin.refusal and plugin.refusal.code == TORCH_REACHES_NO_GPU for plugin in plugins)
        if torch.unreachable and (kind == "nvidia" or blocked):
            reason = f"{idle} is not used: torch {torch.version} does not reach it: {torch.unreachable}"
            yield Finding(TORCH_REACHES_NO_GPU, Verdict.DEGRADED, reason, _torch_command(torch, kind))
        elif not any(device.platform == kind for plugin in plugins for device in plugin.devices):
            for plugin in plugins:
                for refusal in plugin.undriven:
                    reason = f"backend {plugin.name!r} does not drive {idle}: {refusal.reason}"
                    yield Finding(refusal.code, Verdict.DEGRADED, reason, refusal.fix)
            yield Finding("AWQ-BACKEND-004", Verdict.DEGRADED, f"{idle} is not used: {missing}", command)


def _torch_command(torch: Torch, kind: str) -> str:
    if kind == "nvidia" and torch.cuda:
        return "nvidia-smi"  # the right build, and a driver that does not serve it
    if kind == "nvidia" and platform.system() == "Linux":  # the package index itself holds the CUDA build there
        return "pip install --force-reinstall torch"
    return f"python -m webbrowser {INSTALL_TORCH}"


def _summary(findings: Sequence[Finding], torch: Torch | None, host: Device, plugins: Sequence[PluginState]) -> str:
    if findings and findings[0].verdict is Verdict.UNUSABLE:
        return findings[0].reason
    if torch is None:
        return "nothing is known of torch"
    driven = [(device, plugin.name) for plugin in plugins for device in plugin.devices]
    for device, name in driven:
        if device.type != "cpu" and not torch.unreachable:
            return f"models run on {device} through backend {name!r}"
    names = [name for device, name in driven if device.type == "cpu"]
    return f"models run on the CPU ({host.name}) through backend {names[0]!r}" if names else "no device is driven"


def _system(host: Device) -> dict[str, str]:
    return {
        "system": platform.platform(),
        "processor": f"{host.name} ({host.arch}), {os.cpu_count()} cores",
        "memory": f"{host.memory_bytes / 2**30:.1f} GiB",
        "python": f"{platform.python_version()} ({sys.executable})",
        "awq_rt": str(Path(__file__).parents[1]),
    }


def _torch(answer: Mapping[str, Any]) -> Torch | None:
    if not answer or "error" in answer:
        return None
    return Torch(**{name: value for name, value in answer.items() if name != "step"} | {"gpus": tuple(answer["gpus"])})


def _plugin(state: Mapping[str, Any]) -> PluginState:
    return PluginState(
        state["name"],
        state["distribution"],
        state["version"],
        state["priority"],
        tuple(state["kernels"]),
        tuple(Device(**device) for device in state["devices"]),
        tuple(Refusal(**refusal) for refusal in state["refusals"]),
        Refusal(**state["refusal"]) if state["refusal"] else None,
    )
