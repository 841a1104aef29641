"""`awq-rt quantize`: a dense model in 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .console import console


@click.command()
@click.argument("source", metavar="MODEL")
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--calibration", help="A text or .jsonl file, or a data set's name.  [default: the text in the package]")
@click.option("--method", default="awq", show_default=True, help="awq searches; rtn rounds to nearest, without text.")
@click.option("--group-size", type=int, default=128, show_default=True, help="Inputs that share a scale; -1: all.")
@click.option("--symmetric", is_flag=True, help="All zero points 8.")
@click.option("--layout", default="gemm", show_default=True, help="What to write; an unknown one lists them all.")
@click.option("--dtype", default="float16", show_default=True, help="Of what is not packed: float16 or bfloat16.")
@click.option("--samples", type=int, default=128, show_default=True, help="Samples of text, at most.")
@click.option("--length", type=int, default=512, show_default=True, help="Tokens in a sample.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the order of the text.")
@click.option("--grid", default="both", show_default=True, help="Scales to search: autoawq, original or both.")
@click.option("--no-clip", is_flag=True, help="Keep every group's whole range.")
@click.option("--rounding", default="feedback", show_default=True, help="feedback or nearest.")
@click.option("--damping", type=float, help="Of the feedback; more trusts the text less.")
@click.option("--tuning", type=int, default=0, show_default=True, help="Steps of tuning the whole model in the end.")
@click.option("--skip", multiple=True, metavar="PART", help="Leave linears alone whose name holds this; repeatable.")
@click.option("--strict", is_flag=True, help="Refuse a model of which a linear cannot be packed.")
@click.option("--device", help="cpu, cuda:0, ...  [default: a GPU where there is one]")
@click.option("--force", is_flag=True, help="Replace OUT if it is a checkpoint.")
@click.option("--restart", is_flag=True, help="Forget what an interrupted run had finished.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.option("--token", envvar="HF_TOKEN", help="A hub token; HF_TOKEN is read too.")
@click.option("--revision", help="A branch, tag or commit of a hub repository.")
def quantize(
    source: str, destination: Path, symmetric: bool, no_clip: bool, damping: float | None, **options: Any
) -> None:
    """Quantise a dense model to 4 bits with the AWQ search.

    MODEL is a folder or a hub id, OUT a folder that is made. One decoder block is in memory at a time. A run that was
    interrupted goes on where it stopped when the same command is given again. quantization_report.json in OUT says
    what was done.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..quantization import quantize as quantize_model

    if damping is not None:
        options["damping"] = damping
    errors = console(stderr=True)
    columns = (TextColumn("quantising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as progress:
        task = progress.add_task("", total=None)

        def report_progress(what: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=what)

        report = quantize_model(
            source,
            destination,
            zero_point=not symmetric,
            clip=not no_clip,
            progress=report_progress,
            **options,
        )
    searched = f", {report.tokens} tokens of {report.calibration}" if report.calibration else ""
    click.echo(
        f"{report.linears} linears written to {report.destination} as {report.settings['layout']} "
        f"in {report.seconds:.0f} s on {report.device}{searched}"
    )
    if report.resumed_blocks:
        click.echo(f"{report.resumed_blocks} of {len(report.blocks)} blocks were finished by an earlier run")
    for note in report.notes:
        click.echo(f"note: {note}")
