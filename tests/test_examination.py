"""What is remembered of a plugin's examination, what undoes it, and how a worker is asked."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from plugins.folders import write_metadata, write_plugin

from awq_rt import cache, devices, examination
from awq_rt.errors import BackendError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path for plugins, with a cache of its own."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("AWQ_RT_CACHE", str(tmp_path / "cache"))
    return site


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plugins that were examined in a process, in place of which stands a pass."""
    names: list[str] = []
    monkeypatch.setattr(examination, "_examine_elsewhere", names.append)
    return names


def test_a_pass_is_remembered(site: Path, asked: list[str]) -> None:
    write_plugin(site, "good", "backend = None\n")
    assert examination.examine("good", "1.0") is None
    assert examination.examine("good", "1.0") is None
    assert asked == ["good"]


def test_a_failure_is_tried_again(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = devices.Refusal("AWQ-BACKEND-010", "loading it raised", "update it")
    answers = iter([refusal, refusal, None])
    monkeypatch.setattr(examination, "_examine_elsewhere", lambda name: next(answers))
    write_plugin(site, "unlucky", "backend = None\n")
    assert [examination.examine("unlucky", "1.0") for _ in range(4)] == [refusal, refusal, None, None]


@pytest.mark.parametrize("kind", ["module", "package", "namespace package"])
def test_editing_a_plugin_undoes_its_pass(site: Path, asked: list[str], kind: str) -> None:
    folder = site / "plugin_edited"
    if kind == "module":
        file = write_plugin(site, "edited", "backend = None\n")
    else:
        write_metadata(site, "plugin-edited", "1.0", {"edited": "plugin_edited.inner:backend"})
        folder.mkdir()
        file = folder / "inner.py"
        file.write_text("backend = None\n")
        if kind == "package":
            (folder / "__init__.py").touch()
    examination.examine("edited", "1.0")
    file.write_text("backend = None  # and more\n")
    examination.examine("edited", "1.0")
    assert asked == ["edited", "edited"]


@pytest.mark.parametrize("change", ["version", "driver", "torch"])
def test_another_version_driver_or_torch_undoes_a_pass(
    site: Path, asked: list[str], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(site, "good", "backend = None\n")
    examination.examine("good", "1.0")
    if change == "driver":
        monkeypatch.setattr(devices, "driver_fingerprint", lambda: "another driver")
    elif change == "torch":
        monkeypatch.setattr(examination, "_version", lambda distribution: f"another {distribution}")
    examination.examine("good", "2.0" if change == "version" else "1.0")
    assert asked == ["good", "good"]


def test_what_is_visible_of_the_gpus_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = devices.driver_fingerprint()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.driver_fingerprint() != before


def test_a_cache_that_cannot_be_written_or_read_is_no_error(
    site: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("AWQ_RT_CACHE", str(blocked))
    write_plugin(site, "good", "backend = None\n")
    assert examination.examine("good", "1.0") is None
    assert examination.examine("good", "1.0") is None
    assert asked == ["good", "good"]


def test_a_user_without_a_home_folder_gets_a_cache_that_nobody_else_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("AWQ_RT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it answers where there is no home
    folder = cache.cache_dir()
    try:
        assert folder.is_absolute()
        assert folder.stat().st_mode & 0o077 == 0
        assert cache.cache_dir() == folder
    finally:
        folder.rmdir()
        cache._folder_of_this_process.cache_clear()


def test_a_plugin_that_hangs_is_refused_after_the_time_limit(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plugin(site, "hangs", "import threading\nthreading.Event().wait()\n")
    monkeypatch.setenv("AWQ_RT_EXAMINATION_TIMEOUT", "0.5")
    refusal = examination.examine("hangs", "1.0")
    assert refusal is not None
    assert (refusal.code, refusal.reason) == ("AWQ-BACKEND-011", "its self-test did not end in 0.5 s")


def test_a_time_limit_that_is_no_number_is_an_error_with_its_value(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_EXAMINATION_TIMEOUT", "soon")
    with pytest.raises(BackendError, match="'soon'"):
        examination.examine("anything", "1.0")


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker(site: Path) -> Callable[[str], examination.Outcome]:
    """Runs `main` of a module with the given body."""

    def run(body: str, *arguments: str) -> examination.Outcome:
        (site / "some_worker.py").write_text(f"import sys, os, signal\ndef main():\n    {body}\n")
        return examination.ask("some_worker", *arguments, limit_s=60)

    return run


def test_a_worker_looks_for_modules_where_its_parent_does(worker: Callable[..., examination.Outcome]) -> None:
    outcome = worker("from awq_rt.examination import answer; answer(sys.path)")
    assert outcome.answers == ([str(path) for path in sys.path],)
    assert outcome.ending == ""


def test_a_worker_gets_its_arguments_and_no_standard_input(worker: Callable[..., examination.Outcome]) -> None:
    outcome = worker("from awq_rt.examination import answer; answer([sys.argv[1:], sys.stdin.read()])", "a b", "c")
    assert outcome.answers == ([["a b", "c"], ""],)


def test_what_else_a_worker_prints_does_not_matter(worker: Callable[..., examination.Outcome]) -> None:
    outcome = worker(
        "from awq_rt.examination import answer; sys.stdout.write('noise'); "
        "answer(1); os.write(1, b'\\xff'); answer(None)"
    )
    assert outcome.answers == (1, None)


@pytest.mark.parametrize(
    ("body", "ending", "complaint"),
    [
        ("sys.exit('oh no')", "ended with exit status 1", "oh no"),
        ("os._exit(0)", "", "it printed nothing"),
        ("os.kill(os.getpid(), signal.SIGILL)", "was killed by SIGILL", "it printed nothing"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 3)", f"was killed by signal {37}", "it printed nothing"),
    ],
)
def test_how_a_worker_ended_is_said(
    worker: Callable[..., examination.Outcome], body: str, ending: str, complaint: str
) -> None:
    outcome = worker(body)
    assert (outcome.answers, outcome.ending, outcome.complaint) == ((), ending, complaint)


def test_answers_before_the_time_limit_are_kept(site: Path) -> None:
    (site / "some_worker.py").write_text(
        "import threading\nfrom awq_rt.examination import answer\n"
        "def main():\n    answer('here')\n    threading.Event().wait()\n"
    )
    outcome = examination.ask("some_worker", limit_s=2)
    assert (outcome.answers, outcome.timed_out, outcome.ending) == (("here",), True, "did not end in 2 s")


def test_a_worker_runs_before_it_is_told_anything_and_hears_all_of_it(site: Path) -> None:
    (site / "some_worker.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom awq_rt.examination import answer\n"
        "def main():\n    Path(sys.argv[1]).touch()\n    answer(len(sys.stdin.read()))\n"
    )
    begun = examination.Worker("some_worker", str(site / "begun"))
    wait_until((site / "begun").exists)
    assert begun.outcome(60, "x" * 300_000) == examination.Outcome((300_000,), "", "it printed nothing")


def test_a_worker_that_does_not_listen_is_ended_like_any_other(site: Path) -> None:
    (site / "some_worker.py").write_text("import threading\ndef main():\n    threading.Event().wait()\n")
    assert examination.Worker("some_worker").outcome(0.5, "x" * 300_000).timed_out


def test_a_worker_that_nobody_asks_is_ended(site: Path) -> None:
    (site / "some_worker.py").write_text(
        "import os, sys, threading\nfrom pathlib import Path\n"
        "def main():\n    Path(sys.argv[1]).write_text(str(os.getpid()))\n    threading.Event().wait()\n"
    )
    told = site / "its number"
    begun = examination.Worker("some_worker", str(told))
    wait_until(lambda: told.exists() and told.read_text() != "")
    begun.end()
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def wait_until(true: Callable[[], bool]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.1)
    pytest.fail("it did not come about in a minute")


def test_an_interpreter_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    outcome = examination.ask("anything", limit_s=1)
    assert "could not be started" in outcome.ending


def test_an_answer_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    examination.answer({"reason": "two\nlines"})
    line = capsys.readouterr().out.strip()
    assert json.loads(line.removeprefix(examination.MARK)) == {"reason": "two\nlines"}
