"""What the doctor knows before it judges: everything that was read here or answered by a worker."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import cache, devices
from ..devices import Device, Probe, Refusal, Tool
from ..examination import Outcome, Worker, ask
from .report import KernelRun, Memory, Model, Offer, Package, PluginState, Torch
from .requirements import installed_twice, required_packages

STEP_LIMIT_S = 600.0
"""For each of torch, transformers and all plugins' self-tests; a first import from a slow disk takes a minute."""

KERNEL_LIMIT_S = 120.0
"""For one kernel, which may have to be compiled first."""

MODEL_LIMIT_S = 300.0
GIVE_UP_AFTER = 2
"""Kernels of one backend on one device that hung or died: the rest of them is not tried."""

ENGINE, KERNELS = "awq_rt.doctor.engine", "awq_rt.doctor.kernels"

ON_CPU, ON_GPU = ("float32", "float16", "bfloat16"), ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Request:
    """What the doctor is asked: whether to `run` kernels, and which `model` to look at, opened with `opening`."""

    run: bool = True
    model: str | None = None
    opening: tuple[tuple[str, str | int], ...] = ()
    step_limit_s: float = STEP_LIMIT_S
    kernel_limit_s: float = KERNEL_LIMIT_S


@dataclass(frozen=True, slots=True)
class CacheState:
    """The cache folder: why it cannot be written, and who else may write it; "" for a good answer."""

    folder: Path
    unwritable: str
    exposed: str


@dataclass(frozen=True, slots=True)
class Facts:
    """`steps` are the engine's answers by step, `outcome` how it ended, `transformers` how that import did;
    `model_error` is (code, reason).

    `twice` are the versions and folders of what is installed more than once.
    """

    request: Request
    host: Device
    nvidia: Probe
    amd: Probe
    steps: Mapping[str, Mapping[str, Any]]
    outcome: Outcome
    transformers: Outcome
    packages: tuple[Package, ...]
    twice: Mapping[str, tuple[str, ...]]
    torch: Torch | None
    plugins: tuple[PluginState, ...]
    cache: CacheState
    offers: tuple[Offer, ...]
    kernels: tuple[KernelRun, ...]
    model: Model | None
    model_error: tuple[str, str] | None

    @property
    def gpus(self) -> tuple[Device, ...]:
        return (*self.nvidia.devices, *self.amd.devices)


def gather(request: Request, progress: Callable[[str], None] = lambda doing: None) -> Facts:
    """Look at this machine. Never raises for what it finds. `progress` hears what is done next."""
    progress("importing torch, transformers and the backends")
    runner = Worker(KERNELS) if request.run else None  # imports take seconds: side by side
    importer = Worker(ENGINE, "transformers")
    nvidia, amd = devices.nvidia(), devices.amd()
    outcome = ask(ENGINE, "torch", "plugins", "selection", limit_s=request.step_limit_s)
    transformers = importer.outcome(request.step_limit_s)
    steps = {answer["step"]: answer for answer in (*outcome.answers, *transformers.answers)}
    imported = {step: steps[step]["version"] for step in steps if "version" in steps[step]}
    plugins = tuple(_plugin(state) for state in steps.get("plugins", {}).get("plugins", ()))
    offers = tuple(_offer(offer) for offer in steps.get("selection", {}).get("offers", ()))
    torch = _torch(steps.get("torch", {}))
    model, model_error = None, None
    if request.model is not None and torch is not None:
        progress(f"reading the headers of {request.model}")
        model, model_error = _model(request)
    wanted = jobs(plugins, offers) if request.run else []
    progress(f"running {len(wanted)} kernels beside the reference")
    packages = tuple(required_packages(imported))
    named = ("awq-rt", *(package.name for package in packages), *(plugin.distribution for plugin in plugins))
    return Facts(
        request=request,
        host=devices.cpu().devices[0],
        nvidia=nvidia,
        amd=amd,
        steps=steps,
        outcome=outcome,
        transformers=transformers,
        packages=packages,
        twice=installed_twice(dict.fromkeys(named)),
        torch=torch,
        plugins=plugins,
        cache=cache_state(cache.chosen_dir() or cache.cache_dir()),
        offers=offers,
        kernels=run_kernels(wanted, request.kernel_limit_s, runner),
        model=model,
        model_error=model_error,
    )


def jobs(plugins: Sequence[PluginState], offers: Sequence[Offer]) -> list[dict[str, Any]]:
    """Every kernel family and dtype that a backend offers on a device that it drives."""
    offered = {(o.device, o.backend, o.kernel, o.dtype) for o in offers if o.status != "rejected"}
    found: list[dict[str, Any]] = []
    for plugin in plugins:
        for device in plugin.devices:
            where = place(device)
            for kernel in ("auto", *plugin.kernels):
                for dtype in ON_CPU if device.type == "cpu" else ON_GPU:
                    if (where, plugin.name, kernel, dtype) in offered:
                        job = {"backend": plugin.name, "device": asdict(device), "kernel": kernel, "dtype": dtype}
                        found.append({"index": len(found), **job})
    return found


