"""The host side: what it refuses and why, how it compiles, and how it calls HIP, on a fake runtime under hip-python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from amdsim.toolchain import Clang

pytest.importorskip("awq_rt_rocm", reason="awq-rt-rocm is not installed")
import fake_hip
import simulated
from awq_rt_rocm import backend, driver, hiprtc, libraries, requirements, selection, targets, tiled
from awq_rt_rocm import device as gpu
from simulated import Machine, SimulatedBackend

from awq_rt import devices
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device, Probe
from awq_rt.errors import UnsupportedDevice
from awq_rt.packing import Kind
from awq_rt.rtc import CompileFailed, Program
from awq_rt.testing import excess, hurtful_cases, hurtful_weight
from awq_rt.testing.conformance import spec_of

CPU = torch.device("cpu")
MI300X = Device("cuda", 0, "AMD Instinct MI300X", "amd", "gfx942", 192 << 30, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_hurtful_weight_comes_back_exactly(dtype: torch.dtype) -> None:
    for case in hurtful_cases(dtype):
        packed = backend.pack(case.weight, spec_of(case.weight, dtype), CPU)
        assert packed.layout.startswith("tiles"), case.name
        assert backend.unpack(packed).equal(case.weight), case.name


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((96, 24, 96), "tiles"),  # one group, rounded up with the column
        ((192, 24, 96), "tiles"),
        ((160, 17, 8), "tiles"),  # no multiple of a tile, an odd number of columns
        ((60, 8, 20), "rows"),
        ((30, 5, 30), "rows"),
    ],
)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_awkward_shapes_come_back_exactly(shape: tuple[int, int, int], layout: str, scale_dtype: torch.dtype) -> None:
    weight = hurtful_weight("random", *shape, scale_dtype=scale_dtype, bias=True)
    packed = backend.pack(weight, spec_of(weight, torch.float16), CPU)
    assert packed.layout.split()[0] == layout
    assert backend.unpack(packed).equal(weight)
    assert all(tensor.is_contiguous() for tensor in packed.tensors)


def test_codes_lie_where_the_kernels_look_for_them() -> None:
    """The drawing at the head of kernels/tile.h, read literally."""
    weight = hurtful_weight("random", 256, 48, 32)
    packed = backend.pack(weight, spec_of(weight, torch.float16), CPU)
    words = packed.tensors[0].flatten().view(torch.int32)
    for strip, tile, quarter, column, word in [(0, 0, 0, 0, 0), (2, 1, 3, 15, 2), (1, 0, 2, 7, 3)]:
        found = int(words[(((strip * 2 + tile) * 4 + quarter) * 16 + column) * 4 + word])
        for i in range(8):
            k = 128 * tile + 32 * word + 8 * quarter + i
            assert found >> (4 * (i // 2) + 16 * (i % 2)) & 15 == int(weight.codes[k, 16 * strip + column])
    constants = packed.tensors[1][2, 5, 9].tolist()  # strip 2, group 5, column 9: column 41
    assert constants[2:] == [int(weight.zeros[5, 41]), int(weight.zeros[5, 41]) << 4]
    assert torch.tensor(constants[:2], dtype=torch.uint8).view(torch.float16).item() == weight.scales[5, 41].item()


@pytest.mark.parametrize(
    ("spec", "device", "code"),
    [
        (LinearSpec(64, 64, 64, torch.float32), MI300X, "AWQ-ROCM-012"),
        (LinearSpec(60, 64, 20, torch.float16, kernel="gemv"), MI300X, "AWQ-ROCM-013"),
        (LinearSpec(64, 64, 20, torch.float16, kernel="gemm"), MI300X, "AWQ-ROCM-013"),
        (LinearSpec(64, 64, 64, torch.float16), Device("cuda", 0, "H100", "nvidia", "sm_90", 0), "AWQ-ROCM-010"),
        (LinearSpec(64, 64, 64, torch.float16), Device("cuda", 0, "Vega 64", "amd", "gfx900", 0, 64), "AWQ-ROCM-011"),
        (LinearSpec(64, 64, 64, torch.float16), Device("cuda", 0, "odd", "amd", "gfx942", 0, 32), "AWQ-ROCM-015"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_code(spec: LinearSpec, device: Device, code: str) -> None:
    refusal = backend.supports(spec, device)
    assert refusal is not None
    assert (refusal.code, bool(refusal.reason), bool(refusal.fix)) == (code, True, True)
    assert backend.supports(LinearSpec(64, 64, 64, torch.float16), MI300X) is None


@pytest.mark.parametrize(
    ("name", "matrix"),
    [
        ("gfx90a:sramecc+:xnack-", "mfma"),
        ("gfx1101", "wmma repeated"),
        ("gfx1151", ""),  # of RDNA3's family, but its matrix unit has not been looked at
        ("gfx1036", ""),
        ("gfx1200", "wmma split"),
    ],
)
def test_an_architecture_is_known_by_its_exact_name(name: str, matrix: str) -> None:
    found = targets.architecture(name)
    assert found is not None
    assert (found.name, found.matrix) == (name.split(":")[0], matrix)


@pytest.mark.parametrize("name", ["gfx900", "gfx908", "gfx1010", "gfx1250", "unknown"])
def test_other_architectures_are_refused(name: str) -> None:
    assert targets.architecture(name) is None


def test_an_override_of_the_architecture_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    navi = Device("cuda", 0, "RX 7700", "amd", "gfx1101", 12 << 30, 32)
    monkeypatch.setenv(targets.OVERRIDE, "11.0.0")
    refusal = targets.refusal(navi)
    assert refusal is not None
    assert refusal.code == "AWQ-ROCM-019"
    monkeypatch.setenv(targets.OVERRIDE, "11.0.1")
    assert targets.refusal(navi) is None


def test_torch_for_another_platform_is_an_answer_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "amd", lambda: Probe((MI300X,)))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    probe = backend.probe()
    assert probe.devices == ()
    assert [refusal.code for refusal in probe.refusals] == ["AWQ-ROCM-014"]
    assert "CUDA 13.0" in probe.refusals[0].reason


@pytest.mark.parametrize(
    ("version", "code"),
    [
        (RuntimeError("failed to dlopen libamdhip64.so"), "AWQ-ROCM-017"),
        (ImportError("hip"), "AWQ-ROCM-016"),
        ((5, 7), "AWQ-ROCM-018"),
    ],
)
def test_a_runtime_that_is_missing_or_too_old_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, version: Exception | tuple[int, int], code: str
) -> None:
    def answer() -> tuple[int, int]:
        if isinstance(version, Exception):
            raise version
        return version

    monkeypatch.setattr(devices, "amd", lambda: Probe((MI300X,)))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(driver, "version", answer)
    assert [refusal.code for refusal in backend.probe().refusals] == [code]


def test_a_gpu_whose_waves_are_of_another_size_is_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", warp_size=32)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    with pytest.raises(UnsupportedDevice, match=r"gfx942.* waves of 32 lanes.*HSA_OVERRIDE_GFX_VERSION"):
        gpu.architecture_of.__wrapped__(0)


def test_a_compiler_that_cannot_be_loaded_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(driver, "version", lambda: (7, 0))
    refusal = requirements.missing()
    assert refusal is not None
    assert refusal.code == "AWQ-ROCM-021"
    assert "hipRTC" in refusal.reason


def test_a_probe_on_any_machine_is_an_answer() -> None:
    probe = backend.probe()
    assert probe.devices or probe.refusals


def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Put a program of `body` in the place of the one that calls hipRTC."""
    file = tmp_path / "worker.py"
    file.write_text(f"import json, os, signal, sys, time\nasked, answered = sys.argv[1:]\n{body}\n")
    monkeypatch.setattr(hiprtc, "WORKER", file)


