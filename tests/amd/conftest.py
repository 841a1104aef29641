"""AMD kernels without an AMD GPU: compiled by a clang from PyPI or Debian, executed by tools/amdsim."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_HIP = Path("/usr/lib/x86_64-linux-gnu/libamdhip64.so.5")
sys.path.insert(0, str(ROOT / "tools"))

from amdsim import disassembly, toolchain  # noqa: E402  # the line above finds it


@pytest.fixture(scope="session")
def clang() -> toolchain.Clang:
    """The preferred compiler; the test is skipped where there is none, or nothing that decodes what it makes."""
    found = toolchain.compilers()
    if not found:
        pytest.skip("no clang for AMD targets: pip install ziglang, or apt-get install clang-19 lld-19")
    if missing := disassembly.available():
        pytest.skip(missing)
    return found[0]


@pytest.fixture
def debian_hiprtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """hipRTC of Debian's HIP 5.2, from a ROCm of the system that holds nothing else."""
    if not DEBIAN_HIP.exists():
        pytest.skip("Debian's libamdhip64-5 is not installed")
    from awq_rt_rocm import hiprtc

    (tmp_path / "lib").mkdir()
    for name in ("libamdhip64.so", "libhiprtc.so"):
        (tmp_path / "lib" / name).symlink_to(DEBIAN_HIP)
    monkeypatch.setenv("ROCM_PATH", str(tmp_path))
    compiler = hiprtc.Hiprtc()
    assert compiler.version.endswith("of HIP 50221153")
    return compiler
