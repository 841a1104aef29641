"""The trials of test_fuzz.py for as long as you like, steered by coverage (atheris): `python run.py --seconds 3600`.

What was found and the inputs that lead to new code are kept in --corpus; figures go to --json when time is up. Memory
is limited to what the process has at the start and a gigabyte, so that no allocation of any library goes unnoticed.
Several --processes each begin with a copy of the corpus, go their own ways, and leave theirs in folders of their own.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import atheris
import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # builders

from awq_rt import devices

HEADROOM = 1 << 30


@click.command(help=__doc__)
@click.option("--seconds", default=3600, show_default=True)
@click.option("--processes", default=1, show_default=True)
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("fuzz-corpus"), show_default=True)
@click.option("--json", "figures", type=click.Path(path_type=Path))
@click.option("--commit", help="What the tree is of, where there is no git to ask.")
def main(seconds: int, processes: int, corpus: Path, figures: Path | None, commit: str | None) -> None:
    corpus.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        fuzz(seconds, corpus, lambda outcomes, defects: _report(figures, seconds, 1, commit, outcomes, defects))
    outcomes, defects = _together(seconds, processes, corpus)
    _report(figures, seconds, processes, commit, outcomes, defects)
    sys.exit(1 if defects else 0)


def _together(seconds: int, processes: int, corpus: Path) -> tuple[Counter[str], Counter[str]]:
    """The outcomes and defects of all processes."""
    outcomes: Counter[str] = Counter()
    defects: Counter[str] = Counter()
    started = []
    for number in range(processes):
        own = corpus.with_name(f"{corpus.name}-{number}")
        shutil.copytree(corpus, own, dirs_exist_ok=True)
        found = own.with_suffix(".json")
        options = {"--seconds": seconds, "--corpus": own, "--json": found, "--commit": "of all"}
        command = [sys.executable, __file__, *(str(word) for option in options.items() for word in option)]
        with own.with_suffix(".log").open("w") as log:
            started.append((subprocess.Popen(command, stdout=log, stderr=log), found))
    for process, found in started:
        if process.wait() not in (0, 1):
            raise click.ClickException(f"a process ended with {process.returncode}; see {found.with_suffix('.log')}")
        one = json.loads(found.read_text())
        outcomes.update(one["outcomes"])
        defects.update(one["defects"])
    return outcomes, defects


def fuzz(seconds: int, corpus: Path, report: Callable[[Counter[str], Counter[str]], None]) -> NoReturn:
    """Try inputs until time is up; `report` hears the outcomes and the defects."""
    with atheris.instrument_imports(include=["awq_rt"]):
        import hostile
        import torch
        import trial
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)) / "trial"
    outcomes: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    hostile.seeds()
    _limit_memory()
    start = time.monotonic()

    def one(data: bytes) -> None:
        try:
            outcomes[trial.attempt(data, scratch)] += 1
        except BaseException as error:  # kept, counted, and the run goes on
            kind = "allocation" if isinstance(error, (MemoryError, trial.ExcessiveAllocation)) else "crash"
            if not refused[f"{type(error).__name__}: {error}"[:120]]:
                (corpus / f"{kind}-{time.time_ns()}").write_bytes(data)
            refused[f"{type(error).__name__}: {error}"[:120]] += 1
            outcomes[kind] += 1
        if time.monotonic() - start > seconds:
            report(outcomes, refused)
            os._exit(1 if refused else 0)

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=96", "-timeout=600", f"-artifact_prefix={corpus}/"], one)
    atheris.Fuzz()
    raise AssertionError("atheris does not return")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _report(
    path: Path | None,
    seconds: int,
    processes: int,
    commit: str | None,
    outcomes: Counter[str],
    defects: Counter[str],
) -> None:
    if commit is None:
        asked = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    several = f" --processes {processes}" if processes > 1 else ""
    figures = {
        "device": f"{devices.cpu().devices[0].name}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "command": f"python tests/fuzz/run.py --seconds {seconds}{several}",
        "inputs": outcomes.total(),
        "crashes": outcomes["crash"],
        "allocations_beyond_the_files": outcomes["allocation"],
        "outcomes": dict(outcomes.most_common()),
        "defects": dict(defects.most_common()),
    }
    text = json.dumps(figures, indent=2) + "\n"
    click.echo(text)
    if path is not None:
        path.write_text(text)


if __name__ == "__main__":
    main()
