"""`awq-rt doctor` as it is called: beside a torch that cannot be imported, in JSON, redacted, in a bundle."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner, Result
from plugins.folders import write_plugin

from awq_rt import cache, codes, devices, doctor
from awq_rt.cli import cli
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.doctor import Finding, Report, Status, Verdict, bundle, redaction
from awq_rt.doctor.report import Checked, KernelRun, Offer, Package, PluginState, Torch
from awq_rt.errors import WriteError

SCHEMA = json.loads((Path(doctor.__file__).parent / "schema.json").read_text())
HOST = Device("cpu", 0, "Some CPU", "cpu", "x86_64", 2**34)
REFUSAL = Refusal("AWQ-BACKEND-013", "its self-test failed", "update it")
REPORT = Report(
    summary="CPU Some CPU, x86_64, torch, fp32, backend reference",
    checks=(
        Checked("system", Status.OK, "Some System", ()),
        Checked("plugins", Status.DEGRADED, "reference 0.1.0 loaded, wrong 0.1.0 quarantined [AWQ-BACKEND-013]",
                (Finding("AWQ-BACKEND-013", Verdict.DEGRADED, "backend 'wrong' is quarantined", "pip install x"),)),
        Checked("model", Status.SKIPPED, "no MODEL was given", ()),
    ),
    system={"system": "Some System"},
    environment={"AWQ_RT_CACHE": str(cache.cache_dir()), "HF_HOME": f"{Path.home()}/huggingface"},
    packages=(Package("torch", ">=2.10", "2.13.0+cpu", "ok"),),
    torch=Torch("2.13.0+cpu", "", "", "/home/alice/venv/torch/__init__.py", 2, "it is a build for the CPU only", ()),
    devices=(HOST,),
    refusals=(Refusal("AWQ-CUDA-001", "nvidia-smi was not found", "install its driver"),),
    plugins=(
        PluginState("reference", "awq-rt-reference", "0.1.0", 0, ("torch",), (HOST,), (), None),
        PluginState("wrong", "awq-rt-wrong", "0.1.0", None, (), (), (), REFUSAL),
    ),
    selection=(Offer("cpu", "reference", "auto", "float32", ("gemm", "gemv"), "selected", "", ""),),
    kernels=(KernelRun("cpu", "reference", "auto", "float32", "right", 0.25, 1234.5, 0.125, (2048, 2048)),),
)  # fmt: skip


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str, report: Any = REPORT) -> Result:
    """The command in this process, on a made-up machine."""

    def diagnose(request: Any, *, strict: bool, progress: Any) -> Report:
        if isinstance(report, Exception):
            raise report
        return report  # type: ignore[no-any-return]

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    return CliRunner().invoke(cli, ["doctor", *arguments])


# --- what it prints --------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_what_to_do_then_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke(monkeypatch)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0] == "Degraded: CPU Some CPU, x86_64, torch, fp32, backend reference"
    assert lines[2] == "AWQ-BACKEND-013  backend 'wrong' is quarantined"
    assert lines[3].strip() == codes.CODES["AWQ-BACKEND-013"].cause
    assert lines[4:6] == ["  $ pip install x", "  TROUBLESHOOTING.md#awq-backend-013"]
    assert lines[7] == "Checks"
    assert lines[8].split() == ["1", "system", "ok", "Some", "System"]
    for words in ("Some CPU", "nvidia-smi was not found", "quarantined [AWQ-BACKEND-013]", "2.13.0", "1234.5", "12 %"):
        assert words in result.stdout
    assert "these need a backend plugin" not in result.stdout


@pytest.mark.parametrize(("verdict", "exit_code"), [(Verdict.READY, 0), (Verdict.DEGRADED, 1), (Verdict.UNUSABLE, 2)])
def test_the_exit_code_is_the_verdict(monkeypatch: pytest.MonkeyPatch, verdict: Verdict, exit_code: int) -> None:
    from dataclasses import replace

    finding = Finding("AWQ-BACKEND-013", verdict, "a reason", "a command")
    report = replace(REPORT, checks=(Checked("plugins", Status.NOTE, "", (finding,)),))
    assert invoke(monkeypatch, report=report).exit_code == exit_code
    found = json.loads(invoke(monkeypatch, "--json", report=report).stdout)
    assert (found["exit_code"], found["verdict"]) == (exit_code, verdict.name.lower())


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_bug_in_the_doctor_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    result = invoke(monkeypatch, *arguments, report=KeyError("oops"))
    assert result.exit_code == 3
    assert "KeyError" in result.stdout
    if arguments:
        found = json.loads(result.stdout)
        jsonschema.validate(found, SCHEMA)
        assert (found["verdict"], found["code"]) == ("bug", "AWQ-DOCTOR-001")
    else:
        assert "[AWQ-DOCTOR-001]" in result.stdout


def test_the_checks_are_listed_in_order_with_their_codes() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--list-checks"])
    names = re.findall(r"^ ?\d+ (\w+)", result.stdout, re.MULTILINE)
    assert names == [check.name for check in doctor.CHECKS]
    assert names[0] == "system"
    assert set(re.findall(r"AWQ-\w+-\d{3}", result.stdout)) == {code for check in doctor.CHECKS for code in check.codes}


def test_a_code_is_explained() -> None:
    result = CliRunner().invoke(cli, ["doctor", "--explain", "awq-cuda-003"])
    assert result.stdout.startswith("AWQ-CUDA-003: No NVIDIA GPU is visible\n")
    assert "$ env | grep CUDA_VISIBLE_DEVICES" in result.stdout
    assert "no code 'X-1' is known" in CliRunner().invoke(cli, ["doctor", "--explain", "X-1"]).stderr


# --- on this machine -------------------------------------------------------------------------------------------------

RUN = """
import sys
from awq_rt.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`awq-rt doctor` in a process of its own, `path` first among the places to import from."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", RUN, "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_doctor_answers_here_in_json_of_a_stated_schema() -> None:
    done = run("--json", "--no-run")
    found = json.loads(done.stdout)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert found["schema"] == SCHEMA["$id"] == doctor.SCHEMA
    assert done.returncode == found["exit_code"] == Verdict[found["verdict"].upper()]
    assert done.returncode < 2, done.stdout
    assert done.stderr == "False\n"  # torch was imported elsewhere
    assert found["torch"]["version"]
    assert "reference" in [plugin["name"] for plugin in found["plugins"]]
    assert found["devices"][0]["type"] == "cpu"
    assert {offer["status"] for offer in found["selection"] if offer["device"] == "cpu"} >= {"selected", "available"}
    assert found["kernels"] == []


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "AWQ-TORCH-002", "libcudart.so.12"),
        ("raise SystemExit(7)", "AWQ-TORCH-002", "SystemExit: 7"),
        ("1 / 0", "AWQ-TORCH-002", "ZeroDivisionError"),
        ("raise ModuleNotFoundError('no torch', name='torch')", "AWQ-TORCH-001", "torch is not installed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "AWQ-TORCH-003", "killed by SIGILL"),
        ("import os; os._exit(5)", "AWQ-TORCH-003", "ended with exit status 5"),
    ],
)
def test_the_doctor_outlives_a_torch_that_cannot_be_imported(
    tmp_path: Path, source: str, code: str, words: str
) -> None:
    (tmp_path / "torch.py").write_text(source + "\n")
    done = run("--json", "some/model", path=tmp_path)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert (found["verdict"], found["torch"]) == ("unusable", None)
    assert found["findings"][0]["code"] == code
    assert words in found["findings"][0]["reason"]
    assert found["summary"] == found["findings"][0]["reason"]
    assert found["devices"]
    assert found["packages"]


