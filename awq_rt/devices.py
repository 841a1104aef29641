"""What hardware this machine has, found without torch, without a device context, and without raising.

A machine without a GPU is an answer with a reason, not an error. Backends build their own `probe` from these facts.
Standard library only, so that `awq-rt doctor` can say what is there when torch itself cannot be imported.
"""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

KFD_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
KFD_DEVICE = Path("/dev/kfd")
NVIDIA_PROC = Path("/proc/driver/nvidia")
VISIBILITY = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
NVIDIA_SMI_TIMEOUT_S = 30
"""A server without persistence mode initialises every card on the first query: seconds, not milliseconds."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why something is not possible: a stable code, the reason, and what to do about it."""

    code: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.reason}; {self.fix} [{self.code}]"


@dataclass(frozen=True, slots=True)
class Device:
    """One processor that can run a model. `type` and `index` are torch's; `arch` is `sm_90`, `gfx942`, `x86_64`."""

    type: str
    index: int
    name: str
    platform: str  # "cpu", "nvidia", "amd", or a stranger's own word
    arch: str
    memory_bytes: int
    wave_size: int = 1  # threads that execute together: 32 on NVIDIA and RDNA, 64 on CDNA
    driver: str = ""

    def __str__(self) -> str:
        where = self.type if self.type == "cpu" else f"{self.type}:{self.index}"
        return f"{where} {self.name} ({self.arch}, {self.memory_bytes / 2**30:.0f} GiB)"


@dataclass(frozen=True, slots=True)
class Probe:
    """The devices found, and for each kind that was not found, why."""

    devices: tuple[Device, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class Tool:
    """What a backend compiles with at run time: a compiler, its headers, a runtime; `path` is where it was found."""

    name: str
    version: str
    path: str


def cpu() -> Probe:
    """The host processor."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), name)
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        memory_bytes = 0
    return Probe((Device("cpu", 0, name, "cpu", platform.machine(), memory_bytes),))


def nvidia() -> Probe:
    """NVIDIA GPUs that `nvidia-smi` lists and CUDA_VISIBLE_DEVICES lets through."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return _none("AWQ-CUDA-001", "nvidia-smi was not found", "if the machine has an NVIDIA GPU, install its driver")
    query = ["index", "uuid", "name", "compute_cap", "memory.total", "driver_version"]
    try:
        done = _run([program, f"--query-gpu={','.join(query)}", "--format=csv,noheader,nounits"])
    except (OSError, subprocess.TimeoutExpired) as error:
        return _none("AWQ-CUDA-002", f"nvidia-smi did not answer ({error})", "restart the driver or the machine")
    said = (done.stdout + done.stderr).strip()
    if "No devices were found" in said:
        return _none("AWQ-CUDA-003", "nvidia-smi lists no GPU", "look at `nvidia-smi -L` and `dmesg | grep -i nvrm`")
    if done.returncode != 0:
        said = said or f"exit status {done.returncode}"
        return _none("AWQ-CUDA-002", f"nvidia-smi failed: {said}", "reinstall the driver; restart the machine after it")
    found = []
    for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True):
        if len(row) != len(query):
            return _none("AWQ-CUDA-002", f"nvidia-smi printed {row!r}", "update the driver")
        index, uuid, name, capability, memory_mib, driver = row
        # A driver prints [N/A] for what it does not know, such as the memory of a GPU that shares the host's.
        arch = "sm_" + capability.replace(".", "") if re.fullmatch(r"\d+\.\d+", capability) else "unknown"
        memory_bytes = int(memory_mib) * 2**20 if memory_mib.isdecimal() else 0
        found.append(_Found(index, uuid, Device("cuda", 0, name, "nvidia", arch, memory_bytes, 32, driver)))
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and "MIG-" in wanted:
        found += _mig_instances(program, found)
    devices = _renumbered(_visible(found, wanted))
    if not devices:
        return _none("AWQ-CUDA-003", "no NVIDIA GPU is visible", "look at CUDA_VISIBLE_DEVICES and at `nvidia-smi -L`")
    return Probe(devices)


