"""One file to send with a report of a fault: what the doctor found, every version, the conformance suite's result."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import DestinationExists, WriteError

CONFORMANCE_LIMIT_S = 300.0
"""For one backend's whole suite; what it printed until then is kept."""


def check_free(path: Path) -> None:
    """Raise `DestinationExists` where `path` is there already, `WriteError` where its folder is not."""
    if path.exists() or path.is_symlink():
        raise DestinationExists(f"{path} is there already; give another name, or remove it")
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent} is not a folder; create it, or give another path")


def write(
    path: Path,
    report: dict[str, Any],
    text: str,
    redact: Callable[[str], str],
    limit_s: float = CONFORMANCE_LIMIT_S,
) -> None:
    """Write the zip file `path`, whole or not at all: report.json, report.txt, versions.txt, conformance-NAME.txt.

    The suite runs for every backend that was loaded and drives something. Raises `DestinationExists` or `WriteError`.
    """
    check_free(path)
    parts = {
        "report.json": json.dumps(report, indent=2) + "\n",
        "report.txt": text,
        "versions.txt": redact("\n".join(_versions()) + "\n"),
    }
    for plugin in report["plugins"]:
        if plugin["refusal"] is None and plugin["devices"]:
            parts[f"conformance-{plugin['name']}.txt"] = redact(conformance(plugin["name"], limit_s))
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(f"awq-rt-doctor/{name}", content)
    _write_whole(path, made.getvalue())


def conformance(name: str, limit_s: float) -> str:
    """What the conformance suite printed for the backend `name`, and how it ended."""
    code = f"import sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); import runpy; " \
           "runpy.run_module('awq_rt.testing.conformance', run_name='__main__')"  # fmt: skip
    command = [sys.executable, "-u", "-c", code, os.pathsep.join(map(str, sys.path)), name]
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT, close_fds=True
            )
        except OSError as error:
            return f"could not be started ({error})\n"
        try:
            ended = f"exit status {process.wait(limit_s)}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit_s:g} s, unfinished"
        finally:
            process.kill()
            process.wait()
        printed.seek(0)
        return printed.read().decode(errors="replace") + f"{ended}\n"


def _versions() -> list[str]:
    """Every installed distribution: `name==version`, sorted."""
    found = {f"{dist.metadata['Name']}=={dist.version}" for dist in importlib.metadata.distributions()}
    return [f"python=={sys.version.split()[0]}", *sorted(found, key=str.lower)]


def _write_whole(path: Path, content: bytes) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise WriteError(f"{path} could not be written: {error}") from error
