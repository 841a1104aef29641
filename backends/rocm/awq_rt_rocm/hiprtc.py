"""hipRTC as a run-time compiler: HIP text in, a code object for one architecture out. Needs no GPU.

hipRTC may abort the process that calls it, for an architecture that it does not know. So each compile runs in a process
of its own (worker/hiprtc_compile.py), and an abort becomes an error with a reason.
"""

from __future__ import annotations

import base64
import functools
import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from awq_rt.rtc import CompileFailed, Program

from . import libraries

WORKER = Path(__file__).parent / "worker" / "hiprtc_compile.py"
OPTIONS = ("-std=c++17", "-O3")
TIME_LIMIT_S = 300
"""hipRTC takes about a second; a first start from a cold disk takes some more."""


class CompilerDied(CompileFailed):
    """hipRTC took its process down, never came back, or could not be loaded."""

    code = "AWQ-ROCM-021"


class Hiprtc:
    """Implements `awq_rt.rtc.Compiler`."""

    @functools.cached_property
    def version(self) -> str:
        return f"hiprtc {_ask({}, 'asking for its version')['version']}"

    def compile(self, program: Program) -> bytes:
        options = [f"--offload-arch={program.arch}", *OPTIONS, *program.options]
        options += [f"-D{define}={value}" for define, value in program.defines]
        what = f"compiling {program} with {' '.join(options)}"
        answer = _ask({"sources": program.sources, "options": options}, what)
        if "refused" in answer:
            raise CompileFailed(f"hipRTC refused {what} ({answer['refused']}):\n{answer['log']}")
        return base64.b64decode(answer["code"])


def _ask(request: dict[str, Any], what: str) -> dict[str, Any]:
    """The worker's answer. Raises `CompilerDied`."""
    with tempfile.TemporaryDirectory(prefix="awq_rt-hiprtc-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, str(WORKER), str(asked), str(answered)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=libraries.environment(),
                timeout=TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise CompilerDied(f"hipRTC did not come back in {TIME_LIMIT_S} s while {what}; update ROCm") from error
        if not answered.exists():
            said = done.stdout.decode(errors="replace").strip().splitlines() or ["it printed nothing"]
            raise CompilerDied(f"hipRTC {_ending(done.returncode)} while {what}: {said[-1]}; install or update ROCm")
        found: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return found


def _ending(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    return f"was ended by {signal.Signals(-returncode).name}"
