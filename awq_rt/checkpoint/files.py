"""From a path or a hub id to a local folder and the files in it that hold tensors."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from ..errors import CheckpointNotFound, CorruptFile, HubUnavailable, InvalidConfig, MissingShard, UnsupportedFormat

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS = (INDEXES[0], "model.safetensors", "*.safetensors", INDEXES[1], "pytorch_model.bin", "*.pt", "*.bin")
"""Indexes and weights in order of preference: the first that is there is used."""

SHARD = re.compile(r"(.+)-(\d{1,5})-of-(\d{1,5})\.(safetensors|bin|pt)")

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")
"""What a model needs beside its weights: configuration, tokenizer, chat template, code."""

LONGEST_NAME = 255
"""Characters that file systems allow a name; bytes they count too, but no weight file's name is that long."""

NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|consolidated|openvino_).*")

FOREIGN_FILES = {
    "openvino_*.xml": "exported to OpenVINO by optimum-intel; load it with OVModelForCausalLM, or quantise the model "
    "with awq_rt.quantize",
    "quantized_weight.pt": "saved by Intel Neural Compressor in its own format, which packs as GPTQ does; load it with "
    "neural_compressor, or quantise the model with awq_rt.quantize",
}
"""Files that other software leaves beside no weights of ours, and what they are."""


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    """A checkpoint on this machine. `index` maps tensors to file names where an index says so, else None.

    `source` is the folder `root`, or the one file in it that was asked for.
    """

    root: Path
    source: Path
    weights: tuple[Path, ...]
    index: dict[str, str] | None


def locate(id_or_path: str | Path, *, revision: str | None = None, token: str | None = None) -> CheckpointFiles:
    """The checkpoint's files, fetched from the hub if `id_or_path` is no path here.

    Raises `CheckpointNotFound`, `HubUnavailable`, `MissingShard`, `InvalidConfig` or `UnsupportedFormat`.
    """
    name = str(id_or_path)
    if path := _existing(name):
        return CheckpointFiles(path.parent, path, (path,), None) if path.is_file() else _in_folder(path)
    if HUB_ID.fullmatch(name) and not name.endswith((".pt", ".bin", ".safetensors")):
        return _in_folder(_fetch(name, revision, token))
    raise CheckpointNotFound(f"{name!r} is not a file or folder here, and not a hub id (like 'owner/model')")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `InvalidConfig`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"{path} cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InvalidConfig(f"{path} holds a {type(value).__name__}; an object is expected")
    return value


