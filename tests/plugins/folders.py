"""Puts plugins on sys.path as an installer would leave them: modules, and metadata that names the entry point."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STRANGER = Path(__file__).parent / "stranger"


def install(source: Path, site: Path) -> None:
    """Put the project folder `source` into `site`: its modules, and the metadata that pyproject.toml states."""
    for module in source.glob("*.py"):
        (site / module.name).write_text(module.read_text())
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    write_metadata(site, project["name"], project["version"], project["entry-points"]["awq_rt.backends"])


def write_plugin(site: Path, name: str, source: str) -> Path:
    """A plugin of one module; returns the module's path."""
    module = site / f"plugin_{name}.py"
    module.write_text(source)
    write_metadata(site, f"plugin-{name}", "1.0", {name: f"plugin_{name}:backend"})
    return module


def write_metadata(site: Path, distribution: str, version: str, entry_points: dict[str, str]) -> None:
    """The parts of a .dist-info folder that importlib.metadata reads."""
    folder = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{name} = {value}" for name, value in entry_points.items()]
    (folder / "entry_points.txt").write_text("\n".join(["[awq_rt.backends]", *lines, ""]))
