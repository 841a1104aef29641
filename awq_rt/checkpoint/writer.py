"""A folder of safetensors shards with its index and configuration, which appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import DestinationExists, WriteError
from .files import INDEXES, SMALL_FILES

MAX_SHARD_BYTES = 2 << 30
"""A shard is held in memory while it is written."""

REWRITTEN = ("config.json", "quant_config.json", "quantize_config.json", *INDEXES)


KNOWN_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "generation_config.json", "chat_template*", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
"""What is copied from beside a single file, which may lie in a folder of anything: Downloads, a home."""


def write_checkpoint(
    destination: Path,
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    *,
    beside: Path | None = None,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `tensors` as shards, `config` as config.json, and copies of the small files (tokenizer) in the
    folder `beside`, or of those with well-known names beside the file `beside`.

    Raises `DestinationExists` (unless `force`), or `WriteError`; the destination is then as it was.
    """
    if beside is not None:
        # A file of the hub's cache is a link: neither what it leads to nor the folder that it is in may go.
        holders = {*beside.resolve().parents, *(beside.parent.resolve() / beside.name).parents}
        if destination.resolve() in holders:
            raise DestinationExists(f"{destination} holds the source {beside}; choose another name")
    with _appearing(destination, force) as folder:
        _write_shards(folder, tensors, max_shard_bytes)
        (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
        for source in _small_files(beside):
            shutil.copyfile(source, folder / source.name)


def _small_files(beside: Path | None) -> Iterator[Path]:
    if beside is None:
        return
    folder, names = (beside.parent, KNOWN_FILES) if beside.is_file() else (beside, ("*",))
    for path in sorted({path for pattern in SMALL_FILES for path in folder.glob(pattern)}):
        known = path.name not in REWRITTEN and any(fnmatchcase(path.name, name) for name in names)
        if known and path.is_file() and _belongs(path, folder.resolve()):
            yield path


def _belongs(path: Path, folder: Path) -> bool:
    """Whether the file's content lies in its `folder`, or in the blobs of the hub's cache that the folder is part of.

    A link may lead to any file of the user's, which a converted checkpoint would then publish.
    """
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    homes = [folder] if snapshots is None else [folder, snapshots.parent / "blobs"]
    return any(path.resolve().is_relative_to(home) for home in homes)


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    memory: set[int] = set()  # where the pending tensors lie
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending, pending_bytes = {}, 0
            memory.clear()

    for name, tensor in tensors:
        if pending_bytes + tensor.nbytes > max_shard_bytes:
            flush()
        whole = tensor.contiguous()
        if whole.untyped_storage().data_ptr() in memory:
            whole = whole.clone()  # safetensors refuses tensors that share memory, as tied ones from a pickle do
        memory.add(whole.untyped_storage().data_ptr())
        pending[name] = whole
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    flush()

    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEXES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _appearing(destination: Path, force: bool) -> Iterator[Path]:
    """A folder that takes the name `destination` when the block ends well, and vanishes when it does not."""
    _check_replaceable(destination, force)
    folder: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        yield folder
        for path, mode in ((folder, 0o777), *((file, 0o666) for file in folder.iterdir())):
            path.chmod(mode & ~_umask())  # temporary files are made private
        _swap(folder, destination)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{destination} could not be written ({error}); it is as it was") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _check_replaceable(destination: Path, force: bool) -> None:
    """`force` replaces a checkpoint or an empty folder, and nothing else: a slip must not cost somebody's folder."""
    if not destination.exists():
        return
    if not force:
        raise DestinationExists(f"{destination} exists; choose another name, or force")
    if destination.is_symlink():  # the link is replaced, and what it leads to is left alone
        return
    if not destination.is_dir() or (any(destination.iterdir()) and not (destination / "config.json").is_file()):
        raise DestinationExists(
            f"{destination} is no checkpoint (no config.json), so it is not replaced; choose another"
        )


def _swap(folder: Path, destination: Path) -> None:
    """Put `folder` where `destination` is. The old one is kept until the new one has its name."""
    if not destination.exists():
        os.rename(folder, destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        os.rename(destination, old / "old")
        try:
            os.rename(folder, destination)
        except BaseException:
            _put_back(old / "old", destination)
            raise
    except BaseException:
        with suppress(OSError):
            old.rmdir()  # only where it is empty: it may hold the one copy of what was there
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: Path, destination: Path) -> None:
    try:
        os.rename(old, destination)
    except OSError as error:
        raise WriteError(f"{destination} could not be replaced, nor be put back ({error}); it is now {old}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
