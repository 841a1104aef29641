"""Options that every command which opens a checkpoint has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def checkpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--revision`, `--token` and `--group-size`: the keywords of `open_checkpoint`."""
    for option in (
        click.option("--group-size", type=int, help="Only where neither configuration nor tensors state it."),
        click.option("--token", envvar="HF_TOKEN", help="A hub token; HF_TOKEN is read too."),
        click.option("--revision", help="A branch, tag or commit of a hub repository."),
    ):
        command = option(command)
    return command
