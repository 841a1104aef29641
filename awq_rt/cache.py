"""Where awq_rt keeps what it can compute again: `AWQ_RT_CACHE`, else the user's cache folder."""

from __future__ import annotations

import functools
import json
import os
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The cache folder; it may not exist yet."""
    folder = chosen_dir()
    return _folder_of_this_process() if folder is None else _unless_shared(folder)


def chosen_dir() -> Path | None:
    """The folder that the environment names, whoever may write to it."""
    if chosen := os.environ.get("AWQ_RT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # a user without a home folder, as in a container with an arbitrary user id
        return None
    return Path(base) / "awq_rt"


@functools.cache
def _unless_shared(folder: Path) -> Path:
    """`folder`, or one of this process where everybody may write to it: what is cached is executed."""
    try:
        shared = folder.stat().st_mode & stat.S_IWOTH
    except OSError:
        return folder  # not there yet, or not to be read: nothing in it will be trusted
    if not shared or os.name == "nt":
        return folder
    warnings.warn(
        f"{folder} is not used as a cache: every user of this machine may write to it, and what is cached is executed; "
        f"chmod o-w {folder}, or set AWQ_RT_CACHE to a folder of your own",
        RuntimeWarning,
        stacklevel=3,
    )
    return _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    """A new folder that nobody else can write to: what is cached is trusted."""
    return Path(tempfile.mkdtemp(prefix="awq_rt-"))


def read_json(path: Path) -> Any:
    """The cached value, or None when there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Cache `value`, whole or not at all. A cache that cannot be written is not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # goes away with what a full disk left in it
            part = Path(folder) / path.name
            part.write_text(json.dumps(value))
            os.replace(part, path)
    except OSError:
        pass
