"""What the doctor says of machines that are made up, and of kernels that fail in every way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from plugins.folders import write_metadata, write_plugin

from awq_rt import devices, doctor
from awq_rt.devices import Device, Probe, Refusal
from awq_rt.doctor import Finding, Report, Request, Status, Verdict, facts, requirements
from awq_rt.doctor.facts import CacheState
from awq_rt.doctor.report import KernelRun, Memory, Model, Package
from awq_rt.doctor.rules import gpus
from awq_rt.examination import Outcome

SCHEMA = json.loads((Path(doctor.__file__).parent / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

HOST = Device("cpu", 0, "Some CPU", "cpu", "x86_64", 2**34)
H100 = Device("cuda", 0, "NVIDIA H100", "nvidia", "sm_90", 80 * 2**30, 32, "580.82")
MI300 = Device("cuda", 0, "AMD Instinct MI300X", "amd", "gfx942", 192 * 2**30, 64, "6.7")
RX7900 = Device("cuda", 0, "AMD Radeon RX 7900 XTX", "amd", "gfx1100", 24 * 2**30, 32, "6.7")
NO_NVIDIA = Probe(refusals=(Refusal("AWQ-CUDA-001", "nvidia-smi was not found", "install its driver"),))
NO_AMD = Probe(refusals=(Refusal("AWQ-ROCM-001", "no topology exists", "install its driver"),))
GOOD_CACHE = CacheState(Path("/somewhere/cache"), "", "")

TORCH = {
    "step": "torch",
    "version": "2.13.0",
    "cuda": "12.8",
    "hip": "",
    "path": "/somewhere/torch/__init__.py",
    "threads": 2,
    "unreachable": "",
    "arches": ["sm_80", "sm_90", "compute_90"],
    "gpus": ["NVIDIA H100"],
}
CPU_TORCH = {**TORCH, "version": "2.13.0+cpu", "cuda": "", "unreachable": "it is a build for the CPU only", "gpus": [],
             "arches": []}  # fmt: skip
ROCM_TORCH = {**TORCH, "version": "2.13.0+rocm6.4", "cuda": "", "hip": "6.4", "arches": ["gfx90a", "gfx942", "gfx1100"]}
TRANSFORMERS = {"step": "transformers", "version": "5.17.0"}
PACKAGES = (Package("torch", ">=2.10", "2.13.0", "ok"), Package("transformers", "<6,>=5.16", "5.17.0", "ok"))


def plugin(
    name: str,
    *driven: Device,
    refusals: tuple[Refusal, ...] = (),
    quarantine: Refusal | None = None,
    kernels: tuple[str, ...] = (),
    priority: int = 0,
) -> Any:
    """What the worker answers of one plugin."""
    return {
        "name": name,
        "distribution": f"awq-rt-{name}",
        "version": "0.1.0",
        "priority": None if quarantine else priority,
        "kernels": list(kernels),
        "devices": [asdict(device) for device in driven],
        "refusals": [asdict(refusal) for refusal in refusals],
        "refusal": asdict(quarantine) if quarantine else None,
        "tools": [{"name": "NVRTC", "version": "13.0", "path": "/usr/lib/libnvrtc.so"}] if driven else [],
    }


REFERENCE = plugin("reference", HOST, kernels=("torch",))
CUDA = plugin("cuda", H100, kernels=("gemv", "gemm", "exllama"), priority=100)
ROCM = plugin("rocm", MI300, kernels=("gemv", "gemm"), priority=90)


def offers(*plugins: Any) -> dict[str, Any]:
    """What the worker answers of what `plugins` serve: every family and dtype on each of their devices."""
    found = []
    for number, state in enumerate(plugins):
        for device in (Device(**fields) for fields in state["devices"]):
            for kernel in ("auto", *state["kernels"]):
                for dtype in ("float16", "bfloat16"):
                    status = "selected" if kernel == "auto" and not number else "available"
                    offer = {"device": facts.place(device), "backend": state["name"], "kernel": kernel, "dtype": dtype}
                    found.append({**offer, "layouts": ["gemm"], "status": status, "code": "", "reason": ""})
    return {"step": "selection", "offers": found}


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """The report on a made-up machine: its workers' answers, its GPUs, its packages."""
    for name in ("CUDA_LAUNCH_BLOCKING", "HSA_OVERRIDE_GFX_VERSION"):
        monkeypatch.delenv(name, raising=False)

    def diagnose(
        *steps: dict[str, Any],
        plugins: tuple[Any, ...] | None = (REFERENCE,),
        nvidia: Probe = NO_NVIDIA,
        amd: Probe = NO_AMD,
        packages: tuple[Package, ...] = PACKAGES,
        twice: dict[str, tuple[str, ...]] | None = None,
        ending: str = "",
        complaint: str = "",
        cache: CacheState = GOOD_CACHE,
        kernels: tuple[KernelRun, ...] = (),
        model: Any = (None, None),
        strict: bool = False,
    ) -> Report:
        answers = [*steps]
        if plugins is not None:
            answers += [{"step": "plugins", "plugins": list(plugins)}, offers(*plugins)]
        of_transformers = tuple(step for step in answers if step["step"] == "transformers")
        others = tuple(step for step in answers if step["step"] != "transformers")
        importer = SimpleNamespace(outcome=lambda limit_s: Outcome(of_transformers, ending, complaint))
        monkeypatch.setattr(facts, "Worker", lambda module, *arguments: importer)
        monkeypatch.setattr(facts, "ask", lambda *_, **__: Outcome(others, ending, complaint))
        monkeypatch.setattr(devices, "cpu", lambda: Probe((HOST,)))
        monkeypatch.setattr(devices, "nvidia", lambda: nvidia)
        monkeypatch.setattr(devices, "amd", lambda: amd)
        monkeypatch.setattr(facts, "required_packages", lambda imported: packages)
        monkeypatch.setattr(facts, "installed_twice", lambda names: twice or {})
        monkeypatch.setattr(facts, "cache_state", lambda folder: cache)
        monkeypatch.setattr(facts, "run_kernels", lambda jobs, limit_s, runner: kernels)
        monkeypatch.setattr(facts, "_model", lambda request: model)
        asked = Request(run=bool(kernels), model=None if model == (None, None) else "some/model")
        report = doctor.diagnose(asked, strict=strict)
        assert [f.verdict for f in report.findings] == sorted((f.verdict for f in report.findings), reverse=True)
        assert [check.name for check in report.checks] == [check.name for check in doctor.CHECKS]
        for finding in report.findings:
            assert finding.reason
            assert finding.command
            if finding.code.startswith("AWQ-"):
                assert finding.cause
                assert finding.page
        for check, made in zip(doctor.CHECKS, report.checks, strict=True):
            allowed = {finding.code for finding in made.findings if finding.code.startswith("AWQ-")}
            assert allowed <= set(check.codes), check.name
        valid(report.to_json())
        return report

    return diagnose


