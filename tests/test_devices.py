"""Finding GPUs from what a machine's files and programs say; every machine here is made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from awq_rt import devices
from awq_rt.devices import Probe

ROWS = """\
0, GPU-aaaa1111-0000-0000-0000-000000000000, NVIDIA H100 80GB HBM3, 9.0, 81559, 550.54.15
1, GPU-aaaa2222-0000-0000-0000-000000000000, NVIDIA GeForce RTX 4090, 8.9, 24564, 550.54.15
2, GPU-bbbb3333-0000-0000-0000-000000000000, Tesla T4, 7.5, 15360, 550.54.15
"""
NAMES = ("NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 4090", "Tesla T4")
MIG_LIST = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa1111-0000-0000-0000-000000000000)
  MIG 1g.10gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.40gb     Device  1: (UUID: MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135)
GPU 1: NVIDIA GeForce RTX 4090 (UUID: GPU-aaaa2222-0000-0000-0000-000000000000)
"""


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program `nvidia-smi` with the given Python body first on PATH; nothing restricts what is visible."""
    for variable in devices.VISIBILITY:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(body: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!{sys.executable} -IS\nimport os, signal, sys\n{body}\n")
        program.chmod(0o755)

    return write


@pytest.fixture
def three_gpus(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi(f"sys.stdout.write({MIG_LIST!r} if '-L' in sys.argv else {ROWS!r})")


def _refused(probe: Probe, code: str) -> str:
    assert probe.devices == ()
    (refusal,) = probe.refusals
    assert refusal.code == code
    assert refusal.fix
    return refusal.reason


# --- NVIDIA ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("three_gpus")
def test_every_gpu_is_found_with_architecture_memory_and_driver() -> None:
    probe = devices.nvidia()
    assert probe.refusals == ()
    first, second, third = probe.devices
    assert (first.type, first.index, first.name) == ("cuda", 0, "NVIDIA H100 80GB HBM3")
    assert (first.platform, first.arch, first.wave_size, first.driver) == ("nvidia", "sm_90", 32, "550.54.15")
    assert first.memory_bytes == 81559 * 2**20
    assert (second.index, second.arch, third.index, third.arch) == (1, "sm_89", 2, "sm_75")
    assert str(first) == "cuda:0 NVIDIA H100 80GB HBM3 (sm_90, 80 GiB)"


@pytest.mark.usefixtures("three_gpus")
@pytest.mark.parametrize(
    ("variable", "visible"),
    [
        ("0,1,2", (0, 1, 2)),
        ("2,0", (2, 0)),
        (" 1 , 2 ", (1, 2)),
        ("01", (1,)),
        ("+1", (1,)),
        ("1gpu,2", (1, 2)),  # what follows the digits is ignored
        ("GPU-bbbb3333-0000-0000-0000-000000000000,GPU-aaaa1111", (2, 0)),
        ("GPU-b", (2,)),
        ("GPU-aaaa", ()),  # two begin so
        ("0,7,1", (0,)),  # the first that names nothing ends the list
        ("0,-1,1", (0,)),
        ("1,,2", (1,)),
        ("1,nonsense,2", (1,)),
        ("0,0", ()),  # twice the same empties it
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
    ],
)
def test_the_visible_gpus_are_those_that_cuda_would_show(
    variable: str, visible: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    probe = devices.nvidia()
    assert tuple(device.name for device in probe.devices) == tuple(NAMES[i] for i in visible)
    assert tuple(device.index for device in probe.devices) == tuple(range(len(visible)))
    if not visible:
        assert "visible" in _refused(probe, "AWQ-CUDA-003")


@pytest.mark.usefixtures("three_gpus")
def test_a_mig_instance_is_a_part_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135")
    (device,) = devices.nvidia().devices
    assert (device.name, device.arch) == ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "sm_90")
    assert device.memory_bytes == 40 * 2**30


def test_unknown_memory_is_zero_and_an_unknown_capability_is_unknown(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi("print('0, GPU-1, \"NVIDIA GB10, rev 2\", 12.1, [N/A], 580.1')\nprint('1, GPU-2, Old, [N/A], 100, 1.0')")
    first, second = devices.nvidia().devices
    assert (first.name, first.arch, first.memory_bytes) == ("NVIDIA GB10, rev 2", "sm_121", 0)
    assert second.arch == "unknown"


def test_a_machine_without_nvidia_smi_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _refused(devices.nvidia(), "AWQ-CUDA-001") == "nvidia-smi was not found"


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("sys.exit('NVIDIA-SMI has failed')", "AWQ-CUDA-002", "NVIDIA-SMI has failed"),
        ("sys.exit(9)", "AWQ-CUDA-002", "exit status 9"),
        ("print('No devices were found')", "AWQ-CUDA-003", "lists no GPU"),
        ("print('No devices were found'); sys.exit(6)", "AWQ-CUDA-003", "lists no GPU"),
        ("print('0, half a row')", "AWQ-CUDA-002", "half a row"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe')", "AWQ-CUDA-002", "printed"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "AWQ-CUDA-002", "exit status -9"),
        ("", "AWQ-CUDA-003", "visible"),
    ],
)
def test_a_driver_that_fails_is_an_answer(nvidia_smi: Callable[[str], None], body: str, code: str, words: str) -> None:
    nvidia_smi(body)
    assert words in _refused(devices.nvidia(), code)


def test_a_driver_that_hangs_is_an_answer(nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("signal.pause()")
    monkeypatch.setattr(devices, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    assert "did not answer" in _refused(devices.nvidia(), "AWQ-CUDA-002")


def test_a_program_that_cannot_be_run_is_an_answer(nvidia_smi: Callable[[str], None], tmp_path: Path) -> None:
    nvidia_smi("")
    (tmp_path / "nvidia-smi").write_text("neither a script nor a binary")
    assert "did not answer" in _refused(devices.nvidia(), "AWQ-CUDA-002")


# --- AMD: made-up trees; compiled and simulated, not run on hardware -------------------------------------------------

GIB = 2**30


@pytest.fixture
def kfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a topology of a CPU and the given GPUs: (gfx_target_version, wave size, memory in GiB)."""
    for variable in devices.VISIBILITY:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(devices, "KFD_DEVICE", tmp_path)

    def build(*gpus: tuple[int, int, int]) -> Path:
        nodes = tmp_path / "nodes"
        _node(nodes / "0", {"cpu_cores_count": 16, "gfx_target_version": 0, "wave_front_size": 0}, 256)
        for number, (target, wave_size, memory_gib) in enumerate(gpus, start=1):
            properties = {
                "cpu_cores_count": 0,
                "gfx_target_version": target,
                "wave_front_size": wave_size,
                "unique_id": 0xA0 + number,
            }
            _node(nodes / str(number), properties, memory_gib)
        return nodes

    return build