def test_the_doctor_answers_where_nothing_but_python_is_installed() -> None:
    """Not even what the command line needs."""
    source = Path(doctor.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(source)}
    command = [sys.executable, "-S", "-m", "awq_rt.doctor"]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert (done.returncode, found["findings"][0]["code"]) == (2, "AWQ-TORCH-001"), done.stderr


def test_a_torch_that_is_too_old_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '1.13.1'\n")
    done = run(path=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("Unusable: torch 1.13.1 is installed; >=2.10 is needed\n\nAWQ-TORCH-004 ")


def test_a_broken_plugin_is_a_row_and_not_a_traceback(tmp_path: Path) -> None:
    write_plugin(tmp_path, "broken", "raise RuntimeError('no luck')\n")
    done = run("--no-run", path=tmp_path)
    assert done.returncode == 1
    assert "AWQ-BACKEND-010  backend 'broken' is quarantined: loading it raised RuntimeError: no luck" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_other_commands_point_to_the_doctor_when_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", RUN, "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Error: libcudart.so.12: cannot open shared object file; `awq-rt doctor` says more" in done.stderr
    assert "Traceback" not in done.stderr


# --- redaction and the bundle ----------------------------------------------------------------------------------------


def test_redaction_takes_out_names_and_private_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "workstation7.example.org")
    monkeypatch.setenv("HOME", "/home/alice")
    redact = redaction.redactor()
    assert redact("/home/alice/models/x") == "<home>/models/x"
    assert redact("alice@workstation7.example.org: (/data/secret/llama/config.json)") == \
        "<user>@<host>: (<path>/config.json)"  # fmt: skip
    assert redact(f"{cache.cache_dir()}/kernels") == "<cache>/kernels"
    assert redact(f"in {sys.prefix}/bin/python3") == "in <prefix>/bin/python3"
    assert redact("C:\\Users\\bob\\x.py failed") == "<path> failed"
    for kept in ("/usr/lib/libnvrtc.so.13", "/dev/kfd", "1/2", "gemv/gemm", "alicedale", "3 us/call", "https://a.b/c"):
        assert redact(kept) == kept
    assert redaction.redacted({"/home/alice": ["/home/alice", 3, None]}, redact) == {"/home/alice": ["<home>", 3, None]}


