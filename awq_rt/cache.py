"""Where awq_rt keeps what it can compute again: `AWQ_RT_CACHE`, else the user's cache folder."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """The cache folder; it may not exist yet."""
    if chosen := os.environ.get("AWQ_RT_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):  # a user without a home folder, as in a container with an arbitrary user id
        return _folder_of_this_process()
    return Path(base) / "awq_rt"


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
