"""`awq-rt bench`: the tables of AWQ's documentation and of AutoAWQ's README, for a checkpoint or a made-up one."""

from __future__ import annotations

import itertools
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import console, table
from .options import loading_options

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from ..bench.report import LoadTime, Result, Table
    from ..bench.session import Plan
    from ..checkpoint import Checkpoint


class Numbers(click.ParamType[tuple[int, ...]]):
    """Positive numbers with commas between them."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of positive numbers such as 1,4,16.", param, ctx)
        return tuple(int(part) for part in parts)


class Pair(click.ParamType[tuple[int, int]]):
    """Two positive numbers with an x between them."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not BATCHxPREFILL, such as 4x512.", param, ctx)
        return int(parts[0]), int(parts[1])


@click.command()
@click.argument("model", required=False)
@click.option("--synthetic", metavar="SHAPE", multiple=True, help="Random weights in a shape such as llama-2-7b.")
@click.option("--batch", type=Numbers(), default="1", show_default=True, help="Prompts at a time.")
@click.option("--prefill", type=Numbers(), default="32,128,512,2048", show_default=True, help="Tokens of a prompt.")
@click.option("--decode", type=Numbers(), default="128", show_default=True, help="Steps after the first new token.")
@click.option(
    "--case", "pairs", type=Pair(), multiple=True, metavar="BxP", help="A batch and a prefill instead of every one."
)
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Medians are of so many.")
@click.option("--no-fuse", is_flag=True, help="Decode as transformers does.")
@click.option("--compare", is_flag=True, help="Both fused and unfused.")
@click.option("--fp16", is_flag=True, help="The model of the same shape in float16, run by transformers, too.")
@click.option("--load", "with_load", is_flag=True, help="Time loading, beside reading the files to the device.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="FILE", help="Write the figures.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), metavar="FILE", help="Draw them (matplotlib).")
@loading_options
def bench(
    model: str | None,
    synthetic: tuple[str, ...],
    batch: tuple[int, ...],
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    pairs: tuple[tuple[int, int], ...],
    repeats: int,
    no_fuse: bool,
    compare: bool,
    fp16: bool,
    with_load: bool,
    json_path: Path | None,
    png_path: Path | None,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    kernel: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    **opening: Any,
) -> None:
    """Measure how fast a model answers.

    MODEL is a folder, a file or a hub id; --synthetic makes one up, or several, one after another. Every combination of
    --batch, --prefill and --decode (or of --case and --decode) is a row: tokens/s as a user of `generate` sees them,
    medians after a warm-up, peak memory, and the share of what the device's read bandwidth, measured in the same run,
    allows.
    """
    if (model is None) == (not synthetic):
        raise click.UsageError("give a MODEL, or --synthetic with a shape.")
    if no_fuse and compare:
        raise click.UsageError("--compare measures unfused too; leave out --no-fuse.")
    if png_path is not None:
        import matplotlib  # noqa: F401  (missing, it is to be said before anything is measured)
    for path in (json_path, png_path):
        if path is not None and not path.parent.is_dir():
            raise click.UsageError(f"{path} cannot be written: there is no folder {path.parent}.")

    from .. import open_checkpoint, registry
    from ..bench.bandwidth import matmul_flops, read_bandwidth
    from ..bench.measure import Case
    from ..bench.report import Result
    from ..bench.session import Plan
    from ..bench.synthetic import SyntheticCheckpoint
    from .streaming import quiet

    quiet()
    place = registry.default_device() if device is None else registry.checked_device(device)
    checkpoints: dict[str, Checkpoint] = {name: SyntheticCheckpoint(name, place) for name in synthetic}
    if model is not None:
        checkpoints[model] = open_checkpoint(model, **opening)
    options = {"dtype": dtype, "backend": backend, "kernel": kernel, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    pairs = pairs or tuple(itertools.product(batch, prefill))
    cases = tuple(Case(rows, tokens, steps) for (rows, tokens), steps in itertools.product(pairs, decode))
    fused = (True, False) if compare else (not no_fuse,)
    plan = Plan(cases, fused, fp16, repeats, options)
    flops = matmul_flops(place)
    command = shlex.join(["awq-rt", *sys.argv[1:]])
    result = Result(_device_name(place), command, read_bandwidth(place) / 1e12, flops and flops / 1e12)
    try:
        _measure(plan, checkpoints, place, result, with_load, json_path)
    finally:
        if result.rows:
            _report(result, json_path, png_path)


def _measure(
    plan: Plan,
    checkpoints: dict[str, Checkpoint],
    device: torch.device,
    result: Result,
    with_load: bool,
    json_path: Path | None,
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..bench.session import run

    errors = console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    started = time.perf_counter()
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("", total=len(checkpoints) * (plan.steps + with_load))

        def progress(next_step: str) -> None:
            bar.update(task, description=next_step, advance=1)
            if json_path is not None and (result.rows or result.loads):
                result.write_json(json_path)  # whatever ends a long run, even kill -9, what it measured is kept
            if not errors.is_terminal:
                click.echo(f"{time.perf_counter() - started:6.1f} s  {next_step}", err=True)

        for name, checkpoint in checkpoints.items():
            run(name, plan, checkpoint, device, result, progress)
            if with_load:
                progress(f"loading {name} from files")
                result.loads.append(_load_time(name, checkpoint, device, plan.options))


def _load_time(name: str, checkpoint: Checkpoint, device: torch.device, options: dict[str, Any]) -> LoadTime:
    """Of the checkpoint's own files, or of a made-up one's, written for the occasion."""
    from ..bench.load_time import load_time
    from ..bench.synthetic import SyntheticCheckpoint
    from ..checkpoint import write_checkpoint

    if not isinstance(checkpoint, SyntheticCheckpoint):
        return load_time(name, checkpoint.source, device, options)
    with tempfile.TemporaryDirectory(prefix="awq_rt-") as folder:
        path = Path(folder, name)
        write_checkpoint(path, checkpoint.stored(), checkpoint.config)
        return load_time(name, path, device, options)


def _report(result: Result, json_path: Path | None, png_path: Path | None) -> None:
    from ..bench.report import latency_table, sentences, speed_table

    out = console()
    for sentence in sentences(result):
        out.print(sentence, soft_wrap=True)
    for figures in (speed_table(result), latency_table(result)):
        if figures.rows:
            out.print()
            _print(figures, out)
    if json_path is not None:
        result.write_json(json_path)
    if png_path is not None:
        from ..bench.plots import write_png

        write_png(result, png_path)


def _print(figures: Table, out: Console) -> None:
    """For people where somebody looks, else Markdown."""
    from ..bench.report import markdown

    if not out.is_terminal:
        out.print(markdown(figures), soft_wrap=True)
        return
    drawn = table(*figures.names, right=tuple(figures.names))
    for row in figures.rows:
        drawn.add_row(*row)
    out.print(drawn)


def _device_name(device: torch.device) -> str:
    import torch

    from .. import devices

    if device.type == "cpu":
        return devices.cpu().devices[0].name
    return torch.cuda.get_device_name(device)
