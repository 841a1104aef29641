"""The checks in the order in which they are made and shown: from facts to what was found, and what is wrong with it.

Each is one function that yields findings, and one that says in a line what was found.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..codes import CODES
from ..devices import Device, Refusal
from .facts import Facts, place
from .report import Checked, Finding, KernelRun, PluginState, Status, Torch, Verdict

STEPS = ("torch", "transformers", "plugins", "selection")
"""Of the engine, in its order."""

INSTALL_TORCH = "https://pytorch.org/get-started/locally/"
BACKEND_FOR = {
    "nvidia": ("no installed backend drives it", "pip install 'awq-rt[cuda]'"),
    "amd": ("no installed backend drives it", "pip install 'awq-rt[rocm]'"),
}
"""By a GPU's platform: what is missing, and the command that helps. The only place that knows a plugin by its name."""

SUSPECT = ("AWQ-CUDA-002", "AWQ-ROCM-004")
"""A driver is there and does not answer: there is a GPU, most likely."""

HIDDEN = ("AWQ-CUDA-003", "AWQ-ROCM-003")
TORCH_REACHES_NO_GPU = "AWQ-DEVICE-001"

DRIVER_FOR_CUDA = {"11": (450, 80), "12": (525, 60), "13": (580, 65)}
"""The oldest Linux driver for each CUDA release (NVIDIA's CUDA compatibility guide, minor version compatibility)."""

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
SLOW_VARIABLES = ("CUDA_LAUNCH_BLOCKING", "HIP_LAUNCH_BLOCKING", "AMD_SERIALIZE_KERNEL",
                  "PYTORCH_NO_CUDA_MEMORY_CACHING")  # fmt: skip

