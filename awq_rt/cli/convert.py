"""`awq-rt convert`: the same weights in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import console
from .options import checkpoint_options


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--to", "layout", required=True, metavar="LAYOUT", help="What to write; an unknown one lists them all.")
@click.option("--force", is_flag=True, help="Replace DST if it is there.")
@checkpoint_options
def convert(source: str, destination: Path, layout: str, force: bool, **opening: Any) -> None:
    """Write a checkpoint in another layout.

    SRC is a folder, a file or a hub id, DST a folder that is made. The weights stay the same, code for code. What the
    layout cannot hold is said at the end; DST is complete or absent.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..conversion import convert as convert_checkpoint
    from ..formats import WRITABLE

    if layout not in WRITABLE:
        raise click.BadParameter(f"{layout!r} is not one of {', '.join(WRITABLE)}.", param_hint="'--to'")
    errors = console(stderr=True)
    bar = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *bar, TextColumn("{task.description}"), console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        task = progress.add_task("", total=None)

        def report_progress(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        report = convert_checkpoint(source, destination, layout, force=force, progress=report_progress, **opening)
    click.echo(f"{report.linears} linears written to {report.destination} as {layout}")
    for loss in report.losses:
        click.echo(f"lost: {loss}")
    if not report.losses:
        click.echo("lossless")
