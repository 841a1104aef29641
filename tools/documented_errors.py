"""Which test raises each error that a public function documents.

    python tools/documented_errors.py [pytest's arguments]    run tests and write tests/documented_errors.json
    python tools/documented_errors.py --check                 run the tests named there, and only these

A promise is the name of an error in a sentence of a public docstring with the word "raise". It is kept by a test when
an error of that class leaves the function and arrives in a `pytest.raises` of the test, itself or as the cause of
another. `tests/test_documented_errors.py` holds the docstrings, the file and the tests together.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT / "tests" / "documented_errors.json"
SENTENCE = re.compile(r"[^.]*?\b[Rr]aises?\b.*?(?:\.(?=\s)|\.$|$)", re.DOTALL)
NAME = re.compile(r"\b[A-Z][A-Za-z]+\b")


@dataclass(frozen=True, slots=True)
class Promise:
    """The docstring of `owner`, which stands in `lines` of `module`, says that it raises `error`."""

    module: str
    owner: str
    error: str
    lines: range
    kind: str  # "function"; "class", of which any method may keep it; "protocol", whoever has the method's name

    def __str__(self) -> str:
        return f"{self.module}:{self.owner} raises {self.error}"

    def is_kept_in(self, module: str, name: str, line: int) -> bool:
        """Whether the function `name` that begins at `line` of `module` is the one that promised."""
        if self.kind == "protocol":
            return name == self.owner.rpartition(".")[2]
        inside = module == self.module and line in self.lines
        return inside and (self.kind == "class" or name == self.owner.rpartition(".")[2])


def promises(root: Path = ROOT) -> list[Promise]:
    """What the docstrings of public functions, classes and methods of awq_rt promise."""
    errors, found = error_classes(root), []
    for path in sorted((root / "awq_rt").rglob("*.py")):
        module = path.relative_to(root).as_posix()
        for owner, node, kind in _public(ast.parse(path.read_text(encoding="utf-8"))):
            first = min(part.lineno for part in (node, *node.decorator_list))
            lines = range(first, (node.end_lineno or first) + 1)
            sentences = SENTENCE.findall(ast.get_docstring(node) or "")
            named = dict.fromkeys(word for said in sentences for word in NAME.findall(said) if word in errors)
            found += [Promise(module, owner, error, lines, kind) for error in named]
    return found


def error_classes(root: Path = ROOT) -> set[str]:
    """The names of all errors that a docstring may name: Python's and those of awq_rt."""
    bases: dict[str, list[str]] = {}
    for path in sorted((root / "awq_rt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    known = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    while new := {name for name, its in bases.items() if name not in known and known & set(its)}:
        known |= new
    return known


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, str]]:
    """(qualified name, node, kind) of what is public in a module."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        protocol = isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
        yield node.name, node, "class" if isinstance(node, ast.ClassDef) else "function"
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner, "protocol" if protocol else "function"


class Recorder:
    """A pytest plugin: the tests that keep each promise, those that were skipped, and how long each took."""

    def __init__(self, root: Path = ROOT) -> None:
        self.kept: dict[str, set[str]] = {}
        self.skipped: set[str] = set()
        self.seconds: dict[str, float] = {}
        self._root = root
        self._promises = promises(root)
        self._test = ""

    def pytest_configure(self) -> None:
        plain = pytest.raises

        def raises(*arguments: Any, **keywords: Any) -> Any:
            return _Noting(plain(*arguments, **keywords), self.note)

        pytest.raises = raises  # type: ignore[assignment]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid.partition("[")[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.partition("[")[0]
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.skipped:
            self.skipped.add(test)

    def note(self, error: BaseException | None) -> None:
        """Which promises `error` keeps, and whatever it came from."""
        while error is not None:
            places = list(self._places(error.__traceback__))
            for promise in self._promises:
                names = {kind.__name__ for kind in type(error).__mro__}
                if promise.error in names and any(promise.is_kept_in(*place) for place in places):
                    self.kept.setdefault(str(promise), set()).add(self._test)
            error = error.__cause__ or error.__context__

    def _places(self, trace: TracebackType | None) -> Iterator[tuple[str, str, int]]:
        """(module, function, first line) of all that an error passed."""
        while trace is not None:
            code = trace.tb_frame.f_code
            path = Path(code.co_filename)
            if path.is_relative_to(self._root):
                yield path.relative_to(self._root).as_posix(), code.co_name, code.co_firstlineno
            trace = trace.tb_next


class _Noting:
    """A `pytest.raises` that shows what it caught to `note`."""

    def __init__(self, block: Any, note: Any):
        self._block, self._note = block, note

    def __enter__(self) -> Any:
        return self._block.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> bool:
        right: bool = self._block.__exit__(kind, error, trace)
        if right:
            self._note(error)
        return right


def record(arguments: list[str]) -> Recorder:
    """What is seen while pytest runs with `arguments`."""
    recorder = Recorder()
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments], plugins=[recorder])
    return recorder


def check() -> list[str]:
    """What is wrong with the index: promises that the test named for them does not keep."""
    index: dict[str, str] = json.loads(INDEX.read_text(encoding="utf-8"))
    recorder = record(sorted(set(index.values())))
    return [
        f"{promise}: not in {test}"
        for promise, test in index.items()
        if test not in recorder.kept.get(promise, set()) and test not in recorder.skipped
    ]


def write(recorder: Recorder) -> list[str]:
    """Add what was seen to the index, of several tests the quickest; the promises that no test keeps."""
    index: dict[str, str] = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else {}
    for promise, tests in recorder.kept.items():
        index[promise] = min(sorted(tests), key=lambda test: recorder.seconds.get(test, 0.0))
    wanted = [str(promise) for promise in promises()]
    kept = {promise: index[promise] for promise in sorted(wanted) if promise in index}
    with tempfile.NamedTemporaryFile("w", dir=INDEX.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps(kept, indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, INDEX)
    return [promise for promise in wanted if promise not in kept]


def main() -> None:
    os.chdir(ROOT)
    arguments = sys.argv[1:]
    wrong = check() if arguments == ["--check"] else write(record(arguments))
    for line in wrong:
        print(f"no test: {line}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
