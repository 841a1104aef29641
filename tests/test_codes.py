"""Every code that awq_rt and its backends can show is explained once, and the page is made of the explanations."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from awq_rt import codes, doctor

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "awq_rt").rglob("*.py")), *sorted((ROOT / "backends").glob("*/awq_rt_*/**/*.py"))]
CODE = re.compile(r"AWQ(?:-[A-Z]+)?-\d{3}")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        if path != Path(codes.__file__):
            yield path, ast.parse(path.read_text(encoding="utf-8"), str(path))


def shown() -> dict[str, Path]:
    """Every code in a string of the sources, with a file that has it."""
    found = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(dict.fromkeys(CODE.findall(node.value), path))
    return found


def error_classes() -> list[tuple[str, str]]:
    """(code, class) of every class that states a code."""
    found = []
    for _, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for statement in node.body:
                target = (
                    statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
                )
                value = getattr(statement, "value", None)
                if isinstance(target, ast.Name) and target.id == "code" and isinstance(value, ast.Constant):
                    found.append((str(value.value), node.name))
    return found


def test_every_code_in_the_sources_is_explained() -> None:
    found = shown()
    assert len(found) > 60  # the scan works
    assert {code: str(path.relative_to(ROOT)) for code, path in found.items() if code not in codes.CODES} == {}


def test_every_explained_code_is_shown_by_something() -> None:
    of_checks = {code for check in doctor.CHECKS for code in check.codes}
    assert set(codes.CODES) - set(shown()) - of_checks == set()


def test_no_code_is_explained_twice() -> None:
    listed = Counter(code.code for family in codes.families().values() for code in family)
    assert [code for code, count in listed.items() if count > 1] == []


def test_no_two_errors_have_one_code() -> None:
    found = error_classes()
    assert len(found) > 30  # the scan works
    counted = Counter(code for code, _ in found)
    assert [(code, name) for code, name in found if counted[code] > 1] == []


@pytest.mark.parametrize("code", codes.CODES.values(), ids=lambda code: code.code)
def test_an_explanation_is_whole(code: codes.Code) -> None:
    assert CODE.fullmatch(code.code)
    assert not code.title.endswith(".")
    assert code.cause.endswith(".")
    assert code.remedy.endswith(".")
    assert code.command.strip() == code.command != ""
    assert codes.known(code.code) is code
    assert f"\n### {code.code}\n" in (ROOT / codes.PAGE).read_text(encoding="utf-8")
    assert code.page == f"{codes.PAGE}#{code.code.lower()}"


def test_codes_of_others_are_not_known() -> None:
    assert codes.known("STRANGER-001") is None


def test_the_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("troubleshooting", ROOT / "tools" / "troubleshooting.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / codes.PAGE).read_text(encoding="utf-8") == tool.page(), "run `python tools/troubleshooting.py`"
