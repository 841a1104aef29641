"""Many callers of one model at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

PROMPTS = [[[5, 6, 7, 8]], [[9, 10]], [[3, 4, 5], [6, 7, 8]], [[11] * 9]]


def answers_of_threads(answer: Callable[[list[list[int]]], Any], threads: int) -> dict[int, list[Any]]:
    """What each thread is answered to `PROMPTS`, the second time: each asks all twice, from another one on."""
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        order = range(number, number + len(PROMPTS))
        made = {n % len(PROMPTS): answer(PROMPTS[n % len(PROMPTS)]) for n in (*order, *order)}
        found[number] = [made[n] for n in range(len(PROMPTS))]

    running = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found
