"""How many small faults the tests notice: mutation testing of packings, dispatch and tolerance.

    OMP_NUM_THREADS=1 python tools/mutate.py [--only NAME] [--json benchmarks/mutation.json] [--again] [--show]

Each mutant is one change of one file's syntax tree: a comparison, an operator or a number becomes its neighbour, a
condition is turned round, a returned value becomes None, a statement goes. Messages of errors are left alone. A mutant
is killed when a test that covers the file fails. Tests are collected once; each mutant is a fork in which the code of
the file's functions is exchanged in place. As many run at once as there are processors.
"""

from __future__ import annotations

import argparse
import ast
import copy
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

Subject = TypeVar("Subject")

ROOT = Path(__file__).resolve().parents[1]
PATIENCE, LEAST_S = 10, 60.0
"""A mutant that makes its tests run so many times as long as they do without it, and this long, is killed by that."""


@dataclass(frozen=True, slots=True)
class Target:
    """Files, and the tests that cover them, those first that notice most."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


FORMATS = ("gemm", "gemv", "gemv_fast", "llm_awq", "marlin", "compressed_tensors", "nibbles", "padding", "layout",
           "__init__")  # fmt: skip

TARGETS = {
    "packings": Target(tuple(f"awq_rt/formats/{name}.py" for name in FORMATS),
                       ("tests/test_formats_limits.py", "tests/test_formats.py")),
    "dispatch": Target(("awq_rt/registry.py",), ("tests/test_registry_rules.py", "tests/test_selftest.py")),
    "tolerance": Target(("awq_rt/testing/tolerance.py",), ("tests/test_tolerance.py",)),
}  # fmt: skip

EQUIVALENT = {
    ("awq_rt/registry.py", "number: 0", "sorted(found, key="): "all that have no priority get the same in its place",
}
"""Mutants that compute the same, by file, change and a part of the line, and why: no test can tell them."""

COMPARISONS = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.MatMult: ast.Mult,
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Mutant:
    """One change: `tree` is the whole module with it."""

    path: str
    line: int
    change: str
    tree: ast.Module

    @property
    def told(self) -> str:
        return f"line {self.line}, {self.change}"

    @property
    def excuse(self) -> str:
        """Why it may survive; "" where a test should notice it."""
        code = (ROOT / self.path).read_text(encoding="utf-8").splitlines()[self.line - 1]
        reasons = (why for (path, change, part), why in EQUIVALENT.items()
                   if path == self.path and change == self.change and part in code)  # fmt: skip
        return next(reasons, "")


def mutants(path: str) -> Iterator[Mutant]:
    """Every mutant of a file, in the order of its lines."""
    whole = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
    count = len(list(_places(whole)))
    for number in range(count):
        # The number-th place of an equal tree: each mutant changes a tree of its own.
        edits = len(list(_edits(list(_places(whole))[number])))
        for edit in range(edits):
            tree = copy.deepcopy(whole)
            place = list(_places(tree))[number]
            change, apply = list(_edits(place))[edit]
            before = ast.unparse(place.node)
            apply()
            ast.fix_missing_locations(tree)
            yield Mutant(path, getattr(place.node, "lineno", 0), f"{change}: {before.splitlines()[0]}", tree)


@dataclass(frozen=True, slots=True)
class _Place:
    """A node, and how to put another in its place."""

    node: ast.AST
    replace: Callable[[ast.AST], None]


def _places(tree: ast.AST) -> Iterator[_Place]:
    """Nodes that may change: no annotations, docstrings, messages, imports or decorators."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(value, ast.JoinedStr):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue

            def replace(new: ast.AST, name: str = name, index: int = index, value: object = value) -> None:
                if isinstance(value, list):
                    value[index] = new
                else:
                    setattr(tree, name, new)

            yield _Place(child, replace)
            if not isinstance(child, ast.Raise):  # what it says is not tested word for word
                yield from _places(child)


