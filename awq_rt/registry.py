"""Which backends are installed, which can be trusted, and which one serves a linear.

Plugins are found through the entry-point group `awq_rt.backends`. A plugin that did not come with awq_rt is first
imported and tried in a process of its own (`examination.py`), so that one which crashes is an answer too; a broken
plugin is quarantined by name with its reason, and the others go on. This module never names a backend.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import devices
from .backend import CONTRACT, Backend, LinearSpec
from .devices import Device, Refusal
from .errors import BackendQuarantined, NoBackend, UnknownBackend, UnknownKernel, UnsupportedDevice
from .examination import examine

ENTRY_POINT_GROUP = "awq_rt.backends"
MEMBERS = ("name", "version", "contract", "priority", "kernels", "ops", "probe", "supports", "pack", "unpack", "linear")

_distrusted: dict[tuple[str, LinearSpec, Device], Refusal] = {}
"""Kernels that computed wrongly in this process, by backend, linear and device."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """One installed backend: either loaded (`backend`) or quarantined (`refusal`)."""

    name: str
    distribution: str
    version: str
    backend: Backend | None
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend that serves a linear, and why each one that ranks above it does not."""

    backend: Backend
    refusals: tuple[tuple[str, Refusal], ...]


@functools.cache
def plugins() -> tuple[Plugin, ...]:
    """Every installed plugin, loaded or quarantined, the highest priority first."""
    entries = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name)
    groups = [list(group) for _, group in itertools.groupby(entries, key=lambda entry: entry.name)]
    found = [plugin for group in groups for plugin in _load_all(group)]
    return tuple(sorted(found, key=lambda p: (p.backend is None, -(p.backend.priority if p.backend else 0), p.name)))


def get(name: str) -> Backend:
    """The loaded backend `name`. Raises `UnknownBackend` or `BackendQuarantined`."""
    for plugin in plugins():  # the loaded ones come first
        if plugin.name == name:
            if plugin.backend is None:
                raise BackendQuarantined(f"backend {name!r} is quarantined: {plugin.refusal}")
            return plugin.backend
    raise UnknownBackend(f"backend {name!r} is not installed; installed: {_listed(p.name for p in plugins())}")


def backends() -> tuple[Backend, ...]:
    """The loaded backends, the highest priority first."""
    return tuple(plugin.backend for plugin in plugins() if plugin.backend is not None)


@functools.cache  # asking nvidia-smi takes up to a second, and every linear of a model asks
def device_for(wanted: torch.device) -> Device:
    """What is known of the torch device `wanted`: some backend's probe, or the machine's own facts."""
    index = wanted.index or 0
    probed = [device for backend in backends() for device in backend.probe().devices]
    for device in (*probed, *devices.cpu().devices, *devices.nvidia().devices, *devices.amd().devices):
        if device.type == wanted.type and (device.type == "cpu" or device.index == index):
            return device
    return Device(wanted.type, index, str(wanted), wanted.type, "unknown", 0)


def default_device() -> torch.device:
    """The first device of the highest-ranking backend that torch can use; the CPU when there is none.

    Warns when the machine has a GPU that nothing here drives, with the reason.
    """
    for backend in backends():
        for device in backend.probe().devices:
            if device.type != "cpu" and not torch_refusal(device.type):
                return torch.device(device.type, device.index)
    idle = (*devices.nvidia().devices, *devices.amd().devices)
    if idle:
        warnings.warn(f"{idle[0]} is not used: {_why_idle(idle[0])}", RuntimeWarning, stacklevel=3)
    return torch.device("cpu")


