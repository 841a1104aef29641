"""One model over several GPUs, a process for each (`torchrun`).

Packed linears are cut where transformers' own plan says (`model.tp_plan`), between groups and heads, and each process
reads, packs and computes its parts.

plan        which linear is cut how                       group       the processes: sums, gathers, agreement
sharding    a checkpoint as one process reads it,         inbox       memory that the other GPUs write to
partial     from its files where the layout allows
quantizer   the hook in transformers' loader              generation  the same tokens in every process
linears     modules whose results are summed or gathered
"""

from __future__ import annotations

from typing import Any

import torch

from .. import registry
from ..errors import InvalidConfig, UnsupportedDevice
from ..linear import AwqLinear
from .generation import attach as attach
from .group import Group as Group
from .group import join
from .linears import cut_head


def start(tp_plan: str, device: str | torch.device | None, device_map: Any) -> Group:
    """The processes that torchrun started, each on its own device of the kind of `device`, by default the best.

    `tp_plan` is transformers' word: "auto" cuts as the architecture's own plan says. Raises `InvalidConfig` for
    another, `UnsupportedDevice` where devices are named that are each process's own, `NotLaunched`.
    """
    if tp_plan != "auto":
        raise InvalidConfig(f"tp_plan {tp_plan!r} is unknown; 'auto' cuts a model as transformers' plan for it says")
    if device_map is not None:
        raise UnsupportedDevice(f"tp_plan and device_map {device_map!r} were both given: give one")
    wanted = registry.default_device() if device is None else torch.device(device)
    if device is not None and wanted.index is not None:
        raise UnsupportedDevice(
            f"device {str(device)!r} was given with tp_plan, which puts each process on a device of its own; "
            f"give {wanted.type!r}, or nothing"
        )
    return join(wanted.type)


def connect(model: Any, group: Group) -> None:
    """What is left to do when a model's parts are loaded, before they are fused: its head, and a fast way to sum."""
    cut_head(model, group)
    linear = next(module for module in model.modules() if isinstance(module, AwqLinear))
    assert linear.spec is not None
    if group.device.type == "cuda" and "all_reduce_add_rms_norm" in registry.get(linear.backend_name).ops:
        group.open_inbox(model.config.get_text_config().hidden_size * linear.spec.dtype.itemsize)


def quantization_config(*arguments: Any) -> Any:
    """The `ParallelConfig` of these arguments."""
    from .quantizer import ParallelConfig

    return ParallelConfig(*arguments)
