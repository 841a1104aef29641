"""`awq-rt eval`: perplexity of a model on a local text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .console import console
from .options import DTYPES, checkpoint_options


@click.command(name="eval")
@click.argument("model")
@click.option(
    "-t", "--text", "texts", multiple=True, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A UTF-8 text file; may be given several times.",
)  # fmt: skip
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of context.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens between windows.  [default: no overlap]")
@click.option("--max-windows", type=click.IntRange(min=1), help="Stop after so many.")
@click.option("--device", help="cpu, cuda:0, ...  [default: the best there is]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of activations.  [default: float16; float32 on the CPU]")
@click.option("--backend", help="A backend by name.  [default: the best that serves each linear]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that the checkpoint brings.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@checkpoint_options
def evaluate(
    model: str,
    texts: tuple[Path, ...],
    window: int,
    stride: int | None,
    max_windows: int | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Measure perplexity.

    MODEL is a 4-bit checkpoint or, for comparison, a dense one: a folder or a hub id. Each text is read in windows
    that do not overlap unless --stride is given; every token of a window but the first is predicted.
    """
    from rich.progress import Progress

    from ..evaluate import perplexity

    contents = {str(path): _read(path) for path in texts}
    loaded = _load(model, loading)
    if loaded.tokenizer is None:
        raise click.ClickException(f"{model} has no tokenizer, so there is nothing to read the text with")
    errors, found = console(stderr=True), {}
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        for name, text in contents.items():
            task = progress.add_task(name, total=None)
            found[name] = perplexity(
                loaded,
                loaded.tokenizer,
                text,
                window=window,
                stride=stride,
                max_windows=max_windows,
                progress=lambda done, total, task=task: progress.update(task, completed=done, total=total),  # type: ignore[misc]
            )
    if as_json:
        rows = {name: {"perplexity": p.value, "tokens": p.tokens, "windows": p.windows} for name, p in found.items()}
        click.echo(json.dumps({"model": model, "window": window, "stride": stride or window, "texts": rows}, indent=2))
        return
    for name, result in found.items():
        click.echo(f"{result.value:.3f}  {name} ({result.tokens} tokens in {result.windows} windows of {window})")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} cannot be read as UTF-8 text: {error}") from error


def _load(model: str, loading: dict[str, Any]) -> Any:
    """The model by `awq_rt.load`, or by transformers where its weights are not quantised."""
    import awq_rt

    from ..errors import NotQuantized

    try:
        return awq_rt.load(model, **loading)
    except NotQuantized:
        from .. import registry
        from ..models.architecture import dense_model, tokenizer

        device = loading["device"] or registry.default_device()
        options = {name: loading[name] for name in ("revision", "token", "trust_remote_code")}
        dtype = loading["dtype"] or ("float32" if str(device).startswith("cpu") else "float16")
        dense = dense_model(model, dtype=dtype, **options).to(device).eval()
        dense.tokenizer = tokenizer(model, **options)
        return dense
