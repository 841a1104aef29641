"""Kernels of the fused operators on a CPU: their own source, compiled by g++ with `tests/emulated/` for a platform."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from awq_rt.kernels import SOURCES
from awq_rt_cuda.gemm import KERNELS

PLATFORM = Path(__file__).parent / "emulated"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
"""On Linux, whose linker marks the ends of a section."""


class EmulatedKernel:
    """`kernels/NAME.cu` with `defines`, built in `folder`."""

    def __init__(self, name: str, defines: Mapping[str, str | int], folder: Path) -> None:
        self.folder = folder / f"{name}-{abs(hash(tuple(sorted(defines.items()))))}"
        library = self.folder / "kernel.so"
        if not library.exists():
            self._build(name, defines, library)
        self._launch = ctypes.CDLL(str(library)).launch

    def _build(self, name: str, defines: Mapping[str, str | int], library: Path) -> None:
        self.folder.mkdir(parents=True)
        # The platform's files replace the GPU's.
        for source in (*SOURCES.glob("*.cu*"), *KERNELS.glob("*.cu*"), *PLATFORM.iterdir()):
            shutil.copy(source, self.folder)
        lines = [f"#define {key} {value}" for key, value in defines.items()]
        lines += [
            f'#include "{name}.cu"',
            'extern "C" void launch(const u64* slots, u32 x, u32 y, u32 z, u32 cluster, u32 threads, int stale) {',
            "    kernel_slots = slots, stale_by = stale, gridDim = {x, y, z};",
            f"    kernel_call = [] {{ call_with({name}, kernel_slots); }};",
            "    for (u32 k = 0; k < z; k++)",
            "        for (u32 j = 0; j < y; j++)",
            "            for (u32 i = 0; i < x; i += cluster) run_cluster({i, j, k}, cluster, threads);",
            "}",
        ]
        (self.folder / "main.cpp").write_text("\n".join(lines) + "\n")
        assert COMPILER is not None
        options = ["-std=c++17", "-O0", "-w", "-shared", "-fPIC"]
        done = subprocess.run(
            [COMPILER, *options, "main.cpp", "-o", library.name],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def launch(
        self, grid: tuple[int, int, int], threads: int, *arguments: int, cluster: int = 1, stale: int = 0
    ) -> None:
        """As `awq_rt_cuda.driver.Kernel.launch`, and over when it returns."""
        slots = (ctypes.c_uint64 * len(arguments))(*arguments)
        self._launch(slots, *grid, cluster, threads, stale)


def addresses(tensors: Sequence[object]) -> list[int]:
    """The kernel's arguments for `tensors`, of which some may be None."""
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]  # type: ignore[attr-defined]
