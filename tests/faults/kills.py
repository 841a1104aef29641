"""Work that is killed (SIGKILL) at a random moment, and what must be true of what it leaves.

Each kind of work runs in a process forked for it, so that a trial costs what the work costs. `python kills.py 200`
makes that many trials and prints a line of JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # builders, dense

import torch
from builders import some_weights, write_layout
from dense import LENGTH, some_tokens, write_dense
from safetensors.torch import load_file

from awq_rt import cache
from awq_rt.checkpoint import open_checkpoint
from awq_rt.conversion import convert
from awq_rt.errors import CheckpointError
from awq_rt.quantization import quantize
from awq_rt.rtc import Builder, KernelStore, Program

CODE = bytes(range(256)) * (1 << 14)
"""Machine code of 4 MB, so that a kill often meets it half-written."""

PROGRAM = Program((("main.cu", "kernel"),), (), "sm_90")


@dataclass(frozen=True)
class Work:
    """`run(folder)` is killed; `check(folder)` raises unless what is left is nothing, whole, or plainly unfinished."""

    prepare: Callable[[Path], None]
    run: Callable[[Path], None]
    check: Callable[[Path], None]
    whole: Callable[[Path], bool]


@dataclass
class Tally:
    """Trials, those of them that were killed before the work was done, and what was wrong."""

    trials: int = 0
    killed: int = 0
    wrong: list[str] = field(default_factory=list)


# --- convert: a new folder, and one that is replaced ----------------------------------------------------------------


def _prepare_conversion(folder: Path) -> None:
    weights = some_weights({f"model.layers.{n}.q_proj": (256, 256, 64) for n in range(24)})
    write_layout(folder / "source", weights, "gemm")
    write_layout(folder / "replaced", weights, "gemv_fast")


def _convert(folder: Path) -> None:
    convert(folder / "source", folder / "new", "gemv", max_shard_bytes=1 << 16)
    convert(folder / "source", folder / "replaced", "gemv", max_shard_bytes=1 << 16, force=True)


def _check_conversion(folder: Path) -> None:
    expected = _content(folder / "source")
    for path in folder.iterdir():
        try:
            found = _content(path)
        except CheckpointError:
            # Swapping two folders is two renames: between them the old one waits under another name.
            if path.name == "replaced":
                raise
            continue
        assert found == expected, f"{path} opens, and holds other weights"
    if not (folder / "replaced").exists():
        kept = [old for old in folder.glob(".replaced.*/old") if _content(old) == expected]
        assert kept, "the destination is gone and no whole copy is left"


def _content(folder: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint[name].codes.numpy().tobytes() for name in checkpoint}


# --- quantise: finished blocks are kept, and taken up again ---------------------------------------------------------


def _quantize(folder: Path) -> None:
    tokens = some_tokens()
    quantize(folder / "dense", folder / "out", calibration=tokens, length=LENGTH, samples=len(tokens), group_size=32,
             device="cpu")  # fmt: skip


def _prepare_dense(folder: Path) -> None:
    if not _dense.exists():
        write_dense(_dense)
        _quantize_reference()
    (folder / "dense").symlink_to(_dense)


def _quantize_reference() -> None:
    (_dense.parent / "whole").mkdir()
    (_dense.parent / "whole" / "dense").symlink_to(_dense)
    worker = multiprocessing.get_context("fork").Process(target=_quantize, args=(_dense.parent / "whole",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def _check_quantized(folder: Path) -> None:
    if (folder / "out").exists():
        assert _same(folder / "out"), "what is there under the final name is not what an undisturbed run writes"


def _same(out: Path) -> bool:
    found, expected = load_file(out / "model.safetensors"), load_file(_dense.parent / "whole/out/model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


# --- compile, and cache ---------------------------------------------------------------------------------------------


class SlowCompiler:
    version = "1"

    def compile(self, program: Program) -> bytes:
        time.sleep(0.01)
        return CODE


def _compile(folder: Path) -> None:
    Builder(SlowCompiler(), KernelStore(folder / "kernels")).machine_code(PROGRAM)


def _check_compiled(folder: Path) -> None:
    found = KernelStore(folder / "kernels").read(PROGRAM.key(SlowCompiler.version))
    assert found in (None, CODE), "a kernel that is not whole would be executed"


VALUE = {"passed": ["x" * 1000] * 1000}


def _cache(folder: Path) -> None:
    cache.write_json(folder / "plugins" / "one.json", VALUE)


def _check_cached(folder: Path) -> None:
    assert cache.read_json(folder / "plugins" / "one.json") in (None, VALUE)


_dense = Path(tempfile.gettempdir())  # set by `trials`

WORK: dict[str, Work] = {
    "convert": Work(
        _prepare_conversion, _convert, _check_conversion,
        lambda folder: _content(folder / "new") == _content(folder / "source"),
    ),
    "quantize": Work(_prepare_dense, _quantize, _check_quantized, lambda folder: _same(folder / "out")),
    "compile": Work(
        lambda folder: None, _compile, _check_compiled,
        lambda folder: KernelStore(folder / "kernels").read(PROGRAM.key("1")) == CODE,
    ),
    "cache": Work(
        lambda folder: None, _cache, _check_cached,
        lambda folder: cache.read_json(folder / "plugins" / "one.json") == VALUE,
    ),
}  # fmt: skip


def trials(count: int, root: Path, works: Mapping[str, Work] = WORK, seed: int = 0) -> dict[str, Tally]:
    """`count` trials of each kind of work, killed at moments spread evenly over the shortest of three whole runs."""
    global _dense
    _dense = root / "models" / "dense"
    tallies = {}
    for name, work in works.items():
        tally = tallies[name] = Tally()
        moments = random.Random(seed)
        duration = min(_trial(work, root / "undisturbed", None, tally) for _ in range(3))
        for _ in range(count):
            tally.trials += 1
            try:
                _trial(work, root / "trial", moments.uniform(0, duration), tally)
            except (AssertionError, CheckpointError) as error:
                tally.wrong.append(f"{type(error).__name__}: {error}")
    return tallies


def _trial(work: Work, folder: Path, kill_after_s: float | None, tally: Tally) -> float:
    """One run, killed after so long; then it is checked, run again undisturbed, and checked again. Its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work.prepare(folder)
    started = time.perf_counter()
    worker = multiprocessing.get_context("fork").Process(target=_quietly, args=(work.run, folder))
    worker.start()
    worker.join(kill_after_s)
    if worker.is_alive():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    seconds = time.perf_counter() - started
    tally.killed += worker.exitcode == -signal.SIGKILL
    work.check(folder)
    if worker.exitcode == -signal.SIGKILL:
        if not (folder / "replaced").exists() and (kept := list(folder.glob(".replaced.*/old"))):
            kept[0].rename(folder / "replaced")
        shutil.rmtree(folder / "new", ignore_errors=True)
        again = multiprocessing.get_context("fork").Process(target=_quietly, args=(work.run, folder))
        if not _finished(work, folder):
            again.start()
            again.join()
        work.check(folder)
    assert _finished(work, folder), "running it again did not finish it"
    return seconds


def _finished(work: Work, folder: Path) -> bool:
    try:
        return work.whole(folder)
    except (OSError, CheckpointError):
        return False


def _quietly(run: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    run(folder)


def figures(tallies: dict[str, Tally]) -> dict[str, Any]:
    return {name: {"trials": t.trials, "killed": t.killed, "wrong": t.wrong} for name, t in tallies.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        found = trials(int(sys.argv[1]) // len(WORK), Path(scratch))
    print(json.dumps(figures(found)))
    sys.exit(any(tally.wrong for tally in found.values()))
