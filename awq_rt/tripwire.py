"""`AWQ_RT_CHECK=1`: every module's output is looked at, and the first that is not finite is an error with its name.

A model's float16 activations may leave its range far from where that shows, in a NaN of the logits or in nonsense.
The models are then not fused, so that every module is called and has a name; each call waits for the device. For
finding out, not for serving.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NonFiniteOutput

VARIABLE = "AWQ_RT_CHECK"


def wanted() -> bool:
    """Whether the environment asks for checks."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")


def attach(model: nn.Module) -> None:
    """Watch every module of `model`, whose calls then end in `NonFiniteOutput` instead of going on with NaN."""
    for path, module in model.named_modules():
        module.register_forward_hook(_Watch(path or type(model).__name__), with_kwargs=True)


class _Watch:
    """A hook for one module. Inner modules end first, so the first to complain is where it began."""

    def __init__(self, path: str):
        self.path = path

    def __call__(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        bad = next((tensor for tensor in _floating(output) if not _finite(tensor)), None)
        if bad is None or not all(_finite(tensor) for tensor in _floating((arguments, keywords))):
            return  # what came in was not finite already: a mask, or what no module has made
        raise NonFiniteOutput(f"{self.path} ({type(module).__name__}): {_told(bad)}; {_inputs(arguments, keywords)}; "
                              f"load the model with {_remedy(bad.dtype)}")  # fmt: skip


def _floating(value: Any) -> Iterator[Tensor]:
    """Floating tensors in what a module was given or gave."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.device.type != "meta":
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _floating(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _floating(part)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _told(bad: Tensor) -> str:
    """Of what, how much, and where first."""
    nans, infinities = int(torch.isnan(bad).sum()), int(torch.isinf(bad).sum())
    first = torch.nonzero(~torch.isfinite(bad))[0].tolist()
    counts = f"{nans} NaN and {infinities} infinite" if nans and infinities else f"{nans or infinities} "
    kind = "" if nans and infinities else "NaN" if nans else "infinite"
    return f"{counts}{kind} of {bad.numel()} values of its output {bad.dtype}{list(bad.shape)}, first at {first}"


def _inputs(arguments: Any, keywords: Any) -> str:
    largest = [float(tensor.abs().max()) for tensor in _floating((arguments, keywords)) if tensor.numel()]
    return f"its inputs were finite, at most {max(largest):.6g}" if largest else "it was given no floating tensor"


def _remedy(dtype: torch.dtype) -> str:
    if dtype == torch.float16:
        return f"dtype='bfloat16', whose range is larger than float16's {torch.finfo(dtype).max:.6g}"
    return "dtype='float32', or look for damaged weights: `awq-rt doctor MODEL`"
