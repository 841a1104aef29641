"""Takes a user's name, the machine's name and private paths out of a report."""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import cache

SYSTEM = ("/usr", "/opt", "/lib", "/lib64", "/etc", "/dev", "/proc", "/sys", "/bin", "/sbin", "/nix/store")
"""Folders that are the same on many machines: what lies in them says nothing of the user."""

PATH = re.compile(r"(?<![\w.<>~/:-])/(?:[^\s:;,'\"()<>\[\]{}|=]+)")
WINDOWS_PATH = re.compile(r"\b[A-Za-z]:\\[^\s;,'\"()<>|]+")
SHORTEST_NAME = 3
"""Shorter names are parts of too many words to be replaced everywhere."""


def redactor() -> Callable[[str], str]:
    """A function that replaces the home folder, the environment's and the cache's folders, other paths outside of the
    system's own, the user's and the machine's name.
    """
    home = os.path.expanduser("~")
    places = {str(cache.chosen_dir()): "<cache>", sys.prefix: "<prefix>", os.getcwd(): "<cwd>", home: "<home>"}
    known = sorted(((path, word) for path, word in places.items() if len(path) > 1), key=lambda pair: -len(pair[0]))
    names = {_user(): "<user>", socket.gethostname(): "<host>", socket.gethostname().split(".")[0]: "<host>"}

    def redact(text: str) -> str:
        for path, word in known:
            text = re.sub(re.escape(path) + r"(?![\w.-])", word, text)
        text = WINDOWS_PATH.sub("<path>", PATH.sub(_shortened, text))
        for name, word in names.items():
            if len(name) >= SHORTEST_NAME:
                text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
        return text

    return redact


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """JSON with `redact` applied to every string in it, keys excepted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redacted(part, redact) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(part, redact) for part in value]
    return value


def _shortened(match: re.Match[str]) -> str:
    path = match.group()
    if path.startswith(tuple(f"{folder}/" for folder in SYSTEM)) or path in SYSTEM or path == "/":
        return path
    return f"<path>/{Path(path).name}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user id without a name
        return ""
