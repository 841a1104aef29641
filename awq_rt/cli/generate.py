"""`awq-rt generate`: one prompt, one answer, streamed to standard output; figures go to standard error."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from typing import Any

import click

from ..memory import collector_paused
from .options import loading_options


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. What is None is left to the checkpoint's generation_config.json."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None

    @property
    def greedy(self) -> bool:
        """Whether no sampling was asked for: no flag, or a temperature of 0."""
        return self.temperature == 0 or all(
            value is None for value in (self.temperature, self.top_p, self.top_k, self.min_p)
        )

    def arguments(self) -> dict[str, Any]:
        """For `model.generate`."""
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        if self.greedy:  # None, so that what the checkpoint sets for sampling is not warned about
            return {"do_sample": False, **dict.fromkeys(chosen)}
        return {"do_sample": True, **{name: value for name, value in chosen.items() if value is not None}}


@click.command()
@click.argument("model")
@click.argument("words", metavar="[PROMPT]", required=False)
@click.option("-p", "--prompt", help="The prompt; `-` reads it from standard input, as does leaving it out.")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), help="Sample; 0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the most probable mass.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the most probable tokens.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="Sample from tokens this probable beside the best.")
@click.option("--repetition-penalty", type=click.FloatRange(min=0, min_open=True), help="Above 1: repeat less.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Sample the same answer again.")
@loading_options
def generate(
    model: str,
    words: str | None,
    prompt: str | None,
    system: str | None,
    raw: bool,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    backend: str | None,
    kernel: str,
    attn_implementation: str | None,
    trust_remote_code: bool,
    **opening: Any,
) -> None:
    """Answer a prompt.

    MODEL is a folder, a file or a hub id. PROMPT goes through the model's chat template where it has one. Greedy unless
    a sampling option is given.
    """
    if system is not None and raw:
        raise click.UsageError("--system needs the chat template, which --raw leaves out.")
    sampling = Sampling(temperature, top_p, top_k, min_p)
    if seed is not None and sampling.greedy:
        raise click.UsageError(
            "--seed is for sampling, and the answer is greedy: add --temperature above 0, --top-p, --top-k or --min-p."
        )
    text = _prompt(words, prompt)

    with collector_paused():
        import torch

        import awq_rt

        from .streaming import Stream, encode, quiet

    if not sys.stderr.isatty():
        quiet()
    started = time.perf_counter()
    loaded = awq_rt.load(
        model,
        device=device,
        dtype=dtype,
        backend=backend,
        kernel=kernel,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        **opening,
    )
    loading_s = time.perf_counter() - started
    gc.freeze()  # what is here stays: never to be walked while tokens are made
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise click.ClickException(f"{model} has no tokenizer, so there is nothing to read the prompt with")
    inputs = encode(tokenizer, text, system, raw).to(loaded.device)
    if seed is not None:
        torch.manual_seed(seed)
    stream = Stream(tokenizer)
    # One sequence, whatever the checkpoint's generation_config.json sets: what is printed as it comes cannot be undone.
    arguments = {"num_beams": 1, "num_return_sequences": 1, **sampling.arguments()}
    if repetition_penalty is not None:
        arguments["repetition_penalty"] = repetition_penalty
    loaded.generate(**inputs, max_new_tokens=max_new_tokens, streamer=stream, **arguments)
    click.echo(f"{stream.figures()}; loaded in {loading_s:.1f} s", err=True)


def _prompt(words: str | None, option: str | None) -> str:
    """The prompt from the argument, `--prompt` or standard input."""
    if words is not None and option is not None:
        raise click.UsageError("the prompt is given twice, as an argument and with --prompt.")
    given = option if words is None else words
    if given is None and sys.stdin.isatty():
        raise click.UsageError("no prompt: give it as an argument, with --prompt, or on standard input.")
    text = sys.stdin.read().rstrip("\n") if given in (None, "-") else given
    if not text:
        raise click.UsageError("the prompt is empty.")
    return text