KERNEL_CODES = {"wrong": "AWQ-KERNEL-001", "hung": "AWQ-KERNEL-002", "not finite": "AWQ-KERNEL-003",
                "died": "AWQ-KERNEL-004", "raised": "AWQ-KERNEL-005"}  # fmt: skip
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at. `codes` are all that `find` may yield, beside those that a plugin gives its refusals.

    `say` answers a line, or "" where there is nothing to look at; `absent` then says why.
    """

    name: str
    looks_at: str
    codes: tuple[str, ...]
    say: Callable[[Facts], str]
    find: Callable[[Facts], Iterator[Finding]]
    absent: str = ""


def make(facts: Facts) -> tuple[Checked, ...]:
    """Every check, in order."""
    made = []
    for check in CHECKS:
        findings, says = tuple(check.find(facts)), check.say(facts)
        if findings:
            status = Status[max(finding.verdict for finding in findings).name.replace("READY", "NOTE")]
        else:
            status = Status.OK if says else Status.SKIPPED
        made.append(Checked(check.name, status, says or check.absent, findings))
    return tuple(made)


def _finding(code: str, verdict: Verdict, reason: str, command: str = "") -> Finding:
    return Finding(code, verdict, reason, command or CODES[code].command)


# --- the machine -----------------------------------------------------------------------------------------------------


def _say_system(facts: Facts) -> str:
    memory = f"{facts.host.memory_bytes / 2**30:.1f} GiB" if facts.host.memory_bytes else "memory unknown"
    return f"{platform.platform()}; {facts.host.name}, {memory}; Python {platform.python_version()}"


def _nothing(_: Facts) -> Iterator[Finding]:
    yield from ()


def _say_packages(facts: Facts) -> str:
    good = sum(package.status == "ok" for package in facts.packages)
    return f"{good} of {len(facts.packages)} required packages have a supported version" if facts.packages else ""


def _find_packages(facts: Facts) -> Iterator[Finding]:
    if not facts.packages:
        reason = (
            "awq-rt runs from a source tree that is not installed: versions are unchecked, plugins may not be found"
        )
        yield _finding("AWQ-PACKAGE-003", Verdict.READY, reason)
    for package in facts.packages:
        wanted = f"{package.name}{package.supported}"
        command = f"pip install '{wanted}'"
        if package.name == "torch" and package.status == "unsupported":
            reason = f"torch {package.installed} is installed; {package.supported} is needed"
            yield _finding("AWQ-TORCH-004", Verdict.UNUSABLE, reason, command)
        elif package.status == "unsupported":
            reason = f"{package.name} {package.installed} is outside the supported versions, {package.supported}"
            yield _finding("AWQ-PACKAGE-001", Verdict.DEGRADED, reason, command)
        elif package.status == "missing" and package.name not in STEPS:
            # A backend may be missing as long as another one serves; `_find_plugins` judges that.
            verdict = Verdict.DEGRADED if package.name.startswith("awq-rt-") else Verdict.UNUSABLE
            yield _finding("AWQ-PACKAGE-002", verdict, f"{wanted} is required and not installed", command)


def _say_cache(facts: Facts) -> str:
    return str(facts.cache.folder)


def _find_cache(facts: Facts) -> Iterator[Finding]:
    if facts.cache.unwritable:
        reason = f"the cache {facts.cache.folder} cannot be written: {facts.cache.unwritable}"
        yield _finding("AWQ-CACHE-001", Verdict.DEGRADED, reason)
    if facts.cache.exposed:
        yield _finding("AWQ-CACHE-002", Verdict.DEGRADED, facts.cache.exposed)


def _say_driver(facts: Facts) -> str:
    found = {f"{gpu.platform} {gpu.driver}".strip(): None for gpu in facts.gpus}
    return ", ".join(found) if found else "no GPU driver: " + "; ".join(
        refusal.reason for refusal in (*facts.nvidia.refusals, *facts.amd.refusals)
    )  # fmt: skip


def _find_driver(facts: Facts) -> Iterator[Finding]:
    for refusal in (*facts.nvidia.refusals, *facts.amd.refusals):
        if refusal.code in SUSPECT or refusal.code in HIDDEN:
            verdict = Verdict.DEGRADED if refusal.code in SUSPECT else Verdict.READY
            yield _finding(refusal.code, verdict, f"{refusal.reason}; {refusal.fix}")
    torch = facts.torch
    if torch is None or not torch.cuda or not facts.nvidia.devices:
        return
    needed = DRIVER_FOR_CUDA.get(torch.cuda.split(".")[0])
    gpu = facts.nvidia.devices[0]
    if needed and platform.system() == "Linux" and (0,) < _numbers(gpu.driver) < needed:
        wanted = ".".join(map(str, needed))
        reason = f"the NVIDIA driver is {gpu.driver}; torch {torch.version} is built for CUDA {torch.cuda}, " \
                 f"which needs {wanted} or later"  # fmt: skip
        yield _finding("AWQ-CUDA-004", Verdict.DEGRADED, reason)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2]) or (0,)


# --- what is imported ------------------------------------------------------------------------------------------------


def _say_torch(facts: Facts) -> str:
    torch = facts.torch
    if torch is None:
        return ""
    build = f"CUDA {torch.cuda}" if torch.cuda else f"HIP {torch.hip}" if torch.hip else "the CPU only"
    arches = f", compiled for {', '.join(torch.arches)}" if torch.arches else ""
    return f"torch {torch.version}, built for {build}{arches}"


def _find_torch(facts: Facts) -> Iterator[Finding]:
    yield from _of_step("torch", facts)


def _say_transformers(facts: Facts) -> str:
    version = facts.steps.get("transformers", {}).get("version")
    return f"transformers {version}" if version else ""


def _find_transformers(facts: Facts) -> Iterator[Finding]:
    yield from _of_step("transformers", facts)


def _of_step(step: str, facts: Facts) -> Iterator[Finding]:
    """What raised in a step of the engine, or took it down or never returned."""
    reached = STEPS[: STEPS.index(step)]
    if any(before not in facts.steps for before in reached) or ("error" in facts.steps.get("torch", {}) and reached):
        return  # never got there
    if "error" in facts.steps.get("plugins", {}) and step == "selection":
        return
    wanted = {package.name: package.name + package.supported for package in facts.packages}.get(step, step)
    doing = {"plugins": "looking for backends", "selection": "asking backends what they serve"}.get(
        step, f"`import {step}`"
    )
    ours = step in ("plugins", "selection")
    family = f"AWQ-{step.upper()}"
    if step not in facts.steps:
        reason = f"{doing} {facts.outcome.ending or 'ended its process'}: {facts.outcome.complaint}"
        if "SIGILL" in facts.outcome.ending:
            reason += " (the processor lacks an instruction that this build uses)"
        yield _finding("AWQ-BACKEND-019" if ours else f"{family}-003", Verdict.UNUSABLE, reason)
        return
    error = facts.steps[step].get("error")
    if error is None:
        return
    if ours:
        yield _finding("AWQ-BACKEND-019", Verdict.UNUSABLE, f"{doing} raised {error}")
    elif facts.steps[step]["missing"] == step:
        yield _finding(f"{family}-001", Verdict.UNUSABLE, f"{step} is not installed", f"pip install '{wanted}'")
    else:
        command = f"pip install --force-reinstall '{wanted}'"
        yield _finding(f"{family}-002", Verdict.UNUSABLE, f"{doing} raised {error}", command)


# --- GPUs ------------------------------------------------------------------------------------------------------------


def _say_gpus(facts: Facts) -> str:
    told = [f"{gpu}, waves of {gpu.wave_size}" for gpu in facts.gpus]
    return "; ".join(told) + _overrides() if told else ""


def _overrides() -> str:
    names = (OVERRIDE, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", *SLOW_VARIABLES)
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return f"; overrides: {', '.join(found)}" if found else ""


def _find_gpus(facts: Facts) -> Iterator[Finding]:
    slow = [name for name in SLOW_VARIABLES if os.environ.get(name, "0") not in ("", "0")]
    if slow and facts.gpus:
        reason = f"{', '.join(slow)} is set: the host waits where it need not"
        yield _finding("AWQ-ENV-001", Verdict.DEGRADED, reason, f"unset {' '.join(slow)}")
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
        yield _finding(TORCH_REACHES_NO_GPU, Verdict.DEGRADED, reason, _torch_command(torch, kind))
        return
    if (kind == "nvidia") != bool(torch.cuda):
        reason = f"{idle} is not used: torch {torch.version} is built for the other vendor's GPUs"
        yield _finding(TORCH_REACHES_NO_GPU, Verdict.DEGRADED, reason, _torch_command(torch, kind))
        return
    for gpu in alike:
        if torch.arches and not runs_on(gpu.arch, torch.arches):
            known = ", ".join(torch.arches)
            reason = f"torch {torch.version} has no code for {gpu}: it was compiled for {known}"
            yield _finding("AWQ-TORCH-005", Verdict.DEGRADED, reason)
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
            yield _finding("AWQ-BACKEND-004", Verdict.DEGRADED, f"{idle} is not used: {missing}", command)
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


# --- plugins and their kernels ---------------------------------------------------------------------------------------


def _say_compiler(facts: Facts) -> str:
    return "; ".join(
        f"{tool.name} {tool.version}" + (f" in {tool.path}" if tool.path else "")
        for plugin in facts.plugins
        for tool in plugin.tools
    )


def _say_plugins(facts: Facts) -> str:
    told = []
    for plugin in facts.plugins:
        if plugin.refusal is not None:
            told.append(f"{plugin.name} {plugin.version} quarantined [{plugin.refusal.code}]")
        else:
            state = "loaded" if plugin.devices else "loaded, drives nothing here"
            told.append(f"{plugin.name} {plugin.version} {state}")
    return ", ".join(told)


def _find_plugins(facts: Facts) -> Iterator[Finding]:
    yield from _of_step("plugins", facts)
    for plugin in facts.plugins:
        if plugin.refusal is not None and plugin.refusal.code != TORCH_REACHES_NO_GPU:  # `_find_gpus` says that
            reason = f"backend {plugin.name!r} is quarantined: {plugin.refusal.reason}; {plugin.refusal.fix}"
            action = "uninstall" if plugin.refusal.code == "AWQ-BACKEND-017" else "install --upgrade --force-reinstall"
            yield Finding(plugin.refusal.code, Verdict.DEGRADED, reason, f"pip {action} {plugin.distribution}")
        for refusal in plugin.undriven:
            if refusal.code in ("AWQ-CPU-001", "AWQ-CPU-002"):
                reason = f"backend {plugin.name!r} drives nothing: {refusal.reason}"
                yield _finding(refusal.code, Verdict.DEGRADED, reason)
    known = "plugins" in facts.steps.get("plugins", {})
    if known and all(plugin.refusal is not None for plugin in facts.plugins):
        yield _finding("AWQ-BACKEND-005", Verdict.UNUSABLE, "no backend could be loaded")


def _say_selection(facts: Facts) -> str:
    selected = [offer for offer in facts.offers if offer.status == "selected"]
    by_place: dict[tuple[str, str], list[str]] = {}
    for offer in selected:
        names = by_place.setdefault((offer.device, offer.backend), [])
        if SHORT[offer.dtype] not in names:
            names.append(SHORT[offer.dtype])
    return "; ".join(f"{device}: {backend} for {'/'.join(names)}" for (device, backend), names in by_place.items())


def _find_selection(facts: Facts) -> Iterator[Finding]:
    yield from _of_step("selection", facts)


def _say_kernels(facts: Facts) -> str:
    if not facts.kernels:
        return ""
    right = sum(run.status == "right" for run in facts.kernels)
    return f"{right} of {len(facts.kernels)} agree with the reference"


def _find_kernels(facts: Facts) -> Iterator[Finding]:
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
        yield _finding(KERNEL_CODES[status], Verdict.DEGRADED, reason)
    ran = [run for run in facts.kernels if run.kernel == "auto"]
    if ran and all(run.status != "right" for run in ran):
        yield _finding("AWQ-KERNEL-006", Verdict.UNUSABLE, "no backend's own choice of kernels gave right results")


# --- a model ---------------------------------------------------------------------------------------------------------


def _say_model(facts: Facts) -> str:
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


def _find_model(facts: Facts) -> Iterator[Finding]:
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
    return _finding(code, verdict, reason, CODES[code].command.replace("MODEL", source))


_IMPORT = {step: tuple(f"AWQ-{step.upper()}-00{number}" for number in (1, 2, 3)) for step in ("torch", "transformers")}

CHECKS = (
    Check("system", "operating system, processor, memory, Python", (), _say_system, _nothing),
    Check("packages", "the distributions that awq-rt requires, and their versions",
          ("AWQ-PACKAGE-001", "AWQ-PACKAGE-002", "AWQ-PACKAGE-003", "AWQ-TORCH-004"), _say_packages, _find_packages,
          "awq-rt is not installed"),
    Check("cache", "whether kernels can be kept, and by whom they can be written",
          ("AWQ-CACHE-001", "AWQ-CACHE-002"), _say_cache, _find_cache),
    Check("driver", "the GPUs' drivers, and whether torch's CUDA is served by them",
          (*SUSPECT, *HIDDEN, "AWQ-CUDA-004"), _say_driver, _find_driver),
    Check("torch", "torch's import, what it is built and compiled for", _IMPORT["torch"], _say_torch, _find_torch,
          "torch was not imported"),
    Check("transformers", "transformers' import", _IMPORT["transformers"], _say_transformers, _find_transformers,
          "transformers was not imported"),
    Check("gpus", "each GPU: architecture, waves, memory, variables that hide or disguise it",
          (TORCH_REACHES_NO_GPU, "AWQ-TORCH-005", "AWQ-BACKEND-004", "AWQ-ENV-001", "AWQ-CUDA-011", "AWQ-CUDA-014",
           "AWQ-CUDA-015", "AWQ-CUDA-016", "AWQ-CUDA-017", "AWQ-CUDA-018", "AWQ-ROCM-011", "AWQ-ROCM-014",
           "AWQ-ROCM-015", "AWQ-ROCM-016", "AWQ-ROCM-017", "AWQ-ROCM-018", "AWQ-ROCM-019", "AWQ-ROCM-021"),
          _say_gpus, _find_gpus, "no GPU was found"),
    Check("compiler", "run-time compilers and headers, and where they are", (), _say_compiler, _nothing,
          "no backend here compiles at run time"),
    Check("plugins", "each backend: loaded, quarantined or refused",
          ("AWQ-BACKEND-005", *(f"AWQ-BACKEND-01{number}" for number in range(10)), "AWQ-CPU-001", "AWQ-CPU-002"),
          _say_plugins, _find_plugins, "no backend was looked for"),
    Check("selection", "kernel, dtype and layout: selected, available or rejected, and why", ("AWQ-BACKEND-019",),
          _say_selection, _find_selection, "no backend was asked"),
    Check("kernels", "each kernel, run in a process of its own beside the reference: error, speed",
          (*KERNEL_CODES.values(), "AWQ-KERNEL-006"), _say_kernels, _find_kernels, "no kernel was run"),
    Check("model", "MODEL: layout, what is unsupported, memory, numbers of processes, code and pickles in it",
          ("AWQ-MODEL-001", "AWQ-MODEL-002", "AWQ-MODEL-003", "AWQ-MODEL-004",
           *(f"AWQ-CKPT-0{number:02}" for number in range(1, 15))), _say_model, _find_model, "no MODEL was given"),
)  # fmt: skip


# --- the verdict's sentence ------------------------------------------------------------------------------------------


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


def environment(names: Iterable[str]) -> Mapping[str, str]:
    """Variables that matter: `names`, and whatever is called AWQ_RT_something."""
    ours = sorted(name for name in os.environ if name.startswith("AWQ_RT_"))
    return {name: os.environ[name] for name in dict.fromkeys((*names, *ours)) if name in os.environ}
