"""The figures of benchmarks/faults.json: two hundred kills, a hundred times loaded and dropped.

`python tests/faults/run.py benchmarks/faults.json`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # builders, tiny

import kills
import torch
from test_faults import growth_of_cycles
from tiny import build, config_of

from awq_rt import devices

KILLS, CYCLES = 200, 100


def main(destination: str) -> None:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        killed = kills.figures(kills.trials(KILLS // len(kills.WORK), Path(scratch)))
        build(Path(scratch) / "model", config_of("llama"))
        growth = growth_of_cycles(Path(scratch) / "model", CYCLES)
    found = {
        "device": str(devices.cpu().devices[0]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "command": "python tests/faults/run.py benchmarks/faults.json",
        "kills": killed,
        "load_cycles": {"cycles": CYCLES, "growth_bytes": growth},
    }
    Path(destination).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