def test_an_abort_of_the_compiler_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker(tmp_path, monkeypatch, "print('unknown target', flush=True); os.kill(os.getpid(), signal.SIGABRT)")
    with pytest.raises(hiprtc.CompilerDied, match=r"SIGABRT while compiling k\.hip gfx942.*unknown target"):
        hiprtc.Hiprtc().compile(Program((("k.hip", ""),), (), "gfx942"))


def test_a_compiler_that_never_comes_back_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker(tmp_path, monkeypatch, "time.sleep(60)")
    monkeypatch.setattr(hiprtc, "TIME_LIMIT_S", 0.2)
    with pytest.raises(hiprtc.CompilerDied, match=r"did not come back in 0\.2 s"):
        hiprtc.Hiprtc().compile(Program((("k.hip", ""),), (), "gfx942"))


def test_a_refused_kernel_shows_log_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = "{'version': '9.0', 'refused': 'HIPRTC_ERROR_COMPILATION', 'log': 'error: no'}"
    worker(tmp_path, monkeypatch, f"open(answered, 'w').write(json.dumps({answer}))")
    with pytest.raises(CompileFailed, match=r"(?s)--offload-arch=gfx942 .*-DROWS=1 .*COMPILATION\):\nerror: no"):
        hiprtc.Hiprtc().compile(Program((("k.hip", ""),), (("ROWS", "1"),), "gfx942"))


