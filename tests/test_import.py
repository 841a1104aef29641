"""What `import awq_rt` costs, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 0.2
RUNS = 3  # the best of them: other programs only ever make an import slower

MEASURE = """
import json, sys, time
import {first}
started = time.perf_counter()
import {modules}
elapsed_s = time.perf_counter() - started
torch = sys.modules.get("torch")
print(json.dumps({{
    "elapsed_s": elapsed_s,
    "modules": sorted(sys.modules),
    "cuda_initialized": bool(torch and torch.cuda.is_initialized()),
}}))
"""


def _measured(modules: str, first: str = "sys") -> dict[str, object]:
    code = MEASURE.format(first=first, modules=modules)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def test_importing_awq_rt_is_quick_and_touches_nothing() -> None:
    found = _measured("awq_rt")
    assert found["elapsed_s"] < LIMIT_S
    for module in ("torch", "transformers", "numpy", "rich"):
        assert module not in found["modules"]


def test_importing_the_core_is_quick_beside_torch_and_touches_no_gpu() -> None:
    modules = "awq_rt.linear, awq_rt.checkpoint, awq_rt.registry, awq_rt.conversion"
    runs = [_measured(modules, first="torch") for _ in range(RUNS)]
    assert min(float(str(run["elapsed_s"])) for run in runs) < LIMIT_S
    for run in runs:
        assert "transformers" not in run["modules"]
        assert run["cuda_initialized"] is False


def test_the_command_and_the_doctor_start_without_torch() -> None:
    found = _measured("awq_rt.cli, awq_rt.doctor, awq_rt.doctor.engine")
    assert found["elapsed_s"] < 2 * LIMIT_S  # click is in it
    for module in ("torch", "transformers", "numpy", "rich"):
        assert module not in found["modules"]


def test_every_public_name_is_there_and_no_other() -> None:
    import awq_rt

    for name in awq_rt.__all__:
        assert getattr(awq_rt, name) is not None
    assert dir(awq_rt) == sorted(awq_rt.__all__)
    assert callable(awq_rt.convert)
    with pytest.raises(AttributeError, match="nonesuch"):
        awq_rt.nonesuch  # noqa: B018


def test_no_document_has_a_gap_where_a_figure_belongs() -> None:
    root = Path(__file__).resolve().parents[1]
    documents = [*root.glob("*.md"), *root.glob("benchmarks/*.md"), *root.glob("backends/*/*.md")]
    assert not [path.name for path in documents if re.search(r"@[A-Z]+@", path.read_text(encoding="utf-8"))]
