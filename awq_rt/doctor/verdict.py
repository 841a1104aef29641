"""The verdict's sentence: what runs models here, or what forbids it."""

from __future__ import annotations

from collections.abc import Iterable

from ..devices import Device
from .facts import Facts, place
from .report import SHORT, Finding, KernelRun, PluginState, Verdict


def summary(facts: Facts, findings: Iterable[Finding]) -> str:
    """What runs models here: `NVIDIA H100, sm_90, gemv/gemm/exllama, fp16/bf16, backend cuda`; else what forbids it."""
    if worst := next((finding for finding in findings if finding.verdict is Verdict.UNUSABLE), None):
        return worst.reason
    serving = _serving(facts)
    if serving is None:
        return "no device is driven"
    plugin, device = serving
    kernels, dtypes = _working(facts, plugin, device)
    count = sum(other.type == device.type for other in plugin.devices)
    name = f"CPU {device.name}" if device.type == "cpu" else device.name
    many = f"{count} x " if count > 1 else ""
    said = [f"{many}{name}", device.arch, "/".join(kernels), "/".join(SHORT[dtype] for dtype in dtypes)]
    return ", ".join((*filter(None, said), f"backend {plugin.name}"))


def _serving(facts: Facts) -> tuple[PluginState, Device] | None:
    """The backend and device that a model runs on where nothing is asked for."""
    candidates = [(plugin, device) for plugin in facts.plugins for device in plugin.devices]
    candidates.sort(key=lambda pair: (pair[1].type == "cpu", -(pair[0].priority or 0)))
    unreachable = facts.torch is None or bool(facts.torch.unreachable)
    for plugin, device in candidates:
        runs = [run for run in _runs(facts, plugin, device) if run.kernel == "auto"]
        failed = runs and all(run.status != "right" for run in runs)
        if not failed and not (unreachable and device.type != "cpu"):
            return plugin, device
    return None


def _runs(facts: Facts, plugin: PluginState, device: Device) -> list[KernelRun]:
    return [run for run in facts.kernels if (run.backend, run.device) == (plugin.name, place(device))]


def _working(facts: Facts, plugin: PluginState, device: Device) -> tuple[list[str], list[str]]:
    """Kernel families and dtypes that were right where they were run; where none was, those that are offered."""
    runs = _runs(facts, plugin, device)
    if runs:
        good = {(run.kernel, run.dtype) for run in runs if run.status == "right"}
    else:
        its = [offer for offer in facts.offers if (offer.backend, offer.device) == (plugin.name, place(device))]
        good = {(offer.kernel, offer.dtype) for offer in its if offer.status != "rejected"}
    kernels = [kernel for kernel in plugin.kernels if any(kernel == name for name, _ in good)]
    return kernels, [dtype for dtype in SHORT if any(dtype == name for _, name in good)]
