"""Packed weights that have no room on the device that uses them: they rest in the host's memory or in files.

accelerate's hooks bring dense parameters and activations to the device, and leave buffers that are not saved, as packed
weights are, to their module: `AwqLinear` copies its own for each product, as the device's backend packed them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InvalidConfig, OutOfMemory, WriteError
from ..linear import AwqLinear

Home = Literal["cpu", "disk"]

ALIGNMENT = 64
"""Bytes. Where tensors begin in memory that several share: a line of a CPU's cache."""

LARGEST_BLOCK = 1 << 28
"""Bytes of page-locked memory that are asked for at a time; what is left of the last is lost."""


class Homes:
    """Where the packed linears of `model`, which holds no weights yet, rest that are not on the device that uses them.

    `device_map` is read as accelerate does: beside another device the CPU only keeps weights, alone it computes. What
    stands in for these linears while the model loads is made empty, so that it takes no room on their device.
    """

    def __init__(self, model: nn.Module, device_map: Mapping[str, Any]):
        self.places: dict[nn.Module, tuple[str, Home]] = {}
        host_bytes = 0
        elsewhere = {"cpu", "disk"} if {*device_map.values()} - {"cpu", "disk"} else {"disk"}
        for path, module in model.named_modules():
            place = _place(device_map, path)
            if isinstance(module, AwqLinear) and isinstance(place, str) and place in elsewhere:
                home: Home = "disk" if place == "disk" else "cpu"
                self.places[module] = (path, home)
                host_bytes += module.packed_0.nbytes if home == "cpu" else 0
                nothing = torch.empty(0, dtype=torch.uint8, device="meta")
                module.register_buffer("packed_0", nothing, persistent=False)
        self._locked = PageLocked(host_bytes)

    def take(self, linear: AwqLinear, folder: str | None) -> None:
        """Move the packed weight of `linear` to its home, a file in `folder` for "disk"; nothing where it has none.

        Raises `InvalidConfig` where there is no folder, `WriteError`, `OutOfMemory`.
        """
        if linear not in self.places:
            return
        path, home = self.places[linear]
        tensors = [tensor.contiguous() for tensor in linear.packed.tensors]
        if home == "disk":
            linear.offload(_mapped(tensors, path, folder))
        else:
            memory = self._locked.piece(sum(map(_room, tensors)))
            linear.offload([view.copy_(tensor) for view, tensor in zip(_views(memory, tensors), tensors, strict=True)])


def _place(device_map: Mapping[str, Any], path: str) -> Any:
    """The entry for the module at `path`, or for the smallest one that it is part of."""
    while path and path not in device_map:
        path = path.rpartition(".")[0]
    return device_map.get(path)


class PageLocked:
    """Memory of the host that a GPU reads by itself, at ten times the speed of other memory.

    Handed out in pieces of blocks: torch rounds each request up to a power of two. `expected` is the sum of all pieces.
    """

    def __init__(self, expected: int):
        self._block = min(LARGEST_BLOCK, 1 << max(expected - 1, 0).bit_length())
        self._left = torch.empty(0, dtype=torch.uint8)

    def piece(self, size: int) -> Tensor:
        """`size` bytes. Raises `OutOfMemory`."""
        if size > len(self._left):
            block = max(self._block, size)
            try:
                self._left = torch.empty(block, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            except RuntimeError as error:
                raise OutOfMemory(
                    f"the host has no {block} bytes of page-locked memory left for weights that "
                    "device_map puts on the CPU; give max_memory less for 'cpu', so that they go to the disk"
                ) from error
        piece, self._left = self._left[:size], self._left[size:]
        return piece


def _mapped(tensors: Sequence[Tensor], path: str, folder: str | None) -> list[Tensor]:
    """`tensors` as views of a file in `folder`. It has no name any more: it goes when they do."""
    if folder is None:
        raise InvalidConfig(
            f"device_map puts {path} on the disk, and packed weights are not in the checkpoint's own form there; pass "
            "from_pretrained offload_folder=, a folder with room for them"
        )
    name = None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{path}-", delete=False) as file:
            name = file.name
            for tensor in tensors:
                file.write(tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes().ljust(_room(tensor), b"\0"))
            size = file.tell()
        return _views(torch.from_file(name, shared=False, size=size, dtype=torch.uint8), tensors)
    except (OSError, RuntimeError) as error:  # torch maps the file
        raise WriteError(f"{path} cannot be offloaded to {folder}: {error}") from error
    finally:
        if name is not None:
            with contextlib.suppress(OSError):  # a system that lets no file go while it is mapped
                Path(name).unlink()


def _views(memory: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of `memory`, bytes, one behind the other, with the dtypes and shapes of `tensors`."""
    views, start = [], 0
    for tensor in tensors:
        views.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += _room(tensor)
    return views


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def offload_folder(model: nn.Module) -> str | None:
    """The `offload_folder` with which accelerate dispatched `model`: transformers tells it to nobody else."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if folder := getattr(getattr(weights, "dataset", None), "save_folder", None):
            return str(folder)
    return None
