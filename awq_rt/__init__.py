"""Run 4-bit AWQ language models on whatever GPU there is, or on none.

    model = awq_rt.load("TheBloke/Mistral-7B-Instruct-v0.2-AWQ")

Names are imported when first used: `import awq_rt` touches no GPU and does not import transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .memory import collector_paused

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import open_checkpoint as open_checkpoint
    from .conversion import convert as convert
    from .errors import AwqRtError as AwqRtError
    from .generation.streaming import stream as stream
    from .linear import AwqLinear as AwqLinear
    from .models import load as load
    from .models.registration import register as register
    from .models.registration import unregister as unregister
    from .quantization import quantize as quantize
    from .weights import AwqWeight as AwqWeight

_HOMES = {
    "load": "models",
    "register": "models.registration",
    "unregister": "models.registration",
    "stream": "generation.streaming",
    "open_checkpoint": "checkpoint",
    "Checkpoint": "checkpoint",
    "convert": "conversion",
    "quantize": "quantization",
    "AwqWeight": "weights",
    "AwqLinear": "linear",
    "AwqRtError": "errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with collector_paused():
            value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
