"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

DTYPES = ("float16", "bfloat16", "float32")


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--revision`, `--token` and `--group-size`: the keywords of `open_checkpoint`."""
    for option in (
        click.option("--group-size", type=int, help="Only where neither configuration nor tensors state it."),
        click.option("--token", envvar="HF_TOKEN", help="A hub token; HF_TOKEN is read too."),
        click.option("--revision", help="A branch, tag or commit of a hub repository."),
    ):
        command = option(command)
    return command


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the keywords of `awq_rt.load`: those of `checkpoint_options`, and how a model is to run."""
    command = checkpoint_options(command)
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings."),
        click.option("--attn-implementation", help="sdpa, eager, ..."),
        click.option("--kernel", default="auto", show_default=True, help="A kernel family: gemv, gemm, exllama, ..."),
        click.option("--backend", help="A backend by name.  [default: the best that serves each linear]"),
        click.option(
            "--dtype", type=click.Choice(DTYPES), help="Of activations.  [default: float16; float32 on the CPU]"
        ),
        click.option("--device", help="cpu, cuda:0, ...  [default: the best there is]"),
    ):
        command = option(command)
    return command
