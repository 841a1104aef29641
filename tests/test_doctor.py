"""The doctor: on this machine, beside a torch that cannot be imported, and on machines that are made up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from awq_rt import devices, doctor
from awq_rt.cli import cli
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.doctor import Finding, Report, Verdict, diagnosis, requirements
from awq_rt.doctor.report import Package
from awq_rt.examination import Outcome

HOST = Device("cpu", 0, "Some CPU", "cpu", "x86_64", 2**34)
H100 = Device("cuda", 0, "NVIDIA H100", "nvidia", "sm_90", 80 * 2**30, 32, "550.54")
MI300 = Device("cuda", 0, "AMD gfx942", "amd", "gfx942", 192 * 2**30, 64, "6.7")
NO_NVIDIA = Probe(refusals=(Refusal("AWQ-CUDA-001", "nvidia-smi was not found", "install its driver"),))
NO_AMD = Probe(refusals=(Refusal("AWQ-ROCM-001", "no topology exists", "install its driver"),))

TORCH = {
    "step": "torch",
    "version": "2.13.0",
    "cuda": "12.8",
    "hip": "",
    "path": "/somewhere/torch/__init__.py",
    "threads": 2,
    "unreachable": "",
    "gpus": ["NVIDIA H100"],
}
CPU_TORCH = {**TORCH, "version": "2.13.0+cpu", "cuda": "", "unreachable": "it is a build for the CPU only", "gpus": []}
TRANSFORMERS = {"step": "transformers", "version": "5.17.0"}
PACKAGES = (Package("torch", ">=2.10", "2.13.0", "ok"), Package("transformers", "<6,>=5.16", "5.17.0", "ok"))


def plugin(name: str, *driven: Device, refusals: tuple[Refusal, ...] = (), quarantine: Refusal | None = None) -> Any:
    """What the worker answers of one plugin."""
    from dataclasses import asdict

    return {
        "name": name,
        "distribution": f"awq-rt-{name}",
        "version": "0.1.0",
        "priority": None if quarantine else 0,
        "kernels": [],
        "devices": [asdict(device) for device in driven],
        "refusals": [asdict(refusal) for refusal in refusals],
        "refusal": asdict(quarantine) if quarantine else None,
    }


REFERENCE = plugin("reference", HOST)


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The report on a made-up machine: its worker's answers, its GPUs, its packages."""

    def diagnose(
        *steps: dict[str, Any],
        plugins: tuple[Any, ...] | None = (REFERENCE,),
        nvidia: Probe = NO_NVIDIA,
        amd: Probe = NO_AMD,
        packages: tuple[Package, ...] = PACKAGES,
        ending: str = "",
        complaint: str = "",
    ) -> Report:
        answers = [*steps, {"step": "plugins", "plugins": list(plugins)}] if plugins is not None else [*steps]
        monkeypatch.setattr(diagnosis, "ask", lambda *_, **__: Outcome(tuple(answers), ending, complaint))
        monkeypatch.setattr(devices, "cpu", lambda: Probe((HOST,)))
        monkeypatch.setattr(devices, "nvidia", lambda: nvidia)
        monkeypatch.setattr(devices, "amd", lambda: amd)
        monkeypatch.setattr(diagnosis, "required_packages", lambda imported: packages)
        report = doctor.diagnose()
        for finding in report.findings:
            assert re.fullmatch(r"AWQ-[A-Z]+-\d{3}|[A-Z]+-\d{3}", finding.code)
            assert finding.reason
            assert finding.command
        assert [f.verdict for f in report.findings] == sorted((f.verdict for f in report.findings), reverse=True)
        json.dumps(report.to_json())
        return report

    return diagnose


def only(report: Report) -> Finding:
    """The one finding."""
    (finding,) = report.findings
    return finding


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_is_ready(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS)
    assert (report.verdict, report.findings) == (Verdict.READY, ())
    assert report.summary == "models run on the CPU (Some CPU) through backend 'reference'"


