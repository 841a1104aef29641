"""What a function did to tensors, done again with hardly any Python: a graph for devices that have none.

The operators of this package go on a tape (src/tape.h), which one call plays. What torch does between them is called
again, one operator at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.utils._python_dispatch import TorchDispatchMode

from . import _native

ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
DEPENDS_ON_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None] | None, Tensor]:
    """Run `function`. Returns what does the same work on the same tensors again, and the tensor that it writes.

    None in the place of the first where what is done depends on values, or where torch does most of it, so that
    nothing would be gained.
    """
    recorder = _Recorder()
    tape, calls = recorder.tape, recorder.calls
    tape.start()
    try:
        with recorder:
            result = function()
    finally:
        tape.stop()
    if recorder.depends_on_values or len(calls) > len(tape):
        return None, result

    def replay() -> None:
        threads, done = get_num_threads(), 0
        for place, call in calls:
            tape.run(done, place, threads)
            call()
            done = place
        tape.run(done, len(tape), threads)

    return replay, result


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of torch, and on its tape those of this package."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = _native.Tape()
        self.calls: list[tuple[int, Callable[[], Any]]] = []  # and how much of the tape goes before each
        self.depends_on_values = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place, keywords = len(self.tape), kwargs or {}
        result = func(*args, **keywords)
        if len(self.tape) > place or func._schema.name in ALLOCATIONS:  # an operator of ours; its result's memory
            return result
        if func._schema.is_mutable:
            self.calls.append((place, lambda: func(*args, **keywords)))
            return result
        written = list(result) if isinstance(result, (tuple, list)) else [result]
        if DEPENDS_ON_VALUES.intersection(func.tags) or not all(isinstance(tensor, Tensor) for tensor in written):
            self.depends_on_values = True
        elif any(returned.alias_info is None for returned in func._schema.returns):  # else a view

            def again() -> None:
                found = func(*args, **keywords)
                for to, new in zip(written, found if isinstance(found, (tuple, list)) else [found], strict=True):
                    to.copy_(new)

            self.calls.append((place, again))
        return result