@pytest.mark.parametrize("arguments", [("--redact",), ("--redact", "--json")])
def test_a_redacted_report_holds_no_private_path(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    open_, closed = invoke(monkeypatch, *arguments[1:]).stdout, invoke(monkeypatch, *arguments).stdout
    assert str(Path.home()) in open_
    for private in (str(Path.home()), "alice", str(cache.cache_dir())):
        assert private not in closed
    if "--json" in arguments:
        jsonschema.validate(json.loads(closed), SCHEMA)


def test_a_bundle_holds_the_report_versions_and_conformance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def conformance(name: str, limit_s: float) -> str:
        asked.append(name)
        return f"{name}: 3 passed, under {Path.home()}/x\n"

    monkeypatch.setattr(bundle, "conformance", conformance)
    path = tmp_path / "report.zip"
    result = invoke(monkeypatch, "--bundle", str(path), "--redact")
    assert result.exit_code == 1
    assert asked == ["reference"]  # not the one in quarantine
    with zipfile.ZipFile(path) as archive:
        parts = {name.removeprefix("awq-rt-doctor/"): archive.read(name).decode() for name in archive.namelist()}
    assert set(parts) == {"report.json", "report.txt", "versions.txt", "conformance-reference.txt"}
    jsonschema.validate(json.loads(parts["report.json"]), SCHEMA)
    assert parts["report.txt"].startswith("Degraded: ")
    assert re.search(r"^torch==", parts["versions.txt"], re.MULTILINE)
    assert not [name for name, text in parts.items() if str(Path.home()) + "/" in text]
    assert [file.name for file in tmp_path.iterdir()] == ["report.zip"]  # nothing temporary stays


def test_a_bundle_replaces_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("precious")
    result = invoke(monkeypatch, "--bundle", str(path))
    assert "[AWQ-WRITE-001]" in result.stderr
    assert path.read_text() == "precious"
    assert "[AWQ-WRITE-000]" in invoke(monkeypatch, "--bundle", str(tmp_path / "no" / "folder")).stderr


def test_a_bundle_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(source: str, destination: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(WriteError, match="No space left"):
        bundle.write(tmp_path / "report.zip", {"plugins": []}, "", str)
    assert not any(tmp_path.iterdir())


def test_the_conformance_result_is_kept_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "usage" not in (said := bundle.conformance("nonesuch", 60))
    assert "UnknownBackend" in said
    assert said.endswith("exit status 1\n")
    assert bundle.conformance("reference", 0.01) == "ended after 0.01 s, unfinished\n"


def test_a_machine_whose_probes_answer_nothing_is_reported_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "nvidia", Probe)
    monkeypatch.setattr(devices, "amd", Probe)
    assert json.loads(json.dumps(REPORT.to_json()))["findings"][0]["page"] == "TROUBLESHOOTING.md#awq-backend-013"