def _edits(place: _Place) -> Iterator[tuple[str, Callable[[], None]]]:
    """What may become of a node: a word for it, and the deed."""
    node = place.node
    if isinstance(node, ast.Compare):
        for number, operator in enumerate(node.ops):
            if type(operator) in COMPARISONS:
                yield "comparison", lambda n=number, o=operator: node.ops.__setitem__(n, COMPARISONS[type(o)]())
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield "operator", lambda: setattr(node, "op", OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield "and/or", lambda: setattr(node, "op", other())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "sign", lambda: place.replace(node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth", lambda: setattr(node, "value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "number", lambda: setattr(node, "value", node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition", lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield "filter", lambda: setattr(node, "ifs", [])
    elif isinstance(node, ast.Return) and node.value is not None and not _is_falsy(node.value):
        yield "returned", lambda: setattr(node, "value", ast.Constant(None))
    elif isinstance(node, (ast.Expr, ast.Raise)):
        yield "removed", lambda: place.replace(ast.Pass())


def _is_falsy(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not node.value  # as None is: nobody would notice


class Session:
    """A pytest plugin that, in the place of running the collected tests, runs them once for each mutant."""

    def __init__(self, target: Target, jobs: int, show: bool, before: dict[str, Any]):
        self.target, self.jobs, self.show, self.before = target, jobs, show, before
        self.by_file: dict[str, dict[str, Any]] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        items, started = session.items, time.monotonic()
        # As many at once as there will be, so that the time is that of a busy machine.
        if any(failure for _, failure in forked(range(self.jobs), lambda _: _run(session, items), self.jobs, 1e6)):
            raise SystemExit(f"{', '.join(self.target.tests)}: these fail without a mutant")
        limit_s = max(LEAST_S, PATIENCE * (time.monotonic() - started))
        chosen = [mutant for path in self.target.files for mutant in mutants(path) if self._wanted(mutant)]
        survived: set[Mutant] = set()
        slow: set[Mutant] = set()
        for mutant, failure in forked(chosen, lambda it: (exchange(it), _run(session, items)), self.jobs, limit_s):
            if failure != "tests":
                (slow if failure else survived).add(mutant)
            if self.show:
                print(f"{failure or 'SURVIVED':9} {mutant.path}:{mutant.line} {mutant.change}", flush=True)
        for path in self.target.files:
            tried = [mutant for mutant in chosen if mutant.path == path]
            total = self.before[path]["mutants"] if path in self.before else len(tried)
            left = {mutant.told: mutant.excuse for mutant in tried if mutant in survived}
            by_time = sum(mutant in slow for mutant in tried)
            self.by_file[path] = {"mutants": total, "killed": total - len(left), "by_time": by_time, "survivors": left}
        return True

    def _wanted(self, mutant: Mutant) -> bool:
        return mutant.path not in self.before or mutant.told in self.before[mutant.path]["survivors"]


def _run(session: Any, items: Sequence[Any]) -> None:
    """Run `items` until one fails, and end this process with 1 then, else with 0."""
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            os._exit(1)
    os._exit(0)


def forked(
    subjects: Iterable[Subject], work: Callable[[Subject], object], jobs: int, limit_s: float
) -> Iterator[tuple[Subject, str]]:
    """Each subject, as soon as a child that does `work` for it has ended, and how that failed: "tests", "time" or "".

    `jobs` children at once, each with `limit_s`.
    """
    waiting = iter(subjects)
    running: dict[int, tuple[Subject, float]] = {}
    while True:
        for subject in itertools.islice(waiting, jobs - len(running)):
            running[_child(work, subject)] = subject, time.monotonic() + limit_s
        if not running:
            return
        time.sleep(0.01)
        for pid, (subject, until) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            late = not ended and time.monotonic() > until
            if late:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or late:
                del running[pid]
                yield subject, "time" if late else "tests" if status else ""


def _child(work: Callable[[Subject], object], subject: Subject) -> int:
    """The number of a process that does `work`, silently, and ends."""
    pid = os.fork()
    if pid == 0:
        os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp()  # numbered folders that others number too are a race
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        try:
            work(subject)
        finally:
            os._exit(1)  # a mutant that cannot even be put in place
    return pid


def exchange(mutant: Mutant) -> None:
    """Put the mutant's code into the functions of its module, whoever holds them, and its constants in their places."""
    name = mutant.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    module = sys.modules[name]
    changed = dict(vars(module))
    exec(compile(mutant.tree, str(ROOT / mutant.path), "exec"), changed)
    for key, new in changed.items():
        old = vars(module).get(key)
        if old is new or key.startswith("__"):
            continue
        if isinstance(old, type) and isinstance(new, type):
            for member, method in vars(new).items():
                _exchange_code(vars(old).get(member), method)
        elif not _exchange_code(old, new):
            for other in list(sys.modules.values()):
                for bound, value in list(vars(other).items()) if isinstance(other, ModuleType) else ():
                    if value is old and old is not None and not isinstance(old, (int, bool)):
                        setattr(other, bound, new)
            setattr(module, key, new)


def _exchange_code(old: object, new: object) -> bool:
    """Give the function `old` the code of `new`. False where they are no functions."""
    if clear := getattr(old, "cache_clear", None):
        clear()
    pair = [inspect.unwrap(function) if callable(function) else getattr(function, "fget", None)
            for function in (getattr(old, "__func__", old), getattr(new, "__func__", new))]  # fmt: skip
    if not all(isinstance(function, FunctionType) for function in pair):
        return False
    one, other = pair
    one.__code__, one.__defaults__, one.__kwdefaults__ = other.__code__, other.__defaults__, other.__kwdefaults__
    return True


def tested(name: str, jobs: int, show: bool, before: dict[str, Any]) -> dict[str, Any]:
    """The figures of one target; of files that have figures `before`, only the survivors are tried."""
    import pytest

    target, started = TARGETS[name], time.monotonic()
    session = Session(target, jobs, show, before)
    with tempfile.TemporaryDirectory() as scratch:
        tempfile.tempdir = scratch
        pytest.main(["-q", "-s", "-p", "no:cacheprovider", *target.tests], plugins=[session])
        tempfile.tempdir = None
    if len(session.by_file) < len(target.files):
        raise SystemExit(f"{name}: {', '.join(target.tests)} could not be run")
    total, dead = (sum(file[key] for file in session.by_file.values()) for key in ("mutants", "killed"))
    print(
        f"{name}: {dead} of {total} killed, {100 * dead / total:.1f} %, {time.monotonic() - started:.0f} s", flush=True
    )
    share = round(dead / total, 4)
    return {"mutants": total, "killed": dead, "share": share, "tests": target.tests, "files": session.by_file}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=TARGETS, action="append", help="this target; may be given again")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tried at once")
    parser.add_argument("--commit", help="what the tree is of, where there is no git to ask")
    parser.add_argument("--json", type=Path, help="where the figures go; targets that were not run stay")
    parser.add_argument("--again", action="store_true", help="only what survived before, when tests were added since")
    parser.add_argument("--show", action="store_true", help="print every mutant")
    chosen = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch

    from awq_rt import devices

    torch.set_num_threads(1)  # threads do not survive a fork
    found = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {"targets": {}}
    for name in chosen.only or TARGETS:
        before = found["targets"].get(name, {}).get("files", {}) if chosen.again else {}
        found["targets"][name] = tested(name, chosen.jobs, chosen.show, before)
        found |= {
            "device": f"{devices.cpu().devices[0].name}, {os.cpu_count()} cores",
            "command": "OMP_NUM_THREADS=1 python tools/mutate.py --json benchmarks/mutation.json",
            "date": time.strftime("%Y-%m-%d"),
            "commit": chosen.commit
            or subprocess.check_output(["git", "describe", "--always", "--dirty"], text=True).strip(),
        }
        if chosen.json:
            with tempfile.NamedTemporaryFile("w", dir=chosen.json.parent, delete=False) as file:
                json.dump(found, file, indent=1)
                file.write("\n")
            os.chmod(file.name, 0o644)
            os.replace(file.name, chosen.json)


if __name__ == "__main__":
    main()
