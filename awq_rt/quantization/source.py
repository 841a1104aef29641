"""A dense checkpoint as the quantiser reads it: one tensor at a time, checked for values that cannot be rounded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files import locate, read_json
from ..checkpoint.reader import tensor_homes
from ..checkpoint.storage import open_file
from ..errors import AlreadyQuantized, NonFiniteWeights
from ..formats import MARKERS, TensorInfo


class DenseSource:
    """The tensors of a dense checkpoint by name. Has the members of `Checkpoint` that describe a model.

    `tensors` are the headers, `config` the contents of config.json. Raises a `CheckpointError` for what cannot be read
    and `AlreadyQuantized` for what is packed or compressed already.
    """

    def __init__(self, id_or_path: str | Path, *, revision: str | None = None, token: str | None = None):
        located = locate(id_or_path, revision=revision, token=token)
        self.root, self.source = located.root, located.source
        path = self.root / "config.json"
        self.config: dict[str, Any] = read_json(path) if path.is_file() else {}
        self.linears: tuple[str, ...] = ()
        self._files = tuple(open_file(file) for file in located.weights)
        self._homes = tensor_homes(self._files, located.index, self.root)
        self.tensors: dict[str, TensorInfo] = {name: file.tensors[name] for name, file in self._homes.items()}
        self._check_dense()

    def read(self, name: str, device: torch.device | str, dtype: torch.dtype, *, part: int | None = None) -> Tensor:
        """The tensor, or its entry `part`, on `device`, floating ones in `dtype`. Raises `NonFiniteWeights`."""
        whole = self._homes[name].view(name)
        tensor = (whole if part is None else whole[part]).to(device)
        if not tensor.is_floating_point():
            return tensor.clone()
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteWeights(f"{name} in {self.root} holds NaN or infinity; the checkpoint is broken")
        return tensor.to(dtype, copy=True)

    def stored(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor as a checkpoint in `dtype` holds it; it may share pages with the file."""
        return as_stored(name, self._homes[name].view(name), dtype)

    @property
    def dense(self) -> dict[str, TensorInfo]:
        return self.tensors

    @property
    def digest(self) -> str:
        """A word that changes with the configuration and with any weight file's name, size or time of change."""
        state = hashlib.sha256(repr(sorted(self.config.items(), key=str)).encode())
        for file in self._files:
            stat = file.path.stat()
            state.update(f"{file.path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def _check_dense(self) -> None:
        packed = [name for name in self.tensors if name.rpartition(".")[2] in MARKERS]
        told = self.config.get("quantization_config")
        if packed:
            raise AlreadyQuantized(
                f"{self.root} is quantised already ({packed[0]} and {len(packed) - 1} more are packed); "
                "give the original model, or change the layout with `awq-rt convert`"
            )
        if told:
            raise AlreadyQuantized(
                f"{self.root}/config.json names a quantisation ({told.get('quant_method', 'of no name')}); "
                "give the original model"
            )


def as_stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating tensor in `dtype`, others as they are. Raises `NonFiniteWeights` where a value does not fit."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.detach().to(dtype)
    if not bool(torch.isfinite(stored).all()):
        largest = float(tensor.abs().max())
        raise NonFiniteWeights(
            f"{name} holds {largest:g}, which is not finite or does not fit {str(dtype).removeprefix('torch.')}; "
            "choose dtype='bfloat16'"
        )
    return stored
