"""AMD kernels without an AMD GPU: compiled by a clang from PyPI or Debian, executed by tools/amdsim."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
