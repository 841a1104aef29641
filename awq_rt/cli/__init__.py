"""The command `awq-rt`. It must start at once and whatever is broken: torch and all that needs it are imported late."""

from __future__ import annotations

import gc
import os
import sys
import warnings
from typing import Any, TextIO

import click

from .. import __version__
from ..errors import AwqRtError
from .bench import bench
from .convert import convert
from .doctor import doctor
from .eval import evaluate
from .generate import generate
from .inspect import inspect
from .quantize import quantize
from .warmup import warmup

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
READER_GONE = 141  # 128 + SIGPIPE


class Commands(click.Group):
    """A group whose commands end with a sentence and an exit code, never with a traceback for what is not a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                result = super().invoke(ctx)
                sys.stdout.flush()  # here, where a reader that has gone can still be answered
            except AwqRtError as error:
                raise click.ClickException(str(error)) from error
            except ImportError as error:
                raise click.ClickException(f"{error}; `awq-rt doctor` says more") from error
            except (
                NotImplementedError
            ) as error:  # a RuntimeError too: how awq_rt, transformers and torch say "unsupported"
                raise click.ClickException(str(error) or "this is not implemented for this checkpoint") from error
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                    raise
                raise click.ClickException(f"the device has too little memory: {error}") from error
            except KeyboardInterrupt:
                click.echo(err=True)
                ctx.exit(INTERRUPTED)
            except BrokenPipeError:
                # The interpreter flushes once more when it ends; there must be somewhere to flush to.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                ctx.exit(READER_GONE)
        return result


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"Warning: {message}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="awq-rt")
def cli() -> None:
    """Run 4-bit AWQ language models on whatever GPU there is, or on none."""


for command in (generate, inspect, convert, quantize, evaluate, bench, warmup, doctor):
    cli.add_command(command)


def main() -> None:
    """The console script."""
    try:
        cli(prog_name="awq-rt")
    finally:
        gc.unfreeze()  # libraries say at the end which of their objects were never freed
