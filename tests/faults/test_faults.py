"""Many callers at once, processes that die, machines that misbehave: the answer is right, or an error, or not there."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import kills
import pytest
import torch
from callers import PROMPTS, answers_of_threads
from tiny import build, config_of

import awq_rt

NEW_TOKENS = 12

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, sends signals, reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "model"
    build(folder, config_of("llama"))
    return folder


def answer(model: Any, prompt: list[list[int]]) -> list[list[int]]:
    tokens: list[list[int]] = model.generate(
        torch.tensor(prompt), attention_mask=torch.ones(len(prompt), len(prompt[0])), max_new_tokens=NEW_TOKENS,
        do_sample=False,
    ).tolist()  # fmt: skip
    return tokens


def answers_of_a_process(folder: Path) -> list[list[list[int]]]:
    torch.set_num_threads(1)
    model = awq_rt.load(folder, device="cpu")
    return [answer(model, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[list[int]]]:
    return answers_of_a_process(folder)


def test_eight_threads_share_a_model(folder: Path, expected: list[list[list[int]]]) -> None:
    model = awq_rt.load(folder, device="cpu")
    found = answers_of_threads(lambda prompt: answer(model, prompt), 8)
    assert found == dict.fromkeys(range(8), expected)


def test_four_processes_load_and_answer_at_once(folder: Path, expected: list[list[list[int]]]) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.map(answers_of_a_process, [folder] * 4) == [expected] * 4


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python's, where there are threads
def test_a_forked_child_answers_with_its_parents_model(folder: Path, expected: list[list[list[int]]]) -> None:
    code = (
        "import os, sys; sys.path[:0] = sys.argv[2:]; import torch; torch.set_num_threads(1);"
        "from test_faults import *; model = awq_rt.load(sys.argv[1], device='cpu'); answer(model, PROMPTS[0]);"
        "child = os.fork();"
        "made = [answer(model, prompt) for prompt in PROMPTS];"
        "child == 0 and os._exit(0 if json.dumps(made) == sys.stdin.read().strip() else 3);"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), str(here), str(here.parent)],
        input=json.dumps(expected), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.stdout.strip() == "0", run.stderr


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth_of_cycles(folder: Path, cycles: int) -> int:
    """Bytes that the process grows by while it loads, uses and drops the model so often, after five to settle."""
    settled = 0
    for cycle in range(cycles + 5):
        answer(awq_rt.load(folder, device="cpu"), PROMPTS[0])
        gc.collect()  # a model has cycles of references
        if cycle == 4:
            settled = resident_bytes()
    return resident_bytes() - settled


def test_loading_again_and_again_does_not_grow(tmp_path: Path) -> None:
    """Of eight models that were not freed, or of every fourth, so much would be left."""
    config = config_of("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 512, 1024, 128
    build(tmp_path / "model", config)
    packed = awq_rt.load(tmp_path / "model", device="cpu").get_memory_footprint()
    assert growth_of_cycles(tmp_path / "model", 8) < 2 * packed


def test_kills_leave_nothing_that_is_trusted() -> None:
    """Five of each kind of work; benchmarks/faults.json has fifty of each."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(kills.__file__)), "20"],
        capture_output=True, text=True, timeout=280, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert sum(work["killed"] for work in found.values()) >= 8


def run_with_room_for(largest_file: int, work: kills.Work, folder: Path) -> int:
    """The exit code of a process that does `work`, and whose files may not grow beyond so many bytes."""

    def limited() -> None:
        import resource

        warnings.simplefilter("ignore")  # that compiled kernels cannot be kept
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        kills._quietly(work.run, folder)

    worker = multiprocessing.get_context("fork").Process(target=limited)
    worker.start()
    worker.join()
    assert worker.exitcode is not None
    return worker.exitcode


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("largest_file", [0, 100, 6000])
@pytest.mark.parametrize("name", kills.WORK)
def test_a_full_disk_leaves_nothing_that_is_trusted(
    name: str, largest_file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files stop growing at their first byte, in a header, and in what comes after it."""
    monkeypatch.setattr(kills, "_dense", tmp_path / "models" / "dense")
    work, folder = kills.WORK[name], tmp_path / "trial"
    folder.mkdir()
    work.prepare(folder)
    failed = run_with_room_for(largest_file, work, folder)
    assert bool(failed) is (name in ("convert", "quantize")), "a cache that is full is no error, anything else is"
    work.check(folder)
    assert not kills._finished(work, folder)
    assert run_with_room_for(1 << 30, work, folder) == 0
    assert kills._finished(work, folder)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_work_that_is_not_whole_at_every_moment_is_found(tmp_path: Path) -> None:
    value = "x" * 1000

    def careless(folder: Path) -> None:
        with (folder / "value").open("w") as file:
            file.write(value[:500])
            file.flush()
            time.sleep(0.2)
            file.write(value[500:])

    def check(folder: Path) -> None:
        assert not (folder / "value").exists() or (folder / "value").read_text() == value

    work = kills.Work(lambda folder: None, careless, check, lambda folder: (folder / "value").exists())
    tally = kills.trials(5, tmp_path, {"careless": work})["careless"]
    assert tally.killed
    assert tally.wrong


@pytest.mark.parametrize("clock", [-1e9, 1e9], ids=["back", "ahead"])
def test_a_clock_that_jumps_changes_nothing(
    folder: Path, expected: list[list[list[int]]], clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_time, calls = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: true_time() + clock * (next(calls) % 2))
    assert answers_of_a_process(folder) == expected
    awq_rt.convert(folder, folder.parent / f"converted-{clock}", "gemv")
    assert answers_of_a_process(folder.parent / f"converted-{clock}") == expected


def test_a_home_that_cannot_be_written_is_enough(folder: Path, expected: list[list[list[int]]]) -> None:
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]; from test_faults import *;"
        "print(json.dumps(answers_of_a_process(Path(sys.argv[1]))))"
    )
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name not in ("AWQ_RT_CACHE", "XDG_CACHE_HOME")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(folder), str(here), str(here.parent)],
        env=environment | {"HOME": "/proc", "HF_HOME": "/proc/none"}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == expected