def valid(answer: Any) -> None:
    """`answer` is as the schema says, and the schema names all that is in it."""
    VALIDATOR.validate(json.loads(json.dumps(answer, allow_nan=False)))
    described(answer, SCHEMA["$defs"]["bug" if answer["verdict"] == "bug" else "report"])


def described(value: Any, schema: dict[str, Any]) -> None:
    """Every key of `value` stands in `schema`."""
    if "anyOf" in schema:
        if value is None:
            return
        (schema,) = [option for option in schema["anyOf"] if option.get("type") != "null"]
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if isinstance(value, dict) and "properties" in schema:
        assert set(value) == set(schema["properties"])
        for key, part in value.items():
            described(part, schema["properties"][key])
    elif isinstance(value, (list, tuple)) and "items" in schema:
        for part in value:
            described(part, schema["items"])


def only(report: Report) -> Finding:
    """The one finding."""
    (finding,) = report.findings
    return finding


def found(report: Report) -> list[str]:
    """The findings' codes."""
    return [finding.code for finding in report.findings]


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_a_machine_without_a_gpu_is_ready(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS)
    assert (report.verdict, report.findings) == (Verdict.READY, ())
    assert report.summary == "CPU Some CPU, x86_64, torch, fp16/bf16, backend reference"


def test_a_gpu_with_its_backend_is_ready(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)))
    assert (report.verdict, report.findings) == (Verdict.READY, ())
    assert report.summary == "NVIDIA H100, sm_90, gemv/gemm/exllama, fp16/bf16, backend cuda"
    states = {check.name: check for check in report.checks}
    assert "waves of 32" in states["gpus"].says
    assert states["compiler"].says.startswith("NVRTC 13.0 in /usr/lib/libnvrtc.so")
    assert "sm_80, sm_90, compute_90" in states["torch"].says
    assert states["selection"].says == "cuda:0: cuda for fp16/bf16"
    assert (states["kernels"].status, states["kernels"].says) == (Status.SKIPPED, "no kernel was run")