def _node(folder: Path, properties: dict[str, int], memory_gib: int) -> None:
    bank = folder / "mem_banks" / "0"
    bank.mkdir(parents=True)
    (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))
    (bank / "properties").write_text(f"heap_type 1\nsize_in_bytes {memory_gib * GIB}\n")


@pytest.mark.parametrize(
    ("target", "arch", "wave_size", "memory_gib"),
    [
        (90010, "gfx90a", 64, 64),
        (90402, "gfx942", 64, 192),
        (90500, "gfx950", 64, 288),
        (100300, "gfx1030", 32, 16),
        (110000, "gfx1100", 32, 24),
        (120001, "gfx1201", 32, 16),
    ],
)
def test_an_amd_gpu_is_found_with_architecture_wave_size_and_memory(
    kfd: Callable[..., Path], target: int, arch: str, wave_size: int, memory_gib: int
) -> None:
    (device,) = devices.amd(kfd((target, wave_size, memory_gib))).devices
    assert (device.type, device.index, device.platform) == ("cuda", 0, "amd")
    assert (device.arch, device.wave_size, device.memory_bytes) == (arch, wave_size, memory_gib * GIB)
    assert device.driver


@pytest.mark.parametrize(
    ("rocr", "hip", "cuda", "visible"),
    [
        (None, None, None, ("gfx90a", "gfx942", "gfx1100")),
        ("2,0", None, None, ("gfx1100", "gfx90a")),
        ("GPU-00000000000000a2", None, None, ("gfx942",)),
        (None, "1", None, ("gfx942",)),
        ("1,2", "1", None, ("gfx1100",)),  # HIP counts among what ROCR lets through
        (None, "1", "0", ("gfx942",)),  # HIP's own variable goes before CUDA's
        (None, None, "2", ("gfx1100",)),
        (None, "", None, ()),
    ],
)
def test_the_visible_amd_gpus_are_those_that_the_runtime_would_show(
    kfd: Callable[..., Path],
    rocr: str | None,
    hip: str | None,
    cuda: str | None,
    visible: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = kfd((90010, 64, 64), (90402, 64, 192), (110000, 32, 24))
    chosen = {"ROCR_VISIBLE_DEVICES": rocr, "HIP_VISIBLE_DEVICES": hip, "CUDA_VISIBLE_DEVICES": cuda}
    for variable, value in chosen.items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    probe = devices.amd(nodes)
    assert tuple(device.arch for device in probe.devices) == visible
    assert tuple(device.index for device in probe.devices) == tuple(range(len(visible)))
    if not visible:
        _refused(probe, "AWQ-ROCM-003")


def test_a_machine_without_the_amd_driver_or_gpu_says_so(kfd: Callable[..., Path], tmp_path: Path) -> None:
    _refused(devices.amd(tmp_path / "absent"), "AWQ-ROCM-001")
    _refused(devices.amd(kfd()), "AWQ-ROCM-002")


def test_a_user_who_may_not_open_the_driver_is_told_the_groups(
    kfd: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "KFD_DEVICE", tmp_path / "kfd")
    probe = devices.amd(kfd((110000, 32, 24)))
    _refused(probe, "AWQ-ROCM-004")
    assert "render" in probe.refusals[0].fix


# --- the host --------------------------------------------------------------------------------------------------------


def test_the_host_is_a_device() -> None:
    (device,) = devices.cpu().devices
    assert (device.type, device.index, device.platform) == ("cpu", 0, "cpu")
    assert device.memory_bytes > GIB // 4
    assert device.name


def test_devices_are_found_without_torch() -> None:
    code = "import sys; from awq_rt import devices; devices.cpu(), devices.nvidia(), devices.amd(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
