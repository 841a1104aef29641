"""The text of a generation as an iterator."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from ..errors import InvalidInput


class _Stopped(Exception):
    """Nobody reads any more."""


class _Pieces(TextStreamer):  # type: ignore[misc]
    """Puts finished pieces of text into a queue, None at the end."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.queue: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
        self.unread = False

    def put(self, value: Tensor) -> None:
        if self.unread:
            raise _Stopped
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.queue.put(text)


def stream(model: Any, prompt: str | Tensor, **arguments: Any) -> Iterator[str]:
    """Pieces of the answer to `prompt`, a text or ids [1, T], as they are made. `arguments` go to `model.generate`.

    What generation raises is raised here. Leaving the iterator ends the generation.
    """
    if model.tokenizer is None:
        raise InvalidInput("the model has no tokenizer, so there is no text to stream; use generate(streamer=...)")
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids if isinstance(prompt, str) else prompt
    if ids.dim() != 2 or len(ids) != 1:
        raise InvalidInput(f"the prompt's ids have shape {list(ids.shape)}; one sequence, [1, T], can be streamed")
    pieces = _Pieces(model.tokenizer)

    def run() -> None:
        try:
            model.generate(ids.to(model.device), streamer=pieces, **arguments)
        except _Stopped:
            pass
        except BaseException as error:
            pieces.queue.put(error)
        pieces.queue.put(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (piece := pieces.queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        pieces.unread = True
        thread.join()
