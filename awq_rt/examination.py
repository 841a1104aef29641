"""A plugin's first import and self-test, in a process of its own and under a time limit.

A plugin that raises, hangs, takes its process down or computes wrong numbers is then a `Refusal`, not a crash of the
user's program. A pass is remembered per plugin files, torch, Python and GPU driver; a failure is tried again each time,
because what mends it may lie outside the plugin.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cache, devices
from .devices import Refusal
from .errors import BackendError

TIME_LIMIT_S = 120
MARK = "awq_rt worker answers: "
"""Starts a line that is an answer, so that whatever a plugin prints on import does not matter."""
KILL_LIMIT_S = 10
_END = object()


def examine(name: str, version: str) -> Refusal | None:
    """None when the plugin `name` loads, keeps the contract and computes rightly on every device it finds."""
    remembered = cache.cache_dir() / "plugins" / f"{fingerprint(name, version)}.json"
    if cache.read_json(remembered) == "passed":
        return None
    refusal = _examine_elsewhere(name)
    if refusal is None:
        cache.write_json(remembered, "passed")
    return refusal


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker answered before it ended, how it ended ("" for as it should), and the last line it complained."""

    answers: tuple[Any, ...]
    ending: str
    complaint: str
    timed_out: bool = False


def ask(module: str, *arguments: str, limit_s: float) -> Outcome:
    """What a `Worker` for `module` answers. It is ended when `limit_s` pass without an answer."""
    return Worker(module, *arguments).outcome(limit_s)


class Worker:
    """`main()` of a module, in a fresh interpreter that looks for modules exactly where this one does.

    It runs from now on. The module answers by calling `answer`, as often as it likes; what else it prints does not
    matter. What its standard input holds is what it is told.
    """

    def __init__(self, module: str, *arguments: str):
        code = (  # at its end the process just goes: torch would take half a second to tear down what the system frees
            f"import os, sys; sys.path[:] = sys.argv.pop(1).split({os.pathsep!r}); from {module} import main; main(); "
            "sys.stdout.flush(); sys.stderr.flush(); os._exit(0)"
        )
        command = [sys.executable, "-c", code, os.pathsep.join(map(str, sys.path)), *arguments]
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self._started: subprocess.Popen[bytes] | OSError
        try:
            self._started = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints
            )
        except OSError as error:
            self._started = error

    def outcome(self, limit_s: float, told: str = "") -> Outcome:
        """What it answers and how it ends, once it was `told` so much. It is ended when it is silent for `limit_s`."""
        process = self._started
        if isinstance(process, OSError):
            self._complaints.close()
            return Outcome((), f"could not be started ({process})", "")
        answers: list[Any] = []
        with self._complaints:
            try:
                in_time = _listen(process, told, answers, limit_s)
            finally:
                _kill(process)
            self._complaints.seek(0)
            complaint = _last_line(self._complaints.read())
        if not in_time:
            return Outcome(tuple(answers), f"did not end in {limit_s:g} s", complaint, True)
        return Outcome(tuple(answers), _ending(process.returncode), complaint)

    def end(self) -> None:
        """End it without having heard it."""
        self._complaints.close()
        if not isinstance(self._started, OSError):
            _kill(self._started)
            for pipe in (self._started.stdin, self._started.stdout):
                assert pipe is not None
                pipe.close()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold a dead process for good
        process.wait(KILL_LIMIT_S)


def _listen(process: subprocess.Popen[bytes], told: str, answers: list[Any], limit_s: float) -> bool:
    """Collect what `process` answers until it has ended. False when it was silent for too long."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def tell() -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as ear:  # it may have ended by now
            ear.write(told.encode())

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace")
                if text.startswith(MARK):
                    heard.put(json.loads(text.removeprefix(MARK)))
        heard.put(_END)

    for pipe in (tell, read):  # neither holds up the clock
        threading.Thread(target=pipe, daemon=True).start()
    try:
        while (said := heard.get(timeout=limit_s)) is not _END:
            answers.append(said)
        process.wait(limit_s)
    except (queue.Empty, subprocess.TimeoutExpired):
        return False
    return True


def answer(value: object) -> None:
    """Called in a worker: hand `value` to the process that asked. It must be JSON."""
    print("\n" + MARK + json.dumps(value), flush=True)


def _last_line(stderr: bytes) -> str:
    return (stderr.decode(errors="replace").strip().splitlines() or ["it printed nothing"])[-1]


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}" if returncode else ""
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-returncode}"


def _examine_elsewhere(name: str) -> Refusal | None:
    outcome = ask(__name__, name, limit_s=_time_limit_s())
    fix = f"uninstall or update {name}"
    if outcome.answers:
        verdict = outcome.answers[-1]
        return None if verdict is None else Refusal(**verdict)
    if outcome.timed_out:
        return Refusal("AWQ-BACKEND-011", f"its self-test {outcome.ending}", fix)
    ending = outcome.ending or "ended"
    return Refusal("AWQ-BACKEND-012", f"its process {ending} during the self-test: {outcome.complaint}", fix)


def _time_limit_s() -> float:
    chosen = os.environ.get("AWQ_RT_EXAMINATION_TIMEOUT")
    try:
        return float(chosen) if chosen else TIME_LIMIT_S
    except ValueError:
        raise BackendError(f"AWQ_RT_EXAMINATION_TIMEOUT is {chosen!r}; a number of seconds is expected") from None


def fingerprint(name: str, version: str) -> str:
    """A word that changes with the plugin's files, torch, Python, awq_rt and the GPU driver."""
    parts = [
        name,
        version,
        sys.version,
        sys.prefix,
        _version("torch"),
        _version("awq-rt"),
        devices.driver_fingerprint(),
    ]
    for entry in importlib.metadata.entry_points(group="awq_rt.backends", name=name):
        spec = importlib.util.find_spec(entry.value.split(":")[0].split(".")[0])
        if spec is None:
            continue
        files = [Path(spec.origin)] if spec.origin else []
        for folder in spec.submodule_search_locations or ():
            files += sorted(Path(folder).rglob("*"))
        stats = [(path, path.stat()) for path in files if path.is_file() and "__pycache__" not in path.parts]
        parts += [f"{path}:{stat.st_mtime_ns}:{stat.st_size}" for path, stat in stats]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _examine_here(name: str) -> Refusal | None:
    """What the worker does: import, verify, probe, and compare a few linears with float64."""
    (entry,) = importlib.metadata.entry_points(group="awq_rt.backends", name=name)
    backend = entry.load()  # first: a plugin that cannot be imported need not wait for torch

    from .registry import contract_refusal, torch_refusal
    from .testing.conformance import self_test

    refusal = contract_refusal(backend, name)
    if refusal is not None:
        return refusal
    failure = self_test(backend)
    if failure is None:
        return None
    try:
        types = {device.type for device in backend.probe().devices}
    except Exception:  # what `failure` is about
        types = set()
    for unreachable in filter(None, map(torch_refusal, sorted(types))):
        return unreachable  # no fault of the plugin: it found a device, and this torch cannot use it
    return Refusal("AWQ-BACKEND-013", f"its self-test failed: {failure}", f"update or uninstall {name}")


def main() -> None:
    """The worker's side: answers null for a pass, or a refusal."""
    name = sys.argv[1]
    try:
        refusal = _examine_here(name)
    except Exception as error:  # whatever a plugin raises becomes its reason
        reason = f"loading it raised {type(error).__name__}: {error}"
        refusal = Refusal("AWQ-BACKEND-010", reason, f"update or uninstall {name}")
    answer(None if refusal is None else asdict(refusal))
