"""The finished blocks of a run, kept beside the destination until all are done, so that a run can be taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UnfinishedRunDiffers, WriteError
from .report import BlockReport

RUN = "run.json"


class Store:
    """Block number -> its tensors under the checkpoint's names, in the folder `.NAME.unfinished` beside the
    destination.

    A block is there when its record is, which is written last and holds the digest of the tensors' file. `run` says
    what the blocks depend on; one that differs from that of the folder raises `UnfinishedRunDiffers`.
    """

    def __init__(self, destination: Path, run: Mapping[str, Any], *, restart: bool = False):
        self.folder = destination.parent / f".{destination.name}.unfinished"
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        record = self.folder / RUN
        if record.is_file():
            self._check(record, run)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _replace(record, json.dumps(dict(run), indent=1).encode())
        except OSError as error:
            raise WriteError(f"{self.folder} cannot be made ({error}); finished layers are kept there") from error

    def report(self, number: int) -> BlockReport | None:
        """What was reported of the block; None where it is not here, or not as it was written."""
        record, tensors = self._paths(number)
        try:
            stated = json.loads(record.read_text(encoding="utf-8"))
            if _digest(tensors) != stated["sha256"]:
                return None
            return BlockReport.from_json(stated["report"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def tensors(self, number: int) -> dict[str, Tensor]:
        """The block's tensors, mapped from its file."""
        with safe_open(self._paths(number)[1], framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)

    def save(self, number: int, tensors: Mapping[str, Tensor], report: BlockReport) -> None:
        """Keep a finished block. Raises `WriteError`; the blocks before it stay."""
        record, path = self._paths(number)
        temporary = path.with_suffix(".tmp")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            os.replace(temporary, path)
            _replace(record, json.dumps({"sha256": _digest(path), "report": report.to_json()}).encode())
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(
                f"{path} could not be written ({error}); {number} finished layers are kept in {self.folder}: "
                "make room and run the same command again"
            ) from error

    def remove(self) -> None:
        """The run is complete, and its folder not needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"{number:05d}.json", self.folder / f"{number:05d}.safetensors"

    def _check(self, record: Path, run: Mapping[str, Any]) -> None:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        now = json.loads(json.dumps(dict(run)))
        different = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if different:
            told = ", ".join(f"{key} ({before.get(key)!r} then, {now.get(key)!r} now)" for key in different[:3])
            raise UnfinishedRunDiffers(
                f"{self.folder} holds an unfinished run with other {told}; give the same to take it up, "
                "or restart=True (--restart) to begin anew"
            )


def _digest(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
