"""The notebook, from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "first_steps.ipynb"


def said(cell: dict[str, object]) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore")  # of the libraries that drive a kernel
def test_the_notebook_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests may run beside it
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [said(cell) for cell in cells]
    assert "layers fused" in outputs[2]
    errors = [float(line.rsplit(" ", 1)[1]) for line in outputs[7].splitlines() if "root mean square" in line]
    assert len(errors) == 2
    assert all(0 < error < 0.1 for error in errors)
    assert "tokens/s" in outputs[8]


def test_it_is_kept_without_outputs() -> None:
    """What a run prints depends on the machine, and would change with every run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