def test_several_gpus_are_counted(diagnosed: Callable[..., Report]) -> None:
    second = replace(H100, index=1)
    both = plugin("cuda", H100, second, kernels=("gemv",), priority=100)
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(both, REFERENCE), nvidia=Probe((H100, second)))
    assert report.summary == "2 x NVIDIA H100, sm_90, gemv, fp16/bf16, backend cuda"


def test_a_gpu_that_nothing_drives_is_degraded(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, nvidia=Probe((H100, H100)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-BACKEND-004")
    assert "NVIDIA H100 (sm_90, 80 GiB) and 1 more is not used" in finding.reason
    assert finding.command == "pip install 'awq-rt[cuda]'"
    assert report.summary.startswith("CPU Some CPU")


def test_a_gpu_that_a_strangers_backend_refuses_is_degraded_with_its_reason(diagnosed: Callable[..., Report]) -> None:
    refusal = Refusal("FAST-007", "no compiler was found", "pip install compiler")
    fast = plugin("fast", refusals=(refusal,))
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(fast, REFERENCE), nvidia=Probe((H100,)))
    finding = only(report)
    assert (finding.code, finding.verdict) == ("FAST-007", Verdict.DEGRADED)
    assert (finding.command, finding.cause, finding.page) == ("pip install compiler", "", "")


def test_a_gpu_that_torch_does_not_reach_is_degraded_in_torchs_words(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-DEVICE-001")
    assert "torch 2.13.0+cpu does not reach it: it is a build for the CPU only" in finding.reason
    assert report.summary.endswith("backend reference")


def test_a_plugin_that_waits_for_a_torch_that_reaches_its_gpu_is_not_blamed(diagnosed: Callable[..., Report]) -> None:
    waiting = plugin("fast", quarantine=Refusal("AWQ-DEVICE-001", "torch does not reach a 'cuda' device", "install it"))
    for gpu in ({"nvidia": Probe((H100,))}, {"amd": Probe((MI300,))}):
        finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(REFERENCE, waiting), **gpu))
        assert (finding.code, finding.verdict) == ("AWQ-DEVICE-001", Verdict.DEGRADED)
        assert "torch 2.13.0+cpu does not reach it" in finding.reason
        assert "awq-rt-fast" not in finding.command


def test_strict_lets_no_finding_pass(diagnosed: Callable[..., Report]) -> None:
    hidden = Probe(refusals=(Refusal("AWQ-CUDA-003", "no NVIDIA GPU is visible", "look at CUDA_VISIBLE_DEVICES"),))
    assert diagnosed(CPU_TORCH, TRANSFORMERS, nvidia=hidden).verdict is Verdict.READY
    assert diagnosed(CPU_TORCH, TRANSFORMERS, nvidia=hidden, strict=True).verdict is Verdict.DEGRADED
    assert diagnosed(CPU_TORCH, TRANSFORMERS, strict=True).verdict is Verdict.READY


# --- machines --------------------------------------------------------------------------------------------------------


def test_an_old_driver(diagnosed: Callable[..., Report]) -> None:
    old = replace(H100, driver="470.161.03")
    unreachable = {**TORCH, "unreachable": "The NVIDIA driver on your system is too old (found version 11040)."}
    report = diagnosed(unreachable, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((old,)))
    assert (report.verdict, found(report)) == (Verdict.DEGRADED, ["AWQ-CUDA-004", "AWQ-DEVICE-001"])
    assert report.findings[0].reason == (
        "the NVIDIA driver is 470.161.03; torch 2.13.0 is built for CUDA 12.8, which needs 525.60 or later"
    )
    assert "driver on your system is too old" in report.findings[1].reason
    assert report.findings[1].command == "nvidia-smi"
    assert report.summary.endswith("backend reference")


