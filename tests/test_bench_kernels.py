"""tools/bench_kernels.py: which grid it measures, and how it goes on where a run ended. Needs no GPU."""

from __future__ import annotations

import argparse
import contextlib
import json
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
ROOT = Path(__file__).parents[1]
ASKED = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 300, 512, 1000, 2048, 8192)


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "bench_kernels.py"))


def options(json_path: Path, **changes: object) -> argparse.Namespace:
    given = {
        "models": ["7b", "8b"],
        "sampled_models": ["70b", "qwen7b"],
        "rows": list(ASKED),
        "sampled_rows": [1, 64],
        "group_sizes": [128, 64, 32],
        "commit": "abc",
        "json": json_path,
        "resume": False,
    }
    return argparse.Namespace(**given | changes)


def test_the_grid_is_whole_for_the_first_models_and_group_size(tool: dict[str, Any], tmp_path: Path) -> None:
    assert tool["ROWS"] == ASKED
    parts = list(tool["parts"](options(tmp_path / "x.json")))
    whole = [part for part in parts if part.beside_others]
    assert len(whole) == 7
    assert all(part.row_counts == ASKED and part.group_size == 128 for part in whole)
    assert {part.group_size for part in parts} == {128, 64, 32}
    assert {(part.k, part.n) for part in parts if not part.beside_others} >= {(8192, 8192), (18944, 3584)}
    assert len({(part.k, part.n, part.group_size) for part in parts}) == len(parts)


def test_a_run_goes_on_where_it_ended_and_only_on_the_same_tree_and_gpu(
    tool: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grid.json"
    begun = tool["begun"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setitem(begun.__globals__, "read_bandwidth", lambda: 3.0)
    record = begun(options(path))
    record.rows.append({"k": 4096, "n": 4096, "group_size": 128, "m": 3, "dtype": "float16", "us": 1.0})
    record.save(path)
    assert not list(tmp_path.glob("*.part"))
    assert json.loads(path.read_text())["rows"] == record.rows

    again = begun(options(path, resume=True))
    assert again == record
    assert again.has(4096, 4096, 128, 3, torch.float16)
    assert not again.has(4096, 4096, 128, 4, torch.float16)
    assert not again.has(4096, 4096, 128, 3, torch.bfloat16)
    assert begun(options(path)).rows == []
    with pytest.raises(SystemExit, match=r"is of commit abc on a GPU .*this run of commit abd"):
        begun(options(path, resume=True, commit="abd"))


def test_what_is_compared_takes_turns(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that slows down as it works: timed one after the other, the second of two equals would seem slower."""
    clock = [0.0]
    order: list[str] = []

    class Graph:
        def __init__(self) -> None:
            self.calls: list[str] = []

        def replay(self) -> None:
            order.extend(dict.fromkeys(self.calls))
            clock[0] += sum(1.0 + len(order) / 1000 for _ in self.calls)

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, _: object) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    capturing: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph: Graph, *, stream: object) -> Iterator[None]:
        capturing.append(graph)
        yield
        capturing.pop()

    def run(name: str) -> Callable[[int], None]:
        return lambda _: capturing[-1].calls.append(name) if capturing else None

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setitem(tool["in_turn_us"].__globals__, "warm_up", lambda *_: None)
    ours, theirs = tool["in_turn_us"]([(run("ours"), 5), (run("theirs"), 2)], replays=3)
    assert order == ["ours", "theirs"] * 3
    assert ours == pytest.approx(1003)  # the second of its turns at 1, 3 and 5 thousandths, 5 calls each
    assert theirs == pytest.approx(1004)