def test_a_gpu_with_its_backend_is_ready(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(plugin("fast", H100), REFERENCE), nvidia=Probe((H100,)))
    assert (report.verdict, report.findings) == (Verdict.READY, ())
    assert report.summary == "models run on cuda:0 NVIDIA H100 (sm_90, 80 GiB) through backend 'fast'"


def test_a_gpu_that_nothing_drives_is_degraded(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, nvidia=Probe((H100, H100)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-BACKEND-004")
    assert "NVIDIA H100 (sm_90, 80 GiB) and 1 more is not used" in finding.reason
    assert finding.command == "pip install 'awq-rt[cuda]'"
    assert report.summary == "models run on the CPU (Some CPU) through backend 'reference'"


def test_a_gpu_that_its_backend_refuses_is_degraded_with_the_backends_reason(diagnosed: Callable[..., Report]) -> None:
    refusal = Refusal("FAST-007", "no compiler was found", "pip install compiler")
    fast = plugin("fast", refusals=(refusal,))
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(fast, REFERENCE), nvidia=Probe((H100,)))
    assert report.verdict is Verdict.DEGRADED
    assert ("FAST-007", "pip install compiler") in [(finding.code, finding.command) for finding in report.findings]


def test_a_gpu_that_torch_does_not_reach_is_degraded_in_torchs_words(diagnosed: Callable[..., Report]) -> None:
    driven = (plugin("fast", H100), REFERENCE)
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=driven, nvidia=Probe((H100,)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-DEVICE-001")
    assert "torch 2.13.0+cpu does not reach it: it is a build for the CPU only" in finding.reason
    assert "through backend 'reference'" in report.summary

    old_driver = {**TORCH, "unreachable": "The NVIDIA driver on your system is too old", "gpus": []}
    finding = only(diagnosed(old_driver, TRANSFORMERS, plugins=driven, nvidia=Probe((H100,))))
    assert "driver on your system is too old" in finding.reason
    assert finding.command == "nvidia-smi"


def test_a_plugin_that_waits_for_a_torch_that_reaches_its_gpu_is_not_blamed(diagnosed: Callable[..., Report]) -> None:
    waiting = plugin("fast", quarantine=Refusal("AWQ-DEVICE-001", "torch does not reach a 'cuda' device", "install it"))
    for gpu in ({"nvidia": Probe((H100,))}, {"amd": Probe((MI300,))}):
        finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(REFERENCE, waiting), **gpu))
        assert (finding.code, finding.verdict) == ("AWQ-DEVICE-001", Verdict.DEGRADED)
        assert "torch 2.13.0+cpu does not reach it" in finding.reason
        assert "awq-rt-fast" not in finding.command


def test_an_amd_gpu_needs_a_plugin(diagnosed: Callable[..., Report]) -> None:
    finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, amd=Probe((MI300,))))
    assert finding.code == "AWQ-BACKEND-004"
    assert "no installed backend drives it" in finding.reason
    assert finding.command == "pip install 'awq-rt[rocm]'"


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        ("AWQ-CUDA-001", None),
        ("AWQ-CUDA-002", Verdict.DEGRADED),
        ("AWQ-CUDA-003", Verdict.READY),
        ("AWQ-ROCM-001", None),
        ("AWQ-ROCM-002", None),
        ("AWQ-ROCM-003", Verdict.READY),
        ("AWQ-ROCM-004", Verdict.DEGRADED),
    ],
)
def test_a_driver_that_fails_degrades_and_an_absent_one_does_not(
    diagnosed: Callable[..., Report], code: str, verdict: Verdict | None
) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, nvidia=Probe(refusals=(Refusal(code, "a reason", "a fix"),)))
    assert [(f.code, f.verdict) for f in report.findings] == ([] if verdict is None else [(code, verdict)])
    assert report.refusals[0].code == code