@pytest.mark.parametrize(
    ("driver", "cuda", "old"),
    [("525.60.13", "12.8", False), ("525.59", "12.0", True), ("575.57", "13.0", True), ("580.65.06", "13.0", False),
     ("", "13.0", False), ("450.80", "11.8", False), ("400.1", "99.0", False)],
)  # fmt: skip
def test_which_driver_serves_which_cuda(diagnosed: Callable[..., Report], driver: str, cuda: str, old: bool) -> None:
    gpu = replace(H100, driver=driver)
    report = diagnosed({**TORCH, "cuda": cuda}, TRANSFORMERS, plugins=(CUDA,), nvidia=Probe((gpu,)))
    assert ("AWQ-CUDA-004" in found(report)) == old


def test_sm75_runs_on_the_reference(diagnosed: Callable[..., Report]) -> None:
    t4 = Device("cuda", 0, "Tesla T4", "nvidia", "sm_75", 16 * 2**30, 32, "580.82")
    refusal = Refusal("AWQ-CUDA-011", f"{t4} has compute capability 7.5; 8.0 or later is needed", "use the reference")
    torch = {**TORCH, "arches": ["sm_75", "sm_80"]}
    cuda = plugin("cuda", refusals=(refusal,), kernels=("gemv",), priority=100)
    report = diagnosed(torch, TRANSFORMERS, plugins=(cuda, REFERENCE), nvidia=Probe((t4,)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-CUDA-011")
    assert "compute capability 7.5" in finding.reason
    assert "--backend reference" in finding.command


def test_sm120_with_an_old_nvrtc_and_an_old_torch(diagnosed: Callable[..., Report]) -> None:
    rtx = Device("cuda", 0, "NVIDIA GeForce RTX 5090", "nvidia", "sm_120", 32 * 2**30, 32, "580.82")
    refusal = Refusal("AWQ-CUDA-015", "nvrtc 12.4 cannot compile for sm_120; it knows sm_80, sm_90", "update it")
    cuda = plugin("cuda", refusals=(refusal,), kernels=("gemv",), priority=100)
    report = diagnosed({**TORCH, "arches": ["sm_80", "sm_90"]}, TRANSFORMERS, plugins=(cuda, REFERENCE),
                       nvidia=Probe((rtx,)))  # fmt: skip
    assert (report.verdict, found(report)) == (Verdict.DEGRADED, ["AWQ-TORCH-005", "AWQ-CUDA-015"])
    assert "it was compiled for sm_80, sm_90" in report.findings[0].reason
    assert "nvrtc 12.4 cannot compile for sm_120" in report.findings[1].reason
    new = {**TORCH, "arches": ["sm_90", "sm_120"]}
    finding = only(diagnosed(new, TRANSFORMERS, plugins=(cuda, REFERENCE), nvidia=Probe((rtx,))))
    assert (finding.code, finding.command) == ("AWQ-CUDA-015", "pip install --upgrade 'awq-rt-cuda[cu13]'")


def test_an_mi300x_with_its_torch_and_its_backend(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(ROCM_TORCH, TRANSFORMERS, plugins=(ROCM, REFERENCE), amd=Probe((MI300,)))
    assert (report.verdict, report.findings) == (Verdict.READY, ())
    assert report.summary == "AMD Instinct MI300X, gfx942, gemv/gemm, fp16/bf16, backend rocm"
    assert "waves of 64" in {check.name: check.says for check in report.checks}["gpus"]


def test_a_7900xtx_beside_a_torch_for_cuda(diagnosed: Callable[..., Report]) -> None:
    refusal = Refusal("AWQ-ROCM-014", "torch 2.13.0 is built for CUDA 12.8, not for ROCm", "install torch for ROCm")
    rocm = plugin("rocm", refusals=(refusal,), priority=90)
    torch = {**TORCH, "unreachable": "Found no NVIDIA driver on your system.", "gpus": []}
    report = diagnosed(torch, TRANSFORMERS, plugins=(rocm, REFERENCE), amd=Probe((RX7900,)))
    finding = only(report)
    assert (report.verdict, finding.code) == (Verdict.DEGRADED, "AWQ-DEVICE-001")
    assert "RX 7900 XTX" in finding.reason
    assert "pytorch.org" in finding.command
    beside = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, rocm, REFERENCE), nvidia=Probe((H100,)),
                       amd=Probe((RX7900,)))  # fmt: skip
    assert found(beside) == ["AWQ-DEVICE-001"]
    assert "built for the other vendor" in only(beside).reason
    assert beside.summary.startswith("NVIDIA H100")


def test_an_amd_gpu_needs_a_plugin(diagnosed: Callable[..., Report]) -> None:
    finding = only(diagnosed(ROCM_TORCH, TRANSFORMERS, amd=Probe((MI300,))))
    assert finding.code == "AWQ-BACKEND-004"
    assert finding.command == "pip install 'awq-rt[rocm]'"


def test_a_gpu_disguised_by_a_variable(diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = Refusal("AWQ-ROCM-019", "HSA_OVERRIDE_GFX_VERSION is 11.0.0, and the GPU is gfx942", "unset it")
    rocm = plugin("rocm", refusals=(refusal,), priority=90)

    def diagnose() -> Report:
        monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "11.0.0")
        return diagnosed(ROCM_TORCH, TRANSFORMERS, plugins=(rocm, REFERENCE), amd=Probe((MI300,)))

    report = diagnose()
    assert only(report).command == "unset HSA_OVERRIDE_GFX_VERSION"
    assert "HSA_OVERRIDE_GFX_VERSION=11.0.0" in {check.name: check.says for check in report.checks}["gpus"]
    assert report.environment["HSA_OVERRIDE_GFX_VERSION"] == "11.0.0"


def test_a_variable_that_makes_the_gpu_slow(diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMD_SERIALIZE_KERNEL", "3")
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)))
    assert (only(report).code, only(report).command) == ("AWQ-ENV-001", "unset AMD_SERIALIZE_KERNEL")
    assert diagnosed(CPU_TORCH, TRANSFORMERS).findings == ()


