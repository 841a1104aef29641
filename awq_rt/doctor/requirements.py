"""Which distributions awq_rt requires, whether an installed version satisfies it, and whether there is only one.

A small part of PEP 440: `>=`, `<=`, `<`, `>`, `==`, `!=` and `~=` on release numbers, which is all that our metadata
uses. `packaging` would know the rest, but it is not in the standard library and may itself be what is broken.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping

from .report import Package


def required_packages(imported: Mapping[str, str]) -> Iterator[Package]:
    """What awq_rt's own metadata requires, beside the version that was `imported`, else the one installed.

    Empty in a source tree that nobody installed.
    """
    try:
        lines = importlib.metadata.requires("awq-rt") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        match = re.match(r"([\w.-]+)\s*([^;]*)", line)
        if match and "extra ==" not in line:
            name, supported = match.group(1), match.group(2).strip()
            installed = imported.get(name) or installed_version(name)
            status = "missing" if not installed else "ok" if allows(supported, installed) else "unsupported"
            yield Package(name, supported, installed, status)


def installed_version(distribution: str) -> str:
    """The version of a distribution, or "" when it is not installed or its metadata is damaged."""
    try:
        return importlib.metadata.version(distribution) or ""
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return ""


def installed_twice(distributions: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of these, those that are installed in several versions: `VERSION in FOLDER` of each, the one in use first."""
    found = {}
    for name in distributions:
        copies: dict[str, str] = {}
        for distribution in importlib.metadata.distributions(name=name):
            with contextlib.suppress(KeyError):  # damaged metadata
                version = distribution.version
                copies.setdefault(version, f"{version} in {distribution.locate_file('')}")
        if len(copies) > 1:
            found[name] = tuple(copies.values())
    return found


def allows(specifier: str, version: str) -> bool:
    """Whether `version` lies inside a specifier such as `>=5.16,<6`."""
    return all(_holds(clause.strip(), _release(version)) for clause in specifier.split(",") if clause.strip())


def _holds(clause: str, release: tuple[int, ...]) -> bool:
    match = re.match(r"(>=|<=|==(?!=)|!=|~=|<|>)\s*(.+)", clause)
    if match is None:
        return True  # not ours to judge
    operator, bound = match.group(1), _release(match.group(2))
    width = max(len(release), len(bound))
    left, right = (parts + (0,) * (width - len(parts)) for parts in (release, bound))
    if match.group(2).endswith(".*"):
        return (left[: len(bound)] == bound) == (operator == "==")
    if operator == "~=":
        return left >= right and left[: len(bound) - 1] == bound[:-1]
    holds = {
        ">=": left >= right,
        "<=": left <= right,
        "<": left < right,
        ">": left > right,
        "==": left == right,
        "!=": left != right,
    }
    return holds[operator]


def _release(version: str) -> tuple[int, ...]:
    """The numbers of `2.13.0+cpu` or `2.12.0.dev1`: (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