def test_a_quarantined_plugin_is_degraded_with_its_own_code(diagnosed: Callable[..., Report]) -> None:
    wrong = plugin("wrong", quarantine=Refusal("AWQ-BACKEND-013", "its self-test failed: 2 is not 3", "update it"))
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(REFERENCE, wrong))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-BACKEND-013")
    assert "'wrong' is quarantined: its self-test failed: 2 is not 3" in finding.reason
    assert finding.command == "pip install --upgrade --force-reinstall awq-rt-wrong"


def test_no_backend_is_unusable(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=())
    assert (report.verdict, only(report).code) == (Verdict.UNUSABLE, "AWQ-BACKEND-005")
    assert report.summary == "no backend could be loaded"
    broken = plugin("reference", quarantine=Refusal("AWQ-BACKEND-010", "loading it raised", "reinstall"))
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(broken,))
    assert [finding.code for finding in report.findings] == ["AWQ-BACKEND-005", "AWQ-BACKEND-010"]


def test_looking_for_backends_may_fail_too(diagnosed: Callable[..., Report]) -> None:
    error = {"step": "plugins", "error": "KeyError: 'x'", "missing": ""}
    report = diagnosed(CPU_TORCH, TRANSFORMERS, error, plugins=None)
    assert (report.verdict, only(report).code) == (Verdict.UNUSABLE, "AWQ-BACKEND-019")
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=None, ending="was killed by SIGSEGV", complaint="oh")
    assert only(report).reason == "looking for backends was killed by SIGSEGV: oh"


@pytest.mark.parametrize(
    ("package", "code", "verdict"),
    [
        (Package("torch", ">=2.10", "2.9.1", "unsupported"), "AWQ-TORCH-004", Verdict.UNUSABLE),
        (Package("transformers", "<6,>=5.16", "6.0", "unsupported"), "AWQ-PACKAGE-001", Verdict.DEGRADED),
        (Package("safetensors", ">=0.5", "", "missing"), "AWQ-PACKAGE-002", Verdict.UNUSABLE),
        (Package("awq-rt-reference", "==0.1.0", "", "missing"), "AWQ-PACKAGE-002", Verdict.DEGRADED),
    ],
)
def test_a_package_outside_the_supported_versions_is_found(
    diagnosed: Callable[..., Report], package: Package, code: str, verdict: Verdict
) -> None:
    finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, packages=(package,)))
    assert (finding.code, finding.verdict) == (code, verdict)
    assert finding.command == f"pip install '{package.name}{package.supported}'"


def test_a_source_tree_that_nobody_installed_is_said(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, packages=())
    assert (report.verdict, only(report).code) == (Verdict.READY, "AWQ-PACKAGE-003")


@pytest.mark.parametrize("step", ["torch", "transformers"])
def test_a_library_that_cannot_be_imported_is_unusable(diagnosed: Callable[..., Report], step: str) -> None:
    before = () if step == "torch" else (CPU_TORCH,)
    after = None if step == "torch" else (REFERENCE,)
    family = f"AWQ-{step.upper()}"

    raised = {"step": step, "error": "ImportError: libsomething.so", "missing": ""}
    finding = only(diagnosed(*before, raised, plugins=after))
    assert (finding.code, finding.verdict) == (f"{family}-002", Verdict.UNUSABLE)
    assert finding.reason == f"`import {step}` raised ImportError: libsomething.so"

    absent = {"step": step, "error": f"ModuleNotFoundError: No module named '{step}'", "missing": step}
    finding = only(diagnosed(*before, absent, plugins=after))
    assert (finding.code, finding.reason) == (f"{family}-001", f"{step} is not installed")

    finding = only(diagnosed(*before, plugins=None, ending="was killed by SIGILL", complaint="it printed nothing"))
    assert (finding.code, finding.verdict) == (f"{family}-003", Verdict.UNUSABLE)
    assert "the processor lacks an instruction" in finding.reason


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specifier", "version", "allowed"),
    [
        (">=2.10", "2.10.0", True),
        (">=2.10", "2.9.1", False),
        (">=2.10", "2.13.0+cpu", True),
        (">=2.10", "2.10.0a0+gitabc", True),
        ("<6,>=5.16", "5.23.0", True),
        ("<6,>=5.16", "6", False),
        ("<6,>=5.16", "5.15.9", False),
        ("==0.1.0", "0.1", True),
        ("==0.1.*", "0.1.7", True),
        ("==0.1.*", "0.2", False),
        ("!=1.5", "1.5.0", False),
        ("~=1.4", "1.9", True),
        ("~=1.4.2", "1.5", False),
        (">1,<=2", "2.0", True),
        ("", "anything", True),
        ("===weird", "1", True),
    ],
)
def test_versions_are_compared_by_their_numbers(specifier: str, version: str, allowed: bool) -> None:
    assert requirements.allows(specifier, version) is allowed