def checked_device(device: str | torch.device) -> torch.device:
    """`device` as torch knows it. Raises `UnsupportedDevice` when it cannot be used here."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedDevice(f"device {device!r} is not a torch device ({error}); try 'cpu' or 'cuda:0'") from error
    if refusal := torch_refusal(wanted.type):
        raise UnsupportedDevice(f"device {str(wanted)!r} cannot be used: {refusal.reason}; {refusal.fix}")
    if wanted.type != "cpu":
        count = getattr(torch, wanted.type).device_count()
        if (wanted.index or 0) >= count:
            raise UnsupportedDevice(
                f"device {str(wanted)!r} does not exist; torch sees {count} of type {wanted.type!r}"
            )
    return wanted


def select(spec: LinearSpec, device: Device, backend: str | None = None) -> Choice:
    """The backend for `spec` on `device`: the pinned one, else the highest priority that supports it.

    Raises `UnknownBackend`, `BackendQuarantined`, `UnknownKernel`, or `NoBackend` with every refusal.
    """
    candidates = backends() if backend is None else (get(backend),)
    if spec.kernel != "auto" and not any(spec.kernel in candidate.kernels for candidate in candidates):
        known = sorted({kernel for candidate in candidates for kernel in candidate.kernels})
        raise UnknownKernel(f"kernel {spec.kernel!r} is not known to {_listed(c.name for c in candidates)}; "
                            f"kernels here: auto, {_listed(known)}")  # fmt: skip
    refusals = [(p.name, p.refusal) for p in plugins() if p.refusal is not None and backend is None]
    for candidate in candidates:
        refusal = refusal_of(candidate, spec, device)
        if refusal is None:
            return Choice(candidate, tuple(refusals))
        refusals.append((candidate.name, refusal))
    reasons = "\n".join(f"  {name}: {refusal}" for name, refusal in refusals) or "  none is installed"
    raise NoBackend(f"no backend can serve {spec} on {device}:\n{reasons}")


def refusal_of(backend: Backend, spec: LinearSpec, device: Device) -> Refusal | None:
    """None when `backend` serves `spec` on `device`, else why not."""
    if refusal := _distrusted.get((backend.name, spec, device)):
        return refusal
    if spec.kernel not in ("auto", *backend.kernels):
        fix = f"choose one of: auto, {_listed(backend.kernels)}"
        return Refusal("AWQ-BACKEND-002", f"it has no kernel {spec.kernel!r}", fix)
    try:
        return backend.supports(spec, device)
    except Exception as error:  # the contract forbids it; the backends below can still serve
        reason = f"supports() raised {type(error).__name__}: {error}"
        return Refusal("AWQ-BACKEND-018", reason, f"update {backend.name}")


def distrust(name: str, spec: LinearSpec, device: Device, refusal: Refusal) -> bool:
    """Let the backend `name` serve no `spec` on `device` any more in this process: it was seen to be wrong.

    True when it is the first time for this backend on this device.
    """
    first = not any((known, place) == (name, device) for known, _, place in _distrusted)
    _distrusted[name, spec, device] = refusal
    return first


def torch_refusal(device_type: str) -> Refusal | None:
    """None when this build of torch, on this machine, can use devices of the type."""
    if device_type == "cpu":
        return None
    module: Any = getattr(torch, device_type, None)
    if not hasattr(module, "is_available"):
        return Refusal("AWQ-DEVICE-001", f"torch has no device type {device_type!r}", "choose 'cpu' or 'cuda'")
    if not module.is_available():
        return Refusal(
            "AWQ-DEVICE-001",
            f"torch {torch.__version__} does not reach a {device_type!r} device",
            "install the build of torch for your GPU, or choose device='cpu'; `awq-rt doctor` says more",
        )
    return None


def _why_idle(device: Device) -> str:
    if refusal := torch_refusal(device.type):
        return str(refusal)
    broken = [f"{p.name} is quarantined ({p.refusal})" for p in plugins() if p.refusal is not None]
    return (
        "; ".join(broken) or "no installed backend drives it; `awq-rt doctor` says which to install [AWQ-BACKEND-004]"
    )


def _load_all(entries: Sequence[importlib.metadata.EntryPoint]) -> Iterator[Plugin]:
    """The plugins behind the entry points of one name. One is loaded at most: the name is all that picks it."""
    trusted = [entry for entry in entries if _is_shipped(entry)]
    rightful = trusted[0] if trusted else entries[0] if len(entries) == 1 else None
    for entry in entries:
        if entry is rightful:
            yield _load(entry)
        else:
            others = _listed(_distribution(other) for other in entries if other is not entry)
            reason = f"{others} registers the name {entry.name!r} too"
            yield _plugin(entry, refusal=Refusal("AWQ-BACKEND-017", reason, "uninstall one of them"))


def _load(entry: importlib.metadata.EntryPoint) -> Plugin:
    if not _is_shipped(entry):
        refusal = examine(entry.name, _plugin(entry).version)
        if refusal is not None:
            return _plugin(entry, refusal=refusal)
    try:
        backend = entry.load()
    except Exception as error:  # a plugin's import may raise anything; that is what quarantine is for
        reason = f"loading it raised {type(error).__name__}: {error}"
        return _plugin(entry, refusal=Refusal("AWQ-BACKEND-010", reason, f"reinstall {_distribution(entry)}"))
    refusal = contract_refusal(backend, entry.name)
    return _plugin(entry, refusal=refusal) if refusal else _plugin(entry, backend=backend)


def _plugin(
    entry: importlib.metadata.EntryPoint, backend: Backend | None = None, refusal: Refusal | None = None
) -> Plugin:
    version = entry.dist.version if entry.dist else "unknown"
    return Plugin(entry.name, _distribution(entry), version, backend, refusal)


def contract_refusal(candidate: object, name: str) -> Refusal | None:
    """None when `candidate` has the members of `Backend`, speaks our contract and goes by `name`."""
    missing = [member for member in MEMBERS if not hasattr(candidate, member)]
    if missing:
        return Refusal("AWQ-BACKEND-014", f"it lacks {_listed(missing)}", f"update {name} to this awq_rt's contract")
    its = {member: getattr(candidate, member) for member in MEMBERS}
    match its["contract"]:
        case (int(major), int(minor)) if major == CONTRACT[0] and minor <= CONTRACT[1]:
            pass
        case other:
            reason = f"it is written for contract {other}, awq_rt has {CONTRACT}"
            return Refusal("AWQ-BACKEND-015", reason, f"install versions of awq-rt and {name} that match")
    if its["name"] != name:
        reason = f"it calls itself {its['name']!r}; its entry point is {name!r}"
        return Refusal("AWQ-BACKEND-016", reason, f"update {name}: both names must be the same")
    if not isinstance(its["priority"], int):
        reason = f"its priority is {its['priority']!r}; an int is expected"
        return Refusal("AWQ-BACKEND-014", reason, f"update {name} to this awq_rt's contract")
    return None


def _is_shipped(entry: importlib.metadata.EntryPoint) -> bool:
    return _canonical(_distribution(entry)) in _shipped_distributions()


@functools.cache
def _shipped_distributions() -> frozenset[str]:
    """Distributions that awq_rt itself requires: tested with it, so importing them needs no precaution."""
    try:
        required = importlib.metadata.requires("awq-rt") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree that nobody installed
        return frozenset()
    names = (re.findall(r"^[\w.-]+", line) for line in required if "extra ==" not in line)
    return frozenset(map(_canonical, itertools.chain(*names)))


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown"


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