def test_the_abort_of_a_real_hiprtc_is_survived(debian_hiprtc: hiprtc.Hiprtc) -> None:
    """HIP 5.2 aborts on gfx1100."""
    variant = selection.variant(1, 32, "auto", "wmma repeated")
    with pytest.raises(hiprtc.CompilerDied, match="SIG"):
        debian_hiprtc.compile(variant.program(Kind(True, 0, 128), "gfx1100"))


def test_torchs_own_runtime_wins_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libamdhip64.so").touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setenv("ROCM_PATH", "/opt/elsewhere")
    assert libraries.environment()["ROCM_PATH"] == str(tmp_path)
    with libraries.search_path():
        assert os.environ["ROCM_PATH"] == str(tmp_path)
    assert os.environ["ROCM_PATH"] == "/opt/elsewhere"


LAYOUTS = {
    "a wheel of torch": "wheel/torch",
    "rocm_sdk wheels": "sdk/lib",
    "a ROCm of the system": "system",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_runtime_is_found_in_each_layout(tmp_path: Path, layout: str) -> None:
    """In a process of its own, which tells whose library was mapped. The system's ROCm is always there."""
    pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
    fake_hip.build(tmp_path / "system")
    wanted = tmp_path / LAYOUTS[layout]
    if not wanted.exists():
        fake_hip.build(wanted)
    (tmp_path / "packages").mkdir()
    if layout == "rocm_sdk wheels":
        files = f"Path({str(wanted)!r}, 'lib', f'lib{{name}}.so') for name in names"
        text = f"from pathlib import Path\n\n\ndef find_libraries(*names):\n    return [{files}]\n"
        (tmp_path / "packages" / "rocm_sdk.py").write_text(text)
    code = f"""
import torch
if {layout == "a wheel of torch"}:
    torch.__file__ = {str(wanted / "__init__.py")!r}
from awq_rt_rocm import driver
try:
    driver.version()
except driver.DriverFailed as error:  # the fake has nobody behind it, and says so
    print(error)
print({{line.split()[-1] for line in open("/proc/self/maps") if "libamdhip64" in line}})
"""
    environment = {**os.environ, "ROCM_PATH": str(tmp_path / "system"), "PYTHONPATH": str(tmp_path / "packages")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the fake was told to fail" in done.stdout
    assert done.stdout.splitlines()[-1] == str({str(wanted / "lib" / "libamdhip64.so")})


@pytest.fixture(scope="module")
def machine(clang: Clang, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    pytest.importorskip("ziglang", reason="ziglang is not installed, which builds the fake HIP runtime")
    with simulated.machine(clang, tmp_path_factory.mktemp("rocm")) as here:
        yield here


@pytest.fixture
def fresh(machine: Machine) -> Machine:
    """The machine with nothing loaded and nothing that fails."""
    for cached in (tiled.load, tiled.load_dequantize, tiled.plan):
        cached.cache_clear()
    machine.hip.fail.clear()
    machine.index = simulated.ARCHITECTURES.index("gfx942")
    driver.runtime()
    machine.hip.calls.clear()
    machine.hip.launched.clear()
    return machine


def product(machine: Machine, rows: int, kernel_family: str = "auto") -> torch.Tensor:
    weight = hurtful_weight("random", 256, 48, 64, bias=True)
    backend_here = SimulatedBackend(machine)
    packed = backend_here.pack(weight, spec_of(weight, torch.float16, kernel_family), CPU)
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)).half()
    return backend_here.linear(x, packed)


def test_a_call_loads_once_and_then_only_launches(fresh: Machine) -> None:
    product(fresh, 1)
    assert fresh.hip.calls == ["hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel"]
    fresh.hip.calls.clear()
    product(fresh, 1)
    assert fresh.hip.calls == ["hipModuleLaunchKernel"]


@pytest.mark.parametrize(
    ("arch", "rows", "family", "entry"),
    [
        ("gfx942", 1, "auto", "gemm"),
        ("gfx942", 1, "gemv", "gemm"),
        ("gfx1100", 1, "gemv", "gemv"),
        ("gfx942", 300, "auto", "dequantize_tiles"),
        ("gfx1100", 2, "auto", "gemv"),
        ("gfx1100", 3, "auto", "gemm"),
        ("gfx1030", 4, "auto", "gemv"),
        ("gfx1030", 17, "auto", "dequantize_tiles"),
    ],
)
def test_each_number_of_rows_gets_its_kernel(fresh: Machine, arch: str, rows: int, family: str, entry: str) -> None:
    fresh.index = simulated.ARCHITECTURES.index(arch)
    assert product(fresh, rows, family).shape == (rows, 48)
    assert [name for name, _, _ in fresh.hip.launched] == [entry]


@pytest.mark.parametrize("function", ["hipModuleLoadData", "hipModuleGetFunction", "hipModuleLaunchKernel"])
def test_every_call_that_fails_is_an_error_that_says_what_was_tried(fresh: Machine, function: str) -> None:
    fresh.hip.fail[function] = 719
    said = r"(loading|finding|launching) gemm.*hipErrorLaunchFailure, the fake was told to fail"
    with pytest.raises(driver.DriverFailed, match=said):
        product(fresh, 8)
    fresh.hip.fail.clear()
    assert product(fresh, 8).isfinite().all()


def test_a_runtime_that_refuses_its_first_call_is_an_answer(fresh: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    fresh.hip.fail["hipRuntimeGetVersion"] = 100
    refusal = requirements.missing()
    assert refusal is not None
    assert refusal.code == "AWQ-ROCM-017"
    assert "hipErrorNoDevice, the fake was told to fail" in refusal.reason


def test_no_rows_launch_nothing(fresh: Machine) -> None:
    assert product(fresh, 0).shape == (0, 48)
    assert fresh.hip.calls == []


def test_the_fake_notices_a_wrong_stream_and_a_wild_pointer(fresh: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "current_stream", lambda index: 0)
    with pytest.raises(fake_hip.WrongCall, match="not the current one"):
        product(fresh, 1)
    monkeypatch.undo()
    backend_here = SimulatedBackend(fresh)
    weight = hurtful_weight("random", 256, 48, 64)
    packed = backend_here.pack(weight, spec_of(weight, torch.float16), CPU)
    plan = tiled.plan(packed.layout, fresh.index)
    x = torch.zeros(1, 256, dtype=torch.float16)
    with pytest.raises(fake_hip.WrongCall, match="no tensor begins"), fake_hip.watched(fresh.hip, x):
        plan.linear(x, packed)


def test_warmup_names_every_kernel_once(fresh: Machine) -> None:
    specs = [LinearSpec(256, 48, 64, torch.float16), LinearSpec(256, 96, 64, torch.float16)]
    ready = list(backend.warmup(specs, CPU))
    assert [prepared.done for prepared in ready] == list(range(1, len(ready) + 1))
    assert len({prepared.name for prepared in ready}) == len(ready) == ready[0].total
    assert not any(prepared.compiled for prepared in backend.warmup(specs, CPU))


def test_importing_the_plugin_loads_no_hip() -> None:
    code = "import awq_rt_rocm, sys; print(sorted(m for m in sys.modules if m.split('.')[0] in ('hip', 'rocm')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("family", ["auto", "gemv"])
def test_joined_weights_are_the_parts_side_by_side(fresh: Machine, family: str) -> None:
    here = SimulatedBackend(fresh)
    weights = [hurtful_weight("random", 256, n, 64) for n in (48, 16)]
    parts = [here.pack(weight, spec_of(weight, torch.float16, family), CPU) for weight in weights]
    joined = here.join(parts)
    assert joined is not None
    whole, views = joined
    assert all(here.unpack(view).equal(weight) for view, weight in zip(views, weights, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in whole.tensors}
    assert {tensor.untyped_storage().data_ptr() for view in views for tensor in view.tensors} == storages
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(here.linear(x, whole), torch.cat([here.linear(x, part) for part in parts], dim=1))


def test_weights_that_end_within_a_strip_are_not_joined(fresh: Machine) -> None:
    here = SimulatedBackend(fresh)
    weights = [hurtful_weight("random", 256, n, 64) for n in (40, 16)]
    assert here.join([here.pack(weight, spec_of(weight, torch.float16), CPU) for weight in weights]) is None


@pytest.mark.parametrize("family", ["auto", "exllama"])
def test_many_rows_of_a_column_with_one_group_are_within_the_bound(fresh: Machine, family: str) -> None:
    """Its 16 different weights, rounded, would all err alike, and x has a mean."""
    fresh.index = simulated.ARCHITECTURES.index("gfx1030")
    here = SimulatedBackend(fresh)
    weight = hurtful_weight("random", 1024, 16, 1024)
    packed = here.pack(weight, spec_of(weight, torch.float16, family), CPU)
    x = (torch.randn(17, 1024, generator=torch.Generator().manual_seed(0)) * 0.1 + 1).half()
    assert excess(here.linear(x, packed), x, weight) <= 1