def test_required_packages_are_those_of_our_metadata_and_the_imported_version_counts() -> None:
    packages = {package.name: package for package in requirements.required_packages({"torch": "1.13.1"})}
    assert packages["torch"] == Package("torch", packages["torch"].supported, "1.13.1", "unsupported")
    assert {package.status for name, package in packages.items() if name != "torch"} == {"ok"}
    assert "pytest" not in packages  # extras are not required


# --- the command, on this machine ------------------------------------------------------------------------------------

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
    done = run("--json")
    found = json.loads(done.stdout)
    assert found["schema"] == "awq-rt.doctor/1"
    assert done.returncode == found["exit_code"] == Verdict[found["verdict"].upper()]
    assert done.returncode < 2, done.stdout
    assert done.stderr == "False\n"  # torch was imported elsewhere
    assert found["torch"]["version"]
    assert "reference" in [plugin["name"] for plugin in found["plugins"]]
    assert found["devices"][0]["type"] == "cpu"
    for finding in found["findings"]:
        assert set(finding) == {"code", "verdict", "reason", "command"}


def test_the_verdict_comes_first(diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = plugin("wrong", quarantine=Refusal("AWQ-BACKEND-013", "its self-test failed", "update it"))
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(REFERENCE, wrong))
    monkeypatch.setattr(doctor, "diagnose", lambda: report)
    result = CliRunner().invoke(cli, ["doctor"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0] == "DEGRADED: models run on the CPU (Some CPU) through backend 'reference'"
    assert lines[2].startswith("AWQ-BACKEND-013  backend 'wrong' is quarantined: its self-test failed")
    assert lines[3] == "  $ pip install --upgrade --force-reinstall awq-rt-wrong"
    for words in ("Some CPU", "nvidia-smi was not found", "quarantined [AWQ-BACKEND-013]", "2.13.0", "no NVIDIA GPU"):
        assert words in result.stdout


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
    done = run("--json", path=tmp_path)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert (found["verdict"], found["torch"]) == ("unusable", None)
    assert found["findings"][0]["code"] == code
    assert words in found["findings"][0]["reason"]
    assert found["summary"] == found["findings"][0]["reason"]
    assert found["devices"]
    assert found["packages"]


def test_a_torch_that_is_too_old_is_unusable(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '1.13.1'\n")
    done = run(path=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("UNUSABLE: torch 1.13.1 is installed; >=2.10 is needed\n\nAWQ-TORCH-004 ")


def test_other_commands_point_to_the_doctor_when_torch_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", RUN, "inspect", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "Error: libcudart.so.12: cannot open shared object file; `awq-rt doctor` says more" in done.stderr
    assert "Traceback" not in done.stderr


def test_variables_of_plugins_are_shown(diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_FAST_ISA", "plain")
    monkeypatch.setenv("UNRELATED", "1")
    environment = diagnosed(CPU_TORCH, TRANSFORMERS).environment
    assert environment["AWQ_RT_FAST_ISA"] == "plain"
    assert "UNRELATED" not in environment
