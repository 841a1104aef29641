"""One trial: a spoiled checkpoint is opened and read whole. It may be read or refused, nothing else may happen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from hostile import spoil, spoil_words
from torch.utils._python_dispatch import TorchDispatchMode

import awq_rt
from awq_rt.checkpoint import open_checkpoint
from awq_rt.errors import CheckpointError

UNPACKED = 16
"""Bytes that unpacking may hold for a packed byte: two codes, each for a moment a 64-bit integer."""

SLACK = 1 << 16
"""Bytes of tensors that no file explains: shifts, masks, orders of columns."""


class ExcessiveAllocation(AssertionError):
    """A tensor larger than the files can explain."""


class LargestTensor(TorchDispatchMode):
    """Watches the operators: `nbytes` is the largest storage that one of them returned."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


def attempt(data: bytes, scratch: Path) -> str:
    """The name of the error that refused the checkpoint made of `data`, "read" where it was read whole.

    `scratch` is a folder of this trial alone. Raises whatever else happens: that is a defect of the reader.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    spoil(data, scratch)
    size = sum(path.stat().st_size for path in scratch.iterdir() if path.is_file() and not path.is_symlink())
    with LargestTensor() as largest:
        outcome = read(scratch)
    if largest.nbytes > UNPACKED * size + SLACK:
        raise ExcessiveAllocation(f"{largest.nbytes} bytes for files of {size}")
    return outcome


def read(folder: Path) -> str:
    """Everything that the reader offers, asked of the checkpoint in `folder`."""
    try:
        checkpoint = open_checkpoint(folder)
        _ = checkpoint.warnings, checkpoint.nbytes, repr(checkpoint)
        for name in checkpoint:
            checkpoint.read(name)
        for name in checkpoint.dense:
            checkpoint.view(name)
    except CheckpointError as error:
        return type(error).__name__
    return "read"


def attempt_to_load(data: bytes, model: Path, scratch: Path) -> str:
    """As `attempt`, of the checkpoint folder `model` whose JSON files `data` spoils, and of all of `awq_rt.load`."""
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(model, scratch)
    spoil_words(data, scratch)
    try:
        awq_rt.load(scratch, device="cpu")
    except CheckpointError as error:
        return type(error).__name__
    return "loaded"