@pytest.mark.parametrize(
    ("arch", "compiled", "runs"),
    [("sm_90", ["sm_80", "sm_90"], True), ("sm_86", ["sm_80"], True), ("sm_80", ["sm_86"], False),
     ("sm_120", ["sm_90"], False), ("sm_120", ["sm_90", "compute_90"], True), ("sm_90", ["sm_90a"], True),
     ("sm_89", ["compute_90"], False), ("sm_120", ["sm_100"], False), ("sm_121", ["sm_120"], True),
     ("gfx942", ["gfx90a", "gfx942:sramecc+"], True), ("gfx1100", ["gfx942"], False),
     ("unknown", ["sm_90"], True)],
)  # fmt: skip
def test_which_compiled_code_runs_on_which_gpu(arch: str, compiled: list[str], runs: bool) -> None:
    assert gpus.runs_on(arch, compiled) is runs


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


def test_a_backend_that_its_settings_stop_is_degraded(diagnosed: Callable[..., Report]) -> None:
    stopped = plugin("cpu", refusals=(Refusal("AWQ-CPU-001", "there is no 'avx1024'", "unset it"),))
    finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(stopped, REFERENCE)))
    assert (finding.code, finding.command) == ("AWQ-CPU-001", "unset AWQ_RT_CPU_ISA")


def test_no_backend_is_unusable(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=())
    assert (report.verdict, only(report).code) == (Verdict.UNUSABLE, "AWQ-BACKEND-005")
    assert report.summary == "no backend could be loaded"
    broken = plugin("reference", quarantine=Refusal("AWQ-BACKEND-010", "loading it raised", "reinstall"))
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=(broken,))
    assert found(report) == ["AWQ-BACKEND-005", "AWQ-BACKEND-010"]


