"""The half of the doctor that may die: imports torch, transformers and the plugins, and answers after each step.

Runs in a process of its own (`examination.Worker`), transformers in another beside it. The steps that were answered
are what can be relied on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from .. import devices
from ..devices import Device, Probe
from ..examination import answer

TYPICAL_SHAPE = (4096, 4096, 128)
"""(K, N, G) that backends are asked about: a projection of a model with 7e9 parameters."""

DTYPES = ("float32", "float16", "bfloat16")


def main() -> None:
    """Answers `{"step": ..., "error": ...}` or `{"step": ..., ...facts}` for each step that the arguments name."""
    for name in sys.argv[1:]:
        if not _answered(name, STEPS[name]):
            return


def _answered(name: str, step: Callable[[], dict[str, Any]]) -> bool:
    try:
        with warnings.catch_warnings(record=True):  # what they warn of is either in the facts or not about this machine
            facts = step()
    except BaseException as error:  # an import may raise anything, SystemExit too
        failure = {"step": name, "error": f"{type(error).__name__}: {error}", "missing": _missing(error)}
        if version := getattr(sys.modules.get(name), "__version__", None):  # imported, but too old to be asked
            failure["version"] = str(version)
        answer(failure)
        return False
    answer({"step": name, **facts})
    return True


def _missing(error: BaseException) -> str:
    return error.name or "" if isinstance(error, ModuleNotFoundError) else ""


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "hip": getattr(torch.version, "hip", None) or "",
        "path": torch.__file__,
        "threads": torch.get_num_threads(),
        "unreachable": _unreachable(torch),
        "arches": _arches(torch),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _unreachable(torch: Any) -> str:
    """Why torch reaches no GPU, in its own words; "" when it reaches one."""
    if torch.cuda.is_available():
        return ""
    if not torch.version.cuda and not getattr(torch.version, "hip", None):
        return "it is a build for the CPU only"
    try:
        torch.cuda.init()
    except Exception as error:  # AssertionError, RuntimeError and more: the text is what matters
        return str(error)
    return "it sees none"


def _arches(torch: Any) -> list[str]:
    """What torch was compiled for. The public question answers nothing where there is no GPU."""
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return list(torch.cuda.get_arch_list() or (flags or "").split())


def _transformers() -> dict[str, Any]:
    import transformers

    return {"version": transformers.__version__}


def _plugins() -> dict[str, Any]:
    from .. import registry

    states = []
    for plugin in registry.plugins():
        backend = plugin.backend
        probe = backend.probe() if backend else Probe()
        states.append(
            {
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "priority": backend.priority if backend else None,
                "kernels": list(backend.kernels) if backend else [],
                **asdict(probe),
                "tools": _tools(backend),
                "refusal": asdict(plugin.refusal) if plugin.refusal else None,
            }
        )
    return {"plugins": states}


def _tools(backend: Any) -> list[dict[str, str]]:
    try:
        return [asdict(tool) for tool in getattr(backend, "tools", tuple)()]
    except Exception as error:  # what it lacks, its probe says
        return [{"name": "run-time compiler", "version": f"{type(error).__name__}: {error}", "path": ""}]


def _selection() -> dict[str, Any]:
    """Every kernel family, dtype and layout on every device: who would serve it, and why others would not."""
    from .. import registry

    found: dict[tuple[str, int], Device] = {}
    reachable = registry.torch_refusal("cuda") is None
    for device in (
        *(device for backend in registry.backends() for device in backend.probe().devices),
        *((*devices.nvidia().devices, *devices.amd().devices) if reachable else ()),
    ):
        if registry.torch_refusal(device.type) is None:
            found.setdefault((device.type, device.index), device)
    return {"offers": [offer for device in found.values() for offer in _offers(device)]}


def _offers(device: Device) -> list[dict[str, Any]]:
    from .. import registry
    from ..formats import LAYOUTS

    offers: dict[tuple[str, ...], list[str]] = {}
    for backend in registry.backends():
        for kernel in ("auto", *backend.kernels):
            for dtype in DTYPES:
                for layout in LAYOUTS.values():
                    symmetric = not set(layout.SUFFIXES) & {"qzeros", "scaled_zeros", "weight_zero_point"}
                    said = _asked(backend, device, kernel, dtype, symmetric)
                    offers.setdefault((backend.name, kernel, dtype, *said), []).append(layout.NAME)
    where = "cpu" if device.type == "cpu" else f"{device.type}:{device.index}"
    fields = ("backend", "kernel", "dtype", "status", "code", "reason")
    return [
        {"device": where, "layouts": layouts, **dict(zip(fields, key, strict=True))} for key, layouts in offers.items()
    ]


def _asked(backend: Any, device: Device, kernel: str, dtype: str, symmetric: bool) -> tuple[str, str, str]:
    """(status, code, reason) of one offer."""
    import torch

    from .. import registry
    from ..backend import LinearSpec
    from ..errors import NoBackend

    spec = LinearSpec(*TYPICAL_SHAPE, getattr(torch, dtype), symmetric, kernel=kernel)
    refusal = registry.refusal_of(backend, spec, device)
    if refusal is not None:
        return "rejected", refusal.code, str(refusal)
    try:
        chosen = kernel == "auto" and registry.select(spec, device).backend.name == backend.name
    except NoBackend:  # not that of a moment ago
        chosen = False
    return ("selected" if chosen else "available"), "", ""


STEPS = {"torch": _torch, "transformers": _transformers, "plugins": _plugins, "selection": _selection}