def amd(nodes: Path = KFD_NODES) -> Probe:
    """AMD GPUs as the kernel's compute driver lists them: gcnArchName, wave size, memory; visibility variables applied.

    Source: the amdkfd topology in sysfs. Written from its documentation; not run on AMD hardware.
    """
    if not nodes.is_dir():
        return _none("AWQ-ROCM-001", f"{nodes} does not exist", "if the machine has an AMD GPU, install its driver")
    found: list[_Found] = []
    for node in sorted(nodes.iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1):
        properties = _kfd_properties(node / "properties")
        target = properties.get("gfx_target_version", 0)
        if not target:  # a CPU node
            continue
        arch = f"gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}"
        banks = (_kfd_properties(bank / "properties") for bank in (node / "mem_banks").glob("*"))
        memory_bytes = sum(bank.get("size_in_bytes", 0) for bank in banks)
        name = _first_line(Path(f"/sys/class/drm/renderD{properties.get('drm_render_minor', 0)}/device/product_name"))
        driver = _first_line(Path("/sys/module/amdgpu/version")) or platform.release()
        wave_size = properties.get("wave_front_size", 64)
        device = Device("cuda", 0, name or f"AMD {arch}", "amd", arch, memory_bytes, wave_size, driver)
        found.append(_Found(str(len(found)), f"GPU-{properties.get('unique_id', 0):016x}", device))
    if not found:
        return _none("AWQ-ROCM-002", "the amdgpu driver lists no GPU", "look at `dmesg | grep amdgpu`")
    # HIP counts among what ROCR lets through, and reads CUDA's variable where its own is not set.
    seen = _visible(found, os.environ.get("ROCR_VISIBLE_DEVICES"))
    seen = [replace(gpu, index=str(i)) for i, gpu in enumerate(seen)]
    devices = _renumbered(_visible(seen, os.environ.get("HIP_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))))
    if not devices:
        return _none("AWQ-ROCM-003", "no AMD GPU is visible", "look at ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES")
    if not os.access(KFD_DEVICE, os.R_OK | os.W_OK):
        return _none("AWQ-ROCM-004", f"{KFD_DEVICE} cannot be opened", "add your user to the groups render and video")
    return Probe(devices)


def driver_fingerprint() -> str:
    """A word that changes with the GPU drivers, the GPUs and what of them is visible; cheap enough for every start."""
    stamps = [_first_line(NVIDIA_PROC / "version"), _first_line(Path("/sys/module/amdgpu/version"))]
    # The first line of a GPU's information is its model.
    stamps += [_first_line(path) for path in sorted(NVIDIA_PROC.glob("gpus/*/information"))]
    for path in sorted(KFD_NODES.glob("*/properties")):
        stamps.append(str(_kfd_properties(path).get("gfx_target_version", 0)))
    stamps += [os.environ.get(variable, "unset") for variable in VISIBILITY]
    return "|".join(stamps)


def _none(code: str, reason: str, fix: str) -> Probe:
    return Probe(refusals=(Refusal(code, reason, fix),))


@dataclass(frozen=True, slots=True)
class _Found:
    """A GPU by the words that a visibility variable may use for it. A MIG instance has a uuid only."""

    index: str
    uuid: str
    device: Device


def _visible(found: list[_Found], variable: str | None) -> list[_Found]:
    """The GPUs that a visibility variable lets through, in its order, by the runtimes' rules.

    A word is a number (what follows its digits is ignored) or the beginning of one uuid. The first word that names
    nothing ends the list; naming a GPU twice empties it.
    """
    if variable is None:
        return found
    chosen: list[_Found] = []
    for word in (word.strip() for word in variable.split(",")):
        number = re.match(r"\+?0*(\d+)", word)
        if number:
            matches = [gpu for gpu in found if gpu.index == number.group(1)]
        else:
            matches = [gpu for gpu in found if word and gpu.uuid.startswith(word)]
        if len(matches) != 1:
            break
        if matches[0] in chosen:
            return []
        chosen += matches
    return chosen


def _renumbered(found: list[_Found]) -> tuple[Device, ...]:
    return tuple(replace(gpu.device, index=i) for i, gpu in enumerate(found))


def _mig_instances(program: str, gpus: list[_Found]) -> list[_Found]:
    """The MIG instances in `nvidia-smi -L`, each under its GPU: `MIG 1g.10gb Device 0: (UUID: MIG-...)`."""
    try:
        lines = _run([program, "-L"]).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return []
    instances: list[_Found] = []
    parent: _Found | None = None
    for line in lines:
        uuid = line.partition("(UUID: ")[2].rstrip(") ")
        if line.startswith("GPU "):
            parent = next((gpu for gpu in gpus if gpu.uuid == uuid), None)
        elif parent is not None and uuid.startswith("MIG-"):
            profile = re.search(r"MIG (\S*\.(\d+)gb\S*)", line)
            device = parent.device
            if profile:
                name, memory_gb = profile.groups()
                device = replace(device, name=f"{device.name} MIG {name}", memory_bytes=int(memory_gb) * 2**30)
            instances.append(_Found("", uuid, device))
    return instances


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=NVIDIA_SMI_TIMEOUT_S,
        check=False,
    )


def _kfd_properties(path: Path) -> dict[str, int]:
    try:
        pairs = (line.split() for line in path.read_text(errors="replace").splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    except OSError:
        return {}


def _first_line(path: Path) -> str:
    try:
        return path.read_text(errors="replace").split("\n", 1)[0].strip()
    except OSError:
        return ""
