"""The trials of test_fuzz.py for as long as you like, steered by coverage (atheris): `python run.py --seconds 3600`.

What was found and the inputs that lead to new code are kept in --corpus; figures go to --json when time is up. Memory
is limited to what the process has at the start and a gigabyte, so that no allocation of any library goes unnoticed.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import atheris
import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # builders

with atheris.instrument_imports(include=["awq_rt"]):
    import hostile
    import torch
    import trial

    from awq_rt import devices

HEADROOM = 1 << 30


@click.command(help=__doc__)
@click.option("--seconds", default=3600, show_default=True)
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("fuzz-corpus"), show_default=True)
@click.option("--json", "figures", type=click.Path(path_type=Path))
def main(seconds: int, corpus: Path, figures: Path | None) -> None:
    torch.set_num_threads(1)
    corpus.mkdir(parents=True, exist_ok=True)
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
            _report(figures, seconds, outcomes, refused)
            os._exit(1 if refused else 0)

    atheris.Setup([sys.argv[0], str(corpus), "-max_len=96", "-timeout=600", f"-artifact_prefix={corpus}/"], one)
    atheris.Fuzz()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _report(path: Path | None, seconds: int, outcomes: Counter[str], defects: Counter[str]) -> None:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    figures = {
        "device": str(devices.cpu().devices[0]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "command": f"python tests/fuzz/run.py --seconds {seconds}",
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
