"""The half of the doctor that may die: imports torch, transformers and the plugins, and answers after each step.

Runs in a process of its own (`examination.ask`). The steps that it managed to answer are what can be relied on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..devices import Probe
from ..examination import answer


def main() -> None:
    """Answers `{"step": ..., "error": ...}` or `{"step": ..., ...facts}` for torch, transformers and plugins."""
    for step in (_torch, _transformers, _plugins):
        if not _answered(step):
            return


def _answered(step: Callable[[], dict[str, Any]]) -> bool:
    name = step.__name__.strip("_")
    try:
        with warnings.catch_warnings(record=True):  # what they warn of is either in the facts or not about this machine
            facts = step()
    except BaseException as error:  # an import may raise anything, SystemExit too
        failure = {"step": name, "error": f"{type(error).__name__}: {error}", "missing": _missing(error)}
        if version := getattr(sys.modules.get(name), "__version__", None):  # imported, but too old to be asked
            failure["version"] = str(version)
        answer(failure)
        return name == "transformers"  # the plugins need torch only
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
                "refusal": asdict(plugin.refusal) if plugin.refusal else None,
            }
        )
    return {"plugins": states}
