"""Registers, shared memory and spills of every CUDA kernel that selection may choose; needs NVRTC but no GPU.

    python tools/kernel_resources.py --arch sm_80 sm_90

The exit status is 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import re
import sys

import torch

from awq_rt.rtc import Program
from awq_rt_cuda import dequantize, exllama, gemm, nvrtc, selection, selection_ring
from awq_rt_cuda.gemm import Kind
from awq_rt_cuda.selection import Target

KIB = 1024
TARGETS = {
    "sm_80": Target(80, 108, 163 * KIB, 164 * KIB, 2048),  # A100
    "sm_86": Target(86, 82, 99 * KIB, 100 * KIB, 1536),  # RTX 3090
    "sm_89": Target(89, 128, 99 * KIB, 100 * KIB, 1536),  # RTX 4090
    "sm_90": Target(90, 132, 227 * KIB, 228 * KIB, 2048),  # H100
    "sm_100": Target(100, 148, 227 * KIB, 228 * KIB, 2048),  # B200
    "sm_120": Target(120, 170, 99 * KIB, 100 * KIB, 1536),  # RTX 5090
}
SHAPES = ((4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096), (4096, 6144), (4096, 28672), (3584, 512), (64, 8))


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    options = parser.parse_args()
    half = options.dtype == "float16"
    kind = Kind(half, 0 if half else 1, options.group_size)
    worst = 0
    print("arch    registers  shared bytes  spilled bytes  kernel")
    for arch in options.arch:
        for name, shared_bytes, program in programs(kind, TARGETS[arch], arch):
            registers, spills = resources(program)
            worst = max(worst, spills)
            print(f"{arch:7} {registers:9} {shared_bytes:13} {spills:14}  {name}", flush=True)
    return 1 if worst else 0


def programs(kind: Kind, target: Target, arch: str) -> list[tuple[str, int, Program]]:
    """(name, dynamic shared memory, program) of each kernel for `target`."""
    chosen = {
        selection.choose(rows, -(-n // 16), -(-k // 64), kind, target)
        for rows in {*selection.ROW_STEPS, *selection_ring.row_steps(kind, target)}
        for k, n in SHAPES
    }
    ordered = sorted(chosen, key=lambda v: (v.rows, v.split, v.threads, str(v)))
    found = [(f"{v.entry} {v}, {v.min_blocks} resident", v.shared_bytes, v.program(kind, arch)) for v in ordered]
    found.append(("dequantize_tiles", 0, dequantize.program(kind, arch)))
    found += exllama_programs(kind, target, arch)
    if any(variant.to_partials for variant in chosen):
        found.append(("sum_parts 4", 0, gemm.sum_program(kind, 4, arch)))
    return found


def exllama_programs(kind: Kind, target: Target, arch: str) -> list[tuple[str, int, Program]]:
    """The same of the family exllama, whose shared memory is static."""
    dtype = torch.float16 if kind.half else torch.bfloat16
    layouts = [exllama.Layout(k, n, kind.group_size, dtype, dtype, None) for k, n in SHAPES if k % kind.group_size == 0]
    chosen = {exllama.choose(rows, each, target.multiprocessors) for each in layouts for rows in exllama.ROW_STEPS}
    ordered = sorted(chosen, key=lambda v: (v.rows, v.waves))
    found = [(f"{v}, {v.min_blocks} resident", v.shared_bytes, v.program(kind, arch)) for v in ordered]
    return [*found, ("exllama_dequantize", 0, exllama.dequantize_program(kind, arch))]


def resources(program: Program) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled, as the compiler reports them."""
    _, log = nvrtc.compile_with_log(program, "--ptxas-options=-v")
    registers = re.findall(r"Used (\d+) registers", log)
    return max(map(int, registers)), sum(map(int, re.findall(r"(\d+) bytes spill stores", log)))


if __name__ == "__main__":
    sys.exit(main())