def test_looking_for_backends_may_fail_too(diagnosed: Callable[..., Report]) -> None:
    error = {"step": "plugins", "error": "KeyError: 'x'", "missing": ""}
    report = diagnosed(CPU_TORCH, TRANSFORMERS, error, plugins=None)
    assert (report.verdict, only(report).code) == (Verdict.UNUSABLE, "AWQ-BACKEND-019")
    report = diagnosed(CPU_TORCH, TRANSFORMERS, plugins=None, ending="was killed by SIGSEGV", complaint="oh")
    assert only(report).reason == "looking for backends was killed by SIGSEGV: oh"
    loaded = {"step": "plugins", "plugins": [REFERENCE]}
    report = diagnosed(CPU_TORCH, TRANSFORMERS, loaded, plugins=None, ending="did not end in 3 s", complaint="oh")
    assert only(report).reason == "asking backends what they serve did not end in 3 s: oh"


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


def test_two_versions_of_a_plugin_are_named_with_their_folders(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, twice={"awq-rt-cuda": ("0.2.0 in /a", "0.1.0 in /b")})
    assert (report.verdict, only(report).code) == (Verdict.DEGRADED, "AWQ-PACKAGE-004")
    assert "awq-rt-cuda is installed in several versions: 0.2.0 in /a, 0.1.0 in /b; the first" in only(report).reason
    assert only(report).command == "pip uninstall --yes awq-rt-cuda && pip install awq-rt-cuda"


def test_versions_that_are_left_behind_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, versions in ((first, ("1.0",)), (second, ("1.0", "2.0"))):
        folder.mkdir()
        for version in versions:
            write_metadata(folder, "some-plugin", version, {})
        write_metadata(folder, "once-only", "1.0", {})
        monkeypatch.syspath_prepend(folder)
    monkeypatch.syspath_prepend(first)
    found = requirements.installed_twice(["some-plugin", "once-only", "torch", "not-there"])
    assert found == {"some-plugin": (f"1.0 in {first}", f"2.0 in {second}")}


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

    finding = only(diagnosed(*before, plugins=after, ending="was killed by SIGILL", complaint="it printed nothing"))
    assert (finding.code, finding.verdict) == (f"{family}-003", Verdict.UNUSABLE)
    assert "the processor lacks an instruction" in finding.reason


# --- the cache -------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written_is_degraded(diagnosed: Callable[..., Report], tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    state = facts.cache_state(blocked / "cache")
    assert "no folder that can be written" in state.unwritable
    finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, cache=state))
    assert (finding.code, finding.verdict) == ("AWQ-CACHE-001", Verdict.DEGRADED)


def test_a_read_only_cache_is_degraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")  # which no permission of a folder makes for the superuser

    monkeypatch.setattr(facts.tempfile, "TemporaryFile", refuse)
    assert "Read-only file system" in facts.cache_state(tmp_path).unwritable


@pytest.mark.parametrize(("mode", "words"), [(0o700, ""), (0o755, ""), (0o775, "its group"), (0o777, "everybody")])
def test_a_cache_that_others_may_write_is_degraded(
    diagnosed: Callable[..., Report], tmp_path: Path, mode: int, words: str
) -> None:
    tmp_path.chmod(mode)
    state = facts.cache_state(tmp_path)
    assert state.unwritable == ""
    assert words in state.exposed
    assert bool(state.exposed) == bool(words)
    assert ("AWQ-CACHE-002" in found(diagnosed(CPU_TORCH, TRANSFORMERS, cache=state))) == bool(words)


def test_a_cache_of_another_user_is_degraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert "belongs to user" in facts.cache_state(tmp_path).exposed


def test_a_cache_that_does_not_exist_yet_is_fine_and_is_not_made(tmp_path: Path) -> None:
    assert facts.cache_state(tmp_path / "not" / "yet") == CacheState(tmp_path / "not" / "yet", "", "")
    assert not any(tmp_path.iterdir())


# --- kernels that are run --------------------------------------------------------------------------------------------


def ran(status: str = "right", backend: str = "cuda", kernel: str = "auto", **more: Any) -> KernelRun:
    device = "cpu" if backend == "reference" else "cuda:0"
    return KernelRun(device, backend, kernel, "float16", status, **more)


