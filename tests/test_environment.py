"""environment.yml and pyproject.toml say the same."""

from __future__ import annotations

import asyncio
import json
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


def channel(folder: Path, offered: dict[str, list[str]]) -> str:
    """A conda channel, made up, that offers these versions; its address."""
    packages = {
        f"{name}-{version}-0.conda": {
            "name": name, "version": version, "build": "0", "build_number": 0, "depends": [], "subdir": "noarch",
            "noarch": "generic", "md5": "0" * 32, "sha256": "0" * 64, "size": 1,
        }
        for name, versions in offered.items()
        for version in versions
    }  # fmt: skip
    for subdir, held in (("noarch", packages), ("linux-64", {})):
        (folder / subdir).mkdir(parents=True)
        index = {"info": {"subdir": subdir}, "packages": {}, "packages.conda": held, "repodata_version": 1}
        (folder / subdir / "repodata.json").write_text(json.dumps(index))
    return folder.as_uri()


def solved(address: str, dependencies: list[Any]) -> dict[str, str]:
    """What conda's solver chooses there, by name."""
    rattler = pytest.importorskip("rattler")
    wanted = [rattler.MatchSpec(line) for line in dependencies if isinstance(line, str)]
    found = asyncio.run(rattler.solve([rattler.Channel(address)], wanted, platforms=["linux-64", "noarch"]))
    return {record.name.normalized: str(record.version) for record in found}


def test_condas_solver_chooses_from_the_ranges(
    dependencies: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conda-forge itself is not asked: what it offers changes by the day."""
    monkeypatch.setenv("RATTLER_CACHE_DIR", str(tmp_path / "cache"))
    ranges = dict(requirement(line) for line in dependencies if isinstance(line, str))
    least = {name: found[1] if (found := re.search(r">=([\d.]+)", text)) else "1.0" for name, text in ranges.items()}
    limits = {name: [found[1]] if (found := re.search(r"<([\d.]+)", text)) else [] for name, text in ranges.items()}
    offered = {name: [*limits[name], "0.0.1", version] for name, version in least.items()}
    assert solved(channel(tmp_path / "all", offered), dependencies) == least
    with pytest.raises(pytest.importorskip("rattler.exceptions").SolverError, match="pytorch"):
        solved(channel(tmp_path / "old", {**offered, "pytorch": ["0.0.1"]}), dependencies)
