"""environment.yml and pyproject.toml say the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CONDA_NAMES = {"torch": "pytorch"}
TOOLS = {"python", "pip", "cxx-compiler"}

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


def requirement(line: str) -> tuple[str, str]:
    """(name, versions) of "name>=1,<2"."""
    found = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*((?:[<>=!~].*)?)", line)
    assert found, line
    return found[1], found[2].replace(" ", "")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    described: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return described


@pytest.fixture(scope="module")
def dependencies() -> list[Any]:
    found: list[Any] = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return found


def test_names_and_versions_agree(project: dict[str, Any], dependencies: list[Any]) -> None:
    wanted = dict(requirement(line) for line in project["dependencies"] if not line.startswith("awq-rt"))
    named = {CONDA_NAMES.get(name, name): versions for name, versions in wanted.items()}
    stated = dict(requirement(line) for line in dependencies if isinstance(line, str))
    assert {name: versions for name, versions in stated.items() if name not in TOOLS} == named


def test_python_is_the_range_that_is_supported(project: dict[str, Any], dependencies: list[Any]) -> None:
    stated = dict(requirement(line) for line in dependencies if isinstance(line, str))["python"]
    newest = max(int(found[1]) for line in project["classifiers"] if (found := re.search(r":: 3\.(\d+)$", line)))
    assert stated == f"{project['requires-python']},<3.{newest + 1}"


def test_what_pip_installs_is_here(dependencies: list[Any]) -> None:
    (by_pip,) = [line["pip"] for line in dependencies if isinstance(line, dict)]
    folders = [ROOT / line.removeprefix("-e ") for line in by_pip]
    assert all((folder / "pyproject.toml").is_file() for folder in folders)
    assert ROOT in {folder.resolve() for folder in folders}