def place(device: Device) -> str:
    """torch's word for a device."""
    return "cpu" if device.type == "cpu" else f"{device.type}:{device.index}"


def run_kernels(
    wanted: Sequence[Mapping[str, Any]], limit_s: float, runner: Worker | None = None
) -> tuple[KernelRun, ...]:
    """Each job's result. One that hangs or dies takes its process with it; the others go on in a new one.

    `runner` is the first process, where it was begun before.
    """
    results: dict[int, KernelRun] = {}
    fatal: dict[tuple[str, str], int] = {}
    left = list(wanted)
    while left:
        outcome = (runner or Worker(KERNELS)).outcome(limit_s, json.dumps(left))
        runner = None
        started = [answer["starts"] for answer in outcome.answers if "starts" in answer]
        for answer in outcome.answers:
            if "index" in answer:
                results[answer["index"]] = _kernel_run(wanted[answer["index"]], answer)
        ended_in = started[-1] if started else left[0]["index"]
        if ended_in not in results:
            status = "hung" if outcome.timed_out else "died"
            reason = f"its process {outcome.ending or 'ended'}: {outcome.complaint}"
            results[ended_in] = _kernel_run(wanted[ended_in], {"status": status, "reason": reason})
            key = _of(wanted[ended_in])
            fatal[key] = fatal.get(key, 0) + 1
        left = [job for job in left if job["index"] not in results]
        for job in [job for job in left if fatal.get(_of(job), 0) >= GIVE_UP_AFTER]:
            reason = f"{GIVE_UP_AFTER} kernels of this backend hung or died before it"
            results[job["index"]] = _kernel_run(job, {"status": "not run", "reason": reason})
            left.remove(job)
    if runner is not None:
        runner.end()
    return tuple(results[index] for index in sorted(results))


def _of(job: Mapping[str, Any]) -> tuple[str, str]:
    return job["backend"], place(Device(**job["device"]))


def _kernel_run(job: Mapping[str, Any], facts: Mapping[str, Any]) -> KernelRun:
    said = {name: value for name, value in facts.items() if name != "index"}
    if said.get("shape"):
        said["shape"] = tuple(said["shape"])
    return KernelRun(place(Device(**job["device"])), job["backend"], job["kernel"], job["dtype"], **said)


def cache_state(folder: Path) -> CacheState:
    """Whether the cache can be written, by this user alone. Writes nothing that stays."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        if existing == folder:
            with tempfile.TemporaryFile(dir=folder):
                pass
        elif not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"{existing} is no folder that can be written")
    except OSError as error:
        return CacheState(folder, str(error), "")
    return CacheState(folder, "", _exposed(folder) if existing == folder else "")


def _exposed(folder: Path) -> str:
    """Who else may write `folder`."""
    if not hasattr(os, "getuid"):  # permissions of another kind
        return ""
    found = folder.stat()
    if found.st_uid != os.getuid():
        return f"{folder} belongs to user {found.st_uid}, and you are {os.getuid()}"
    who = [name for name, bit in (("its group", stat.S_IWGRP), ("everybody", stat.S_IWOTH)) if found.st_mode & bit]
    return f"{folder} may be written by {' and '.join(who)}" if who else ""


def _model(request: Request) -> tuple[Model | None, tuple[str, str] | None]:
    asked = json.dumps({"model": request.model, "opening": dict(request.opening)})
    outcome = ask("awq_rt.doctor.model", asked, limit_s=MODEL_LIMIT_S)
    if not outcome.answers:
        reason = f"opening {request.model} {outcome.ending or 'ended its process'}: {outcome.complaint}"
        return None, ("AWQ-MODEL-004", reason)
    said = outcome.answers[-1]
    return (None, (said["code"], said["reason"])) if "code" in said else (model_from(said), None)


def model_from(said: Mapping[str, Any]) -> Model:
    """What the model's worker answered."""
    lists = {name: tuple(tuple(v) if isinstance(v, list) else v for v in value)
             for name, value in said.items() if isinstance(value, list)}  # fmt: skip
    return Model(**{**said, **lists, "memory": Memory(**said["memory"])})


def _torch(answer: Mapping[str, Any]) -> Torch | None:
    if not answer or "error" in answer:
        return None
    lists = {name: tuple(value) for name, value in answer.items() if isinstance(value, list)}
    return Torch(**{name: value for name, value in answer.items() if name != "step"} | lists)


def _offer(said: Mapping[str, Any]) -> Offer:
    return Offer(**{**said, "layouts": tuple(said["layouts"])})


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
        tuple(Tool(**tool) for tool in state.get("tools", ())),
    )
