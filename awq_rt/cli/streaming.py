"""Text in, tokens out: what `awq-rt generate` does with a tokenizer. Imports transformers."""

from __future__ import annotations

import time
from typing import Any

import click
from torch import Tensor
from transformers import TextStreamer
from transformers.utils import logging


class Stream:
    """Prints tokens as text when they come, and keeps the time. A streamer for transformers' `generate`."""

    def __init__(self, tokenizer: Any):
        self._text = TextStreamer(
            tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        self._started = time.perf_counter()
        self._prompt_tokens: int | None = None
        self._times: list[float] = []

    def put(self, tokens: Tensor) -> None:
        """The prompt first, then one new token a call."""
        if self._prompt_tokens is None:
            self._prompt_tokens = tokens.numel()
            self._started = time.perf_counter()
        else:
            self._times.append(time.perf_counter())
        self._text.put(tokens)

    def end(self) -> None:
        """No token will follow."""
        self._text.end()

    def figures(self) -> str:
        """One line: how many tokens, how long the first took, how fast the others came."""
        if not self._times:
            return f"{self._prompt_tokens} prompt tokens, no new ones"
        first_s = self._times[0] - self._started
        line = f"{self._prompt_tokens} prompt tokens, {len(self._times)} new; first token after {first_s:.2f} s"
        rest_s = self._times[-1] - self._times[0]
        return f"{line}, then {(len(self._times) - 1) / rest_s:.1f} tokens/s" if rest_s > 0 else line


def quiet() -> None:
    """No progress bars: nobody looks."""
    logging.disable_progress_bar()


def encode(tokenizer: Any, prompt: str, system: str | None, raw: bool) -> Any:
    """The prompt as input tensors, through the chat template where there is one."""
    if raw or not tokenizer.chat_template:
        if system is not None:
            raise click.UsageError("--system needs a chat template, and this tokenizer has none.")
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    from jinja2 import TemplateError

    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:  # some templates refuse a system message
        raise click.UsageError(f"the model's chat template refuses this: {error}; --raw leaves it out.") from error