def test_right_kernels_are_named_in_the_verdict(diagnosed: Callable[..., Report]) -> None:
    kernels = (ran(), ran(kernel="gemv", excess=0.4, latency_us=17.5, bandwidth_share=0.8, shape=(4096, 22016)))
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)), kernels=kernels)
    assert report.summary == "NVIDIA H100, sm_90, gemv, fp16, backend cuda"
    assert {check.name: check.says for check in report.checks}["kernels"] == "2 of 2 agree with the reference"


@pytest.mark.parametrize(
    ("status", "code"),
    [("wrong", "AWQ-KERNEL-001"), ("hung", "AWQ-KERNEL-002"), ("not finite", "AWQ-KERNEL-003"),
     ("died", "AWQ-KERNEL-004"), ("raised", "AWQ-KERNEL-005")],
)  # fmt: skip
def test_a_kernel_that_fails_is_degraded_and_the_next_backend_is_named(
    diagnosed: Callable[..., Report], status: str, code: str
) -> None:
    kernels = (
        ran(status, reason="what it did"),
        ran(status, kernel="gemv", reason="this too"),
        ran(backend="reference"),
    )
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)), kernels=kernels)
    finding = only(report)
    assert (finding.code, finding.verdict) == (code, Verdict.DEGRADED)
    assert finding.reason.startswith("backend 'cuda' on cuda:0, auto fp16, gemv fp16: what it did")
    assert report.summary.endswith("backend reference")


def test_where_every_kernel_fails_nothing_is_usable(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, kernels=(ran("wrong", backend="reference", reason="all is wrong"),))
    assert (report.verdict, found(report)) == (Verdict.UNUSABLE, ["AWQ-KERNEL-006", "AWQ-KERNEL-001"])


