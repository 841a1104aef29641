"""What the CUDA backend says where something that it stands on is missing: no GPU is needed for these."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("awq_rt_cuda", reason="awq-rt-cuda is not installed")
from awq_rt import devices, registry
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device, Probe
from awq_rt.errors import NoBackend, OutOfMemory
from awq_rt.testing import hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt_cuda import backend, driver, nvrtc, requirements, tiled

H100 = Device("cuda", 0, "NVIDIA H100", "nvidia", "sm_90", 80 << 30, 32)
V100 = Device("cuda", 1, "Tesla V100", "nvidia", "sm_70", 16 << 30, 32)
SPEC = LinearSpec(256, 64, 128, torch.float16)


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has all: torch for CUDA 13, NVRTC 13.0, a driver for 13.0, an H100 and a V100."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc.Nvrtc, "version", "nvrtc 13.0")
    monkeypatch.setattr(driver, "driver_version", lambda: (13, 0))
    monkeypatch.setattr(devices, "nvidia", lambda: Probe((H100, V100)))
    return monkeypatch


def _raise(error: Exception) -> None:
    raise error


def take_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.version, "cuda", None)


def take_nvrtc(patch: pytest.MonkeyPatch) -> None:
    missing = RuntimeError("Failed to dlopen libnvrtc.so.13")
    patch.setattr(nvrtc.Nvrtc, "version", property(lambda self: _raise(missing)))


def take_driver(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "driver_version", lambda: _raise(RuntimeError("libcuda.so.1 was not found")))


def age_driver(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "driver_version", lambda: (12, 4))


def test_where_all_is_there_nothing_is_missing(complete: pytest.MonkeyPatch) -> None:
    assert requirements.missing() is None
    probe = backend.probe()
    assert probe.devices == (H100,)
    assert [refusal.code for refusal in probe.refusals] == ["AWQ-CUDA-011"]
    assert backend.supports(SPEC, H100) is None


@pytest.mark.parametrize(
    ("take", "code", "said", "mended_by"),
    [
        (take_torch, "AWQ-CUDA-014", "built without CUDA", "install torch for CUDA"),
        (take_nvrtc, "AWQ-CUDA-016", "libnvrtc.so.13", "pip install 'awq-rt-cuda[cu13]'"),
        (take_driver, "AWQ-CUDA-017", "libcuda.so.1", "reinstall the driver"),
        (age_driver, "AWQ-CUDA-018", "serves CUDA 12.4, older than nvrtc 13.0", "update the driver, or install torch"),
    ],
)
def test_what_is_missing_has_a_code_and_a_fix(
    complete: pytest.MonkeyPatch, take: object, code: str, said: str, mended_by: str
) -> None:
    take(complete)  # type: ignore[operator]
    for refusal in (requirements.missing(), backend.probe().refusals[-1], backend.supports(SPEC, H100)):
        assert refusal is not None
        assert refusal.code == code
        assert said in refusal.reason
        assert mended_by in refusal.fix
    assert backend.probe().devices == ()
    with pytest.raises(NoBackend, match=code):
        registry.select(SPEC, H100, "cuda")


def test_a_driver_of_the_same_major_serves_a_newer_minor(complete: pytest.MonkeyPatch) -> None:
    complete.setattr(nvrtc.Nvrtc, "version", "nvrtc 13.2")  # machine code, unlike PTX, runs within a major version
    assert requirements.missing() is None


def test_no_driver_is_said_by_the_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [refusal.code for refusal in backend.probe().refusals] == ["AWQ-CUDA-001"]


def test_an_old_gpu_is_told_which_backend_works(complete: pytest.MonkeyPatch) -> None:
    refusal = backend.supports(SPEC, V100)
    assert refusal is not None
    assert refusal.code == "AWQ-CUDA-011"
    assert "compute capability 7.0; 8.0 or later is needed" in refusal.reason
    assert "backend='reference'" in refusal.fix
    with pytest.raises(NoBackend, match=r"7\.0.*AWQ-CUDA-011"):
        registry.select(SPEC, V100, "cuda")


@pytest.mark.parametrize(
    ("kernel", "shape", "reason"),
    [
        ("gemv", (72, 64, 24), "group_size 24 has no factor of 16"),
        ("gemm", (66, 64, 66), "in_features 66 and out_features 64 must be multiples of 8"),
        ("exllama", (64, 12, 64), "in_features 64 and out_features 12 must be multiples of 8"),
        ("exllama", (80, 64, 20), "group_size 20 must be a multiple of 8, the rows of a word"),
    ],
)
def test_a_kernel_that_refuses_a_shape_says_why(
    complete: pytest.MonkeyPatch, kernel: str, shape: tuple[int, int, int], reason: str
) -> None:
    with pytest.raises(NoBackend, match=rf"kernel '{kernel}' cannot serve it: {reason}; .*AWQ-CUDA-013"):
        registry.select(LinearSpec(*shape, torch.float16, kernel=kernel), H100, "cuda")


def test_no_room_is_a_clear_error_that_holds_no_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = hurtful_weight("random", 1024, 512, 128)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 79 << 30)
    monkeypatch.setattr(tiled, "pack", lambda *_: _raise(torch.OutOfMemoryError("tried to allocate 2 MiB")))
    with pytest.raises(OutOfMemory) as caught:
        backend.pack(weight, spec_of(weight, torch.float16), torch.device("cpu"))
    assert str(caught.value) == (
        "cpu has no room to pack a linear of 1024 x 512: about 2 MiB are needed for a moment, and 0 MiB stay; 1024 of "
        "81920 MiB are free, and this process holds 80896 MiB; end other programs on it, choose a larger device, or "
        "several with device_map='auto' [AWQ-MEMORY-001]"
    )
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_a_launch_that_the_driver_refuses_names_call_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = SimpleNamespace(name="CUDA_ERROR_NO_BINARY_FOR_GPU")
    monkeypatch.setattr(driver.driver, "cuGetErrorString", lambda status: (0, b"no kernel image"))
    with pytest.raises(driver.DriverFailed, match=r"loading gemm_mma failed: CUDA_ERROR_NO_BINARY.*\[AWQ-CUDA-020\]"):
        driver.checked((refused,), "loading gemm_mma")
