"""Which test raises each error that a public function's docstring promises: tests/documented_errors.json.

    python tools/documented_errors.py [TESTS ...]

Runs the tests and notes, for every error that is made or expected in one, the functions of awq_rt that were being
called. An entry stays as long as its test exists; `tests/test_documented_errors.py` holds the file to the docstrings.
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
from types import CodeType, FrameType, TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "awq_rt"
DESTINATION = ROOT / "tests" / "documented_errors.json"
SENTENCE = re.compile(r"\bRaises?\s.*?(?:\.(?=\s)|\.$|$)", re.DOTALL)
NAME = re.compile(r"`?\b([A-Z][A-Za-z]+)\b`?")


@dataclass(frozen=True, slots=True)
class Promise:
    """A docstring says that `owner` (`awq_rt/weights.py:AwqWeight.check_values`) raises `error`."""

    owner: str
    error: str
    protocol: bool  # then whatever has the method's name may keep it

    @property
    def key(self) -> str:
        return f"{self.owner} raises {self.error}"


def promises() -> list[Promise]:
    """What the docstrings of public functions, classes and methods of awq_rt promise."""
    errors = error_classes()
    found = []
    for path in sorted(CORE.rglob("*.py")):
        module = path.relative_to(ROOT).as_posix()
        for name, node, protocol in _public(ast.parse(path.read_text(encoding="utf-8"))):
            for sentence in SENTENCE.findall(ast.get_docstring(node) or ""):
                named = dict.fromkeys(word for word in NAME.findall(sentence) if word in errors)
                found += [Promise(f"{module}:{name}", word, protocol) for word in named]
    return found


def error_classes() -> dict[str, set[str]]:
    """Every error that a docstring may name, with the names of its subclasses in awq_rt and of itself."""
    bases: dict[str, list[str]] = {}
    for path in sorted(CORE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
    known = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    grown = True
    while grown:
        new = {name for name, its in bases.items() if name not in known and known & set(its)}
        known |= new
        grown = bool(new)

    def below(name: str) -> set[str]:
        return {name}.union(*(below(child) for child, its in bases.items() if name in its and child in known))

    return {name: below(name) for name in known}


def _public(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, bool]]:
    """(qualified name, node, whether it belongs to a protocol) of what is public in a module."""
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        protocol = isinstance(node, ast.ClassDef) and any("Protocol" in ast.unparse(base) for base in node.bases)
        yield node.name, node, protocol
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                yield f"{node.name}.{inner.name}", inner, protocol


class Recorder:
    """A pytest plugin: for each promise that is kept, the first test in which it is."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}
        self._promises = promises()
        self._subclasses = error_classes()
        self._test = ""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test = nodeid.partition("[")[0]

    def pytest_configure(self) -> None:
        from awq_rt.errors import AwqRtError

        original = AwqRtError.__init__

        def noted(error: AwqRtError, *arguments: Any) -> None:
            original(error, *arguments)
            self._note(type(error).__name__, list(_callers(sys._getframe(1))))

        AwqRtError.__init__ = noted  # type: ignore[method-assign]
        from _pytest.raises import RaisesExc

        leave = RaisesExc.__exit__

        def left(
            block: Any, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> bool:
            if kind is not None:
                self._note(kind.__name__, list(_traced(trace)))
            return leave(block, kind, error, trace)

        RaisesExc.__exit__ = left  # type: ignore[method-assign]

    def _note(self, error: str, codes: list[CodeType]) -> None:
        places = [_place(code) for code in codes]
        for promise in self._promises:
            if promise.key in self.kept or error not in self._subclasses[promise.error]:
                continue
            method = promise.owner.rpartition(".")[2]
            if promise.protocol:
                kept = any(place.endswith((f".{method}", f":{method}")) for place in places)
            else:
                kept = any(place == promise.owner or place.startswith(f"{promise.owner}.") for place in places)
            if kept:
                self.kept[promise.key] = self._test


def _callers(frame: FrameType | None) -> Iterator[CodeType]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _traced(trace: TracebackType | None) -> Iterator[CodeType]:
    while trace is not None:
        yield trace.tb_frame.f_code
        trace = trace.tb_next


def _place(code: CodeType) -> str:
    try:
        module = Path(code.co_filename).resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return ""
    return f"{module}:{code.co_qualname}" if sys.version_info >= (3, 11) else f"{module}:{code.co_name}"


def main() -> None:
    import pytest

    os.chdir(ROOT)
    recorder = Recorder()
    pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[recorder])
    before = json.loads(DESTINATION.read_text(encoding="utf-8")) if DESTINATION.exists() else {}
    kept = {**before, **recorder.kept}
    wanted = {promise.key: kept[promise.key] for promise in promises() if promise.key in kept}
    with tempfile.NamedTemporaryFile("w", dir=DESTINATION.parent, delete=False, encoding="utf-8") as file:
        file.write(json.dumps(wanted, indent=1, sort_keys=True) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, DESTINATION)
    for promise in promises():
        if promise.key not in wanted:
            print(f"no test: {promise.key}")


if __name__ == "__main__":
    main()
