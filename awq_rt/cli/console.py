"""How the commands print: rich where somebody looks, plain and unwrapped where a program reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNWRAPPED_COLUMNS = 240
"""Wide enough for any row: what goes into a file or a pipe is for grep, not for a screen."""


def console(*, stderr: bool = False) -> Console:
    """A console on standard output or error. Square brackets are text, not markup: error codes and shapes have them."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False)
    if not made.is_terminal:
        made.width = UNWRAPPED_COLUMNS
    return made


def table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table; the columns named in `right` hold numbers."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def size(count: int) -> str:
    """A number of bytes for people: `113.9 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
