"""A finding with the command of its code."""

from __future__ import annotations

from collections.abc import Iterator

from ...codes import CODES
from ..facts import Facts
from ..report import Finding, Verdict


def finding(code: str, verdict: Verdict, reason: str, command: str = "") -> Finding:
    """`command` where there is a better one than that of the code."""
    return Finding(code, verdict, reason, command or CODES[code].command)


def nothing(_: Facts) -> Iterator[Finding]:
    """For a check that only tells."""
    yield from ()
