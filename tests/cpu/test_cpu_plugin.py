"""The plugin around the kernels: which instruction set is chosen, what is refused, and that fork() is survived."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from awq_rt_cpu import _native, backend

from awq_rt import devices, registry
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device

HOST = devices.cpu().devices[0]
GPU = Device("cuda", 0, "a GPU", "nvidia", "sm_90", 0)
LIMIT_S = 120


def run(code: str, **environment: str) -> str:
    """What a fresh interpreter prints. A hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_widest_instruction_set_is_the_default() -> None:
    offered = [name for name, _ in _native.offered()]
    assert offered[-1] == "plain"
    assert len(set(offered)) == len(offered)
    code = "from awq_rt_cpu import backend; print(backend.probe().devices[0].driver)"
    said = run(code, AWQ_RT_CPU_ISA="")
    assert said.startswith(offered[0])
    assert "the widest here" in said


def test_the_flags_of_the_operating_system_agree() -> None:
    """The kernel's own list of what the processor has and it has enabled."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if " avx2" not in flags:
        pytest.skip("no x86 processor with AVX2, or no /proc/cpuinfo")
    offered = dict(_native.offered())
    assert "avx2" in offered
    assert ("avx512" in offered) == all(f"avx512{part}" in flags for part in ("f", "bw", "dq", "vl"))
    assert ("VNNI" in offered.get("avx512", "")) == ("avx512_vnni" in flags and "avx512f" in flags)


def test_every_instruction_set_here_can_be_asked_for() -> None:
    code = "from awq_rt_cpu import backend; print(backend.probe().devices[0].driver)"
    for name, _ in _native.offered():
        said = run(code, AWQ_RT_CPU_ISA=name)
        assert said.startswith(name)
        assert "as AWQ_RT_CPU_ISA asks" in said


def test_what_the_processor_lacks_is_refused_in_a_sentence() -> None:
    lacking = next(name for name in ("neon", "avx2") if name not in dict(_native.offered()))
    code = """
import torch
from awq_rt import devices, registry
from awq_rt.backend import LinearSpec
from awq_rt_cpu import backend
probe = backend.probe()
assert probe.devices == ()
print(probe.refusals[0])
spec, host = LinearSpec(64, 64, 64, torch.float32), devices.cpu().devices[0]
assert backend.supports(spec, host) == probe.refusals[0]
print(registry.select(spec, host).backend.name)
"""
    refusal, serving = run(code, AWQ_RT_CPU_ISA=lacking).splitlines()
    assert f"AWQ_RT_CPU_ISA is '{lacking}'; this processor and operating system offer" in refusal
    assert "[AWQ-CPU-001]" in refusal
    assert serving == "reference"


def test_it_ranks_between_the_reference_and_gpus() -> None:
    assert registry.get("reference").priority < backend.priority < 100
    assert registry.select(LinearSpec(64, 64, 64, torch.float32), HOST).backend is backend


@pytest.mark.parametrize(
    ("spec", "device", "code"),
    [
        (LinearSpec(64, 64, 64, torch.float32), GPU, "AWQ-CPU-010"),
        (LinearSpec(64, 64, 64, torch.float64), HOST, "AWQ-CPU-011"),
        (LinearSpec(0, 64, 64, torch.float32), HOST, "AWQ-CPU-012"),
    ],
)
def test_what_it_does_not_serve_is_refused(spec: LinearSpec, device: Device, code: str) -> None:
    refusal = backend.supports(spec, device)
    assert refusal is not None
    assert refusal.code == code


def test_a_child_of_fork_computes_on_threads_of_its_own() -> None:
    code = """
import os, signal, torch
from awq_rt.backend import LinearSpec
from awq_rt.testing import hurtful_weight
from awq_rt_cpu import backend
torch.set_num_threads(3)
weight = hurtful_weight("random", 512, 4096, 64)
packed = backend.pack(weight, LinearSpec.of(weight, torch.float32), torch.device("cpu"))
x = torch.ones(3, 512)
expected = backend.linear(x, packed)
threads = lambda: len(os.listdir("/proc/self/task"))
for _ in range(3):
    if (child := os.fork()) == 0:
        signal.alarm(30)
        before = threads()
        same = all(torch.equal(backend.linear(x, packed), expected) for _ in range(50))
        os._exit(0 if same and before == 1 and threads() == 3 else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert torch.equal(backend.linear(x, packed), expected)
"""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc to count threads in")
    run(code)


def test_idle_threads_sleep() -> None:
    """A second after the last call the pool has used no more processor time than a search for work may take."""
    code = """
import time, torch
from awq_rt.backend import LinearSpec
from awq_rt.testing import hurtful_weight
from awq_rt_cpu import backend
torch.set_num_threads(2)
weight = hurtful_weight("random", 512, 4096, 64)
packed = backend.pack(weight, LinearSpec.of(weight, torch.float32), torch.device("cpu"))
backend.linear(torch.ones(1, 512), packed)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    assert float(run(code)) < 0.2
