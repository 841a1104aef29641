"""The same tokens in every process: one random state, and requests that agree."""

from __future__ import annotations

import atexit
import weakref
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from .group import Group

OF_ONE_PROCESS = ("streamer",)
"""Arguments that processes need not share: the first alone may print what all compute."""


class ParallelGeneration:
    """Goes before a model class: `generate` is called by every process with the same arguments, and answers alike.

    Random numbers are those of the first process. Raises `InvalidInput` in all processes where their arguments differ.
    """

    awq_rt_group: Group

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *rest: Any, **arguments: Any
    ) -> Any:
        group = self.awq_rt_group
        configured = generation_config or self.generation_config  # type: ignore[attr-defined]
        if (arguments.get("max_time") or getattr(configured, "max_time", None)) is not None:
            raise NotImplementedError(
                "max_time would stop the processes of a model at different tokens; use max_new_tokens"
            )
        shared = {name: value for name, value in arguments.items() if name not in OF_ONE_PROCESS}
        said = group.gather_numbers([_digest([inputs, generation_config, rest, shared])])
        if differing := [rank for rank, number in enumerate(said) if number != said[0]]:
            raise InvalidInput(
                f"generate was called with other arguments in process {differing[0]} than in process 0; every process "
                "of a model has to pass the same prompt and settings"
            )
        group.share_random_state()
        return super().generate(inputs, generation_config, *rest, **arguments)  # type: ignore[misc]


def attach(model: Any, group: Group) -> None:
    """Let `model.generate` keep in step with the other processes. The model keeps the name of its class."""
    own = type(model)
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    model.__class__ = type(own.__name__, (ParallelGeneration, own), names)
    model.awq_rt_group = group
    atexit.register(_forget_graphs, weakref.ref(model))


def _forget_graphs(model: weakref.ref[Any]) -> None:
    """Before the process group is left: a collective library waits for the graphs that hold its kernels."""
    engine = getattr(model(), "awq_rt_engine", None)
    if engine is not None:
        del engine.session


def _digest(value: Any, before: int = 0) -> int:
    """A checksum of what an argument says; of an object that says nothing here, of its type."""
    if isinstance(value, Tensor):
        return zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), before)
    if hasattr(value, "to_dict"):  # a generation configuration
        value = value.to_dict()
    if isinstance(value, Mapping):
        value = sorted((str(key), item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        for item in value:
            before = _digest(item, before)
        return zlib.crc32(str(len(value)).encode(), before)
    said = repr(value) if value is None or isinstance(value, (str, int, float)) else type(value).__qualname__
    return zlib.crc32(said.encode(), before)
