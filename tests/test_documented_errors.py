"""Every error that a public docstring promises is raised by a test, through the function that promises it.

`documented_errors.json` names a test for each promise. They are run again here, and watched: a promise that its test no
longer keeps, a docstring with a new one, and an entry without a docstring are failures.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "documented_errors.py"
INDEX: dict[str, str] = json.loads((ROOT / "tests" / "documented_errors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("documented_errors", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["documented_errors"] = module
    spec.loader.exec_module(module)
    return module


def test_every_promise_has_a_test_and_every_entry_a_promise(tool: ModuleType) -> None:
    promised = {str(promise) for promise in tool.promises()}
    assert len(promised) > 90  # the scan works
    assert promised - set(INDEX) == set(), f"write the tests, then run python {TOOL.relative_to(ROOT)} with their files"
    assert set(INDEX) - promised == set()


def test_the_tests_that_are_named_keep_the_promises() -> None:
    run = subprocess.run(
        [sys.executable, str(TOOL), "--check"], capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


# --- the tool, on a tree of its own ----------------------------------------------------------------------------------

SOURCE = '''
class Late(Exception):
    pass

class TooLate(Late):
    pass

def read(when):
    """What there is. Raises `Late` where it is, or ValueError."""
    if when == "late":
        raise Late
    if when == "too late":
        raise TooLate
    if when == "caught":
        try:
            raise ValueError
        except ValueError:
            return
    return when

def careful(when):
    """As `read`. Raises KeyError."""
    try:
        return read(when)
    except Late as error:
        raise KeyError from error

def _private():
    """Raises OSError."""
'''


@pytest.fixture
def small(tool: ModuleType, tmp_path: Path) -> Any:
    """A tree with two public functions: its module's names, and a recorder that has watched nothing yet."""
    (tmp_path / "awq_rt").mkdir()
    path = tmp_path / "awq_rt" / "made_up.py"
    path.write_text(SOURCE)
    names: dict[str, Any] = {}
    exec(compile(SOURCE, str(path), "exec"), names)
    return names, tool.Recorder(tmp_path)


def watched(small: Any, work: Any) -> set[str]:
    """The promises that a test with `work` in its `pytest.raises` keeps."""
    _, recorder = small
    recorder.pytest_runtest_logstart("tests/test_x.py::test_it[1]")
    noting = sys.modules["documented_errors"]._Noting(pytest.raises(Exception), recorder.note)
    with noting:
        work()
    assert all(tests == {"tests/test_x.py::test_it"} for tests in recorder.kept.values())
    return {promise.removeprefix("awq_rt/made_up.py:") for promise in recorder.kept}


def test_promises_are_read_from_public_docstrings(tool: ModuleType, small: Any, tmp_path: Path) -> None:
    said = {str(promise).partition(":")[2] for promise in tool.promises(tmp_path)}
    assert said == {"read raises Late", "read raises ValueError", "careful raises KeyError"}


def test_an_error_that_leaves_the_function_keeps_its_promise(small: Any) -> None:
    assert watched(small, lambda: small[0]["read"]("late")) == {"read raises Late"}


def test_an_error_of_a_subclass_does_too(small: Any) -> None:
    assert watched(small, lambda: small[0]["read"]("too late")) == {"read raises Late"}


def test_an_error_that_was_the_cause_of_another_does_too(small: Any) -> None:
    assert watched(small, lambda: small[0]["careful"]("late")) == {"read raises Late", "careful raises KeyError"}


def test_an_error_that_stays_inside_or_comes_from_elsewhere_keeps_nothing(small: Any) -> None:
    def elsewhere() -> None:
        small[0]["read"]("caught")
        raise ValueError

    assert watched(small, elsewhere) == set()
