"""Every error that a public function's docstring promises is raised by a test.

`documented_errors.json` names the test for each promise; `tools/documented_errors.py` finds it by running the tests.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
KEPT: dict[str, str] = json.loads((ROOT / "tests" / "documented_errors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documented_errors", ROOT / "tools" / "documented_errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["documented_errors"] = module
    spec.loader.exec_module(module)
    return module


def test_every_promise_has_its_test_and_no_entry_is_left_over(tool: ModuleType) -> None:
    promised = {promise.key for promise in tool.promises()}
    assert len(promised) > 60  # the scan works
    assert promised - set(KEPT) == set(), "write the tests, then run tools/documented_errors.py with their files"
    assert set(KEPT) - promised == set()


def test_the_tests_that_are_named_exist() -> None:
    for test in set(KEPT.values()):
        path, *names = test.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert set(names) <= defined, test


def test_promises_are_read_from_docstrings(tool: ModuleType) -> None:
    promised = {promise.key for promise in tool.promises()}
    assert "awq_rt/registry.py:select raises NoBackend" in promised
    assert "awq_rt/checkpoint/reader.py:Checkpoint.read raises KeyError" in promised
    assert "awq_rt/models/loading.py:load raises NotImplementedError" in promised
    assert tool.error_classes()["CheckpointError"] >= {"CheckpointError", "NonFiniteScales", "MissingShard"}


def test_what_is_raised_inside_a_promising_function_keeps_its_promise(tool: ModuleType) -> None:
    """The recorder itself, on a promise that is kept and one that is not."""
    from awq_rt import registry
    from awq_rt.errors import UnknownBackend

    recorder = tool.Recorder()
    recorder.pytest_runtest_logstart("tests/test_x.py::test_it[1]")
    try:
        registry.get("nonesuch")
    except UnknownBackend as error:
        recorder._note(type(error).__name__, list(tool._traced(error.__traceback__)))
    assert recorder.kept == {"awq_rt/registry.py:get raises UnknownBackend": "tests/test_x.py::test_it"}