def _existing(name: str) -> Path | None:
    """The file or folder of that name, None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError):  # too long, not ours to look into, the home of an unknown user
        return None


def _in_folder(root: Path) -> CheckpointFiles:
    for pattern in WEIGHTS:
        if pattern == INDEXES[1]:  # no safetensors so far
            _check_not_foreign(root)
        if weights := _matching(root, pattern):
            if pattern in INDEXES:
                return _from_index(root, pattern)
            _check_numbering(root, weights)
            return CheckpointFiles(root, root, tuple(weights), None)
    raise CheckpointNotFound(
        f"{root} holds no weights; expected one of {', '.join(WEIGHTS)}; "
        f"found {', '.join(sorted(path.name for path in root.iterdir())[:12]) or 'nothing'}"
    )


def _check_not_foreign(root: Path) -> None:
    for pattern, meaning in FOREIGN_FILES.items():
        if found := next(iter(sorted(root.glob(pattern))), None):
            raise UnsupportedFormat(f"{root} holds {found.name}: it was {meaning}")


def _matching(root: Path, pattern: str) -> list[Path]:
    """The files of that name in the folder, training states and the like excepted."""
    return [path for path in sorted(root.glob(pattern)) if path.is_file() and not NOT_WEIGHTS.fullmatch(path.name)]


def _check_numbering(root: Path, weights: list[Path]) -> None:
    """Raise `MissingShard` where files are numbered "1 of 3" and the index that would miss the others is absent too."""
    here = {path.name for path in weights}
    for path in weights:
        if numbered := SHARD.fullmatch(path.name):
            stem, width, total, suffix = numbered[1], len(numbered[2]), int(numbered[3]), numbered[4]
            names = (f"{stem}-{number + 1:0{width}d}-of-{numbered[3]}.{suffix}" for number in range(total))
            if missing := next((name for name in names if name not in here), None):
                raise MissingShard(f"{root} holds {path.name} but neither {missing} nor an index; download them again")


def _weight_map(root: Path, index_name: str) -> dict[str, str]:
    """The index: tensor -> file name. Raises `InvalidConfig`."""
    weight_map = read_json(root / index_name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidConfig(f"{root / index_name} has no weight_map; download it again")
    for tensor, file_name in weight_map.items():
        # A plain file name only: an index must not lead out of its folder.
        plain = isinstance(file_name, str) and Path(file_name).name == file_name and file_name not in ("", ".", "..")
        if not plain or len(file_name) > LONGEST_NAME:
            raise InvalidConfig(f"{root / index_name} places {tensor} in {file_name!r:.300}; a file name is expected")
    return weight_map


def _from_index(root: Path, index_name: str) -> CheckpointFiles:
    weight_map = _weight_map(root, index_name)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise MissingShard(
            f"{root / index_name} names {len(names)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}; download them again"
        )
    for name in names:
        _check_stays_inside(root, name, index_name)
    return CheckpointFiles(root, root, tuple(root / name for name in names), weight_map)


def _check_stays_inside(root: Path, name: str, index_name: str) -> None:
    """Raise `InvalidConfig` where `name` is a link that leads out of the checkpoint: out of its folder, or in the hub's
    cache (snapshots/REVISION/name -> blobs/DIGEST) out of its repository.
    """
    folder, target = root.resolve(), (root / name).resolve()
    homes = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    if target.parent not in homes:
        raise InvalidConfig(
            f"{root / index_name} names {name}, which is a link to {target}, outside of the checkpoint; "
            "put the file itself there, or open the folder that holds it"
        )


def _fetch(repository: str, revision: str | None, token: str | None) -> Path:
    """The repository's snapshot in huggingface_hub's cache, with the files that are needed and no others."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # Of the HTTP library that this release of huggingface_hub is built on: httpx or httpx2.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])

    def fetch(patterns: list[str]) -> Path:
        download = partial(snapshot_download, repository, revision=revision, token=token, allow_patterns=patterns)
        try:
            return Path(download())
        except HfHubHTTPError:
            raise  # the hub has answered
        except (OfflineModeIsEnabled, http_error):
            # snapshot_download asks the hub what a commit holds even where the cache holds the commit.
            with suppress(LocalEntryNotFoundError):
                return Path(download(local_files_only=True))
            raise

    try:
        root = fetch(list(SMALL_FILES))
        for pattern in WEIGHTS:
            if pattern not in INDEXES:
                root = fetch([pattern])
            if _matching(root, pattern):
                return fetch(sorted(set(_weight_map(root, pattern).values()))) if pattern in INDEXES else root
    except GatedRepoError as error:
        raise HubUnavailable(f"{repository} needs permission: ask for it on its page, then pass token=") from error
    except RepositoryNotFoundError as error:
        raise HubUnavailable(f"the hub has no repository {repository!r} that this token may see") from error
    except HFValidationError as error:
        raise CheckpointNotFound(f"{repository!r} is not a file or folder here, and not a hub id ({error})") from error
    except (OSError, http_error) as error:  # every other error of the hub is an OSError
        at = f" at revision {revision}" if revision else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HubUnavailable(
            f"{repository}{at} is not a folder here, not in the hub's cache, and could not be fetched: {reason}; "
            "check the name and the network (HF_HUB_OFFLINE=1 allows the cache only)"
        ) from error
    return root


def check_not_empty(path: Path) -> int:
    """The file's size in bytes. Raises `CorruptFile` when it is 0: an interrupted download."""
    size = path.stat().st_size
    if size == 0:
        raise CorruptFile(f"{path} is empty; download it again")
    return size