def test_settings_that_may_explain_a_wrong_kernel_are_named(
    diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWQ_RT_CPU_INT8", "1")
    report = diagnosed(CPU_TORCH, TRANSFORMERS, kernels=(ran("wrong", reason="far off"), ran(backend="reference")))
    assert "far off; AWQ_RT_CPU_INT8=1 is set" in only(report).reason


STRANGE = """
import os, signal, time
from awq_rt_reference import ReferenceBackend

class backend(ReferenceBackend):
    name = "strange"
    priority = 50
    kernels = ("hangs", "dies", "wrong", "nan", "raises")
    def supports(self, spec, device):
        return None if spec.dtype.itemsize == 4 else super().supports(spec, device)
    def pack(self, weight, spec, device):
        packed = super().pack(weight, spec, device)
        return type(packed)(spec.kernel, packed.tensors)
    def linear(self, x, packed):
        y = super().linear(x, type(packed)("rows", packed.tensors))
        if packed.layout == "hangs":
            time.sleep(600)
        if packed.layout == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if packed.layout == "raises":
            raise RuntimeError("no luck")
        return {"wrong": y * 1.01, "nan": y / 0}.get(packed.layout, y)

backend = backend()
"""


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A plugin whose families fail in all the ways that there are."""
    write_plugin(tmp_path, "strange", STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    return


def jobs_of(*kernels: str) -> list[dict[str, Any]]:
    """What the worker is asked to run of the strange plugin."""
    common = {"backend": "strange", "device": asdict(HOST), "dtype": "float32"}
    return [{"index": index, "kernel": kernel, **common} for index, kernel in enumerate(kernels)]


@pytest.mark.usefixtures("strange")
def test_kernels_that_die_or_are_wrong_are_results_and_the_others_go_on() -> None:
    runs = facts.run_kernels(jobs_of("wrong", "dies", "auto", "nan", "raises"), limit_s=200)
    assert [run.status for run in runs] == ["wrong", "died", "right", "not finite", "raised"]
    wrong, died, right, nan, raised = runs
    assert right.excess is not None
    assert right.excess <= 1
    assert right.latency_us is not None
    assert right.latency_us > 0
    assert right.bandwidth_share is not None
    assert right.shape == (2048, 2048)
    assert wrong.excess is not None
    assert wrong.excess > 1
    assert "times the bound" in wrong.reason
    assert "SIGSEGV" in died.reason
    assert nan.reason == "its result holds NaN or infinity"
    assert raised.reason.startswith("RuntimeError: no luck (in linear, plugin_strange.py:")


@pytest.mark.usefixtures("strange")
def test_a_backend_whose_kernels_hang_is_given_up_after_two() -> None:
    runs = facts.run_kernels(jobs_of("hangs", "hangs", "hangs"), limit_s=2)
    assert [run.status for run in runs] == ["hung", "hung", "not run"]
    assert runs[0].reason.startswith("its process did not end in 2 s")


def test_a_first_call_that_is_slow_does_not_leave_weights_that_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from awq_rt.backend import Packed
    from awq_rt.doctor import kernels

    now, seen = [0.0], set()

    def linear(x: Any, packed: Packed) -> Any:
        now[0] += 1e-4 if seen else 1.0
        seen.add(id(packed))
        return x

    monkeypatch.setattr(kernels, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(kernels, "COLD_BYTES", 64 << 10)
    packed = Packed("", (torch.zeros(1 << 10, dtype=torch.uint8),))
    seconds = kernels._latency_s(SimpleNamespace(linear=linear), packed, torch.float32, 8, torch.device("cpu"))  # type: ignore[arg-type]
    assert len(seen) == 64
    assert seconds == pytest.approx(1e-4)


# --- a model ---------------------------------------------------------------------------------------------------------

MEMORY = Memory("cuda:0", 4 * 2**30, 2**30, 4096, 2**28, 2**29, 70 * 2**30)
MODEL = Model("some/model", "LlamaForCausalLM", "gemm", (128,), 224, 4 * 2**30, (("cuda", 224),), (), MEMORY,
              (1, 2, 4), "", (), False, (), ())  # fmt: skip


def test_a_model_that_runs_here(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(TORCH, TRANSFORMERS, plugins=(CUDA, REFERENCE), nvidia=Probe((H100,)), model=(MODEL, None))
    assert report.findings == ()
    says = {check.name: check.says for check in report.checks}["model"]
    assert "LlamaForCausalLM, layout gemm, group size 128, 224 linears; needs 5.75 GiB on cuda:0" in says
    assert report.to_json()["model"]["memory"]["peak"] == 5.75 * 2**30


@pytest.mark.parametrize(
    ("change", "code", "verdict"),
    [
        ({"memory": replace(MEMORY, available=5 * 2**30)}, "AWQ-MODEL-001", Verdict.UNUSABLE),
        ({"unsupported": (("model.layers.0.q_proj", "cuda: no"),)}, "AWQ-MODEL-002", Verdict.DEGRADED),
        ({"pickles": ("model.pt",)}, "AWQ-MODEL-003", Verdict.READY),
        ({"remote_code": ("modeling.X",), "needs_remote_code": True}, "AWQ-CKPT-014", Verdict.DEGRADED),
    ],
)
def test_what_is_wrong_with_a_model(
    diagnosed: Callable[..., Report], change: dict[str, Any], code: str, verdict: Verdict
) -> None:
    finding = only(diagnosed(CPU_TORCH, TRANSFORMERS, model=(replace(MODEL, **change), None)))
    assert (finding.code, finding.verdict) == (code, verdict)
    assert "some/model" in finding.command


def test_a_model_that_cannot_be_opened_is_unusable_with_its_own_code(diagnosed: Callable[..., Report]) -> None:
    report = diagnosed(CPU_TORCH, TRANSFORMERS, model=(None, ("AWQ-CKPT-004", "model.safetensors is empty")))
    assert (report.verdict, only(report).code) == (Verdict.UNUSABLE, "AWQ-CKPT-004")
    assert report.summary == "model.safetensors is empty"
    assert report.checks[-1].says == "some/model was not read"


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


def test_variables_of_plugins_are_shown(diagnosed: Callable[..., Report], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_FAST_ISA", "plain")
    monkeypatch.setenv("UNRELATED", "1")
    environment = diagnosed(CPU_TORCH, TRANSFORMERS).environment
    assert environment["AWQ_RT_FAST_ISA"] == "plain"
    assert "UNRELATED" not in environment
