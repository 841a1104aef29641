"""Registers, shared memory and spills of every CUDA kernel that selection may choose; needs NVRTC but no GPU.

    python tools/kernel_resources.py --arch sm_80 sm_90

The exit status is 1 when a kernel spills.
"""

from __future__ import annotations

import argparse
import re
import sys

import torch

from awq_rt.ops import AttentionSpec
from awq_rt.packing import Kind, Layout
from awq_rt.packing.exllama import PREFIX
from awq_rt.rtc import Program
from awq_rt_cuda import dequantize, exllama, gemm, nvrtc, selection, selection_ring
from awq_rt_cuda.fused import attention, gated, launch, norm, rope
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
SPECS = {
    "32 heads": AttentionSpec(32, 32, 128, 128**-0.5, 128),
    "32 heads on 8": AttentionSpec(32, 8, 128, 128**-0.5, 128),
    "32 heads on 8, normed": AttentionSpec(32, 8, 128, 128**-0.5, 128, norm_eps=1e-6),
    "16 heads of 256 on 8, window and softcap": AttentionSpec(16, 8, 256, 256**-0.5, 256, window=4096, softcap=50.0),
    "71 heads of 64 on 1": AttentionSpec(71, 1, 64, 64**-0.5, 64),
}
"""Of the attention of Llama 2 7B, Llama 3 8B, Qwen 3 8B, Gemma 2 9B and Falcon 7B."""

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
        found = programs(kind, TARGETS[arch], arch) + fused_programs(int(half), TARGETS[arch], arch)
        for name, dynamic_bytes, program in found:
            registers, static_bytes, spills = resources(program)
            worst = max(worst, spills)
            print(f"{arch:7} {registers:9} {dynamic_bytes + static_bytes:13} {spills:14}  {name}", flush=True)
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
    layouts = [
        Layout(PREFIX, k, n, kind.group_size, dtype, dtype, None, "exllama")
        for k, n in SHAPES
        if k % kind.group_size == 0
    ]
    chosen = {exllama.choose(rows, each, target.multiprocessors) for each in layouts for rows in exllama.ROW_STEPS}
    ordered = sorted(chosen, key=lambda v: (v.rows, v.waves))
    found = [(f"{v}, {v.min_blocks} resident", v.shared_bytes, v.program(kind, arch)) for v in ordered]
    return [*found, ("exllama_dequantize", 0, exllama.dequantize_program(kind, arch))]


def fused_programs(half: int, target: Target, arch: str) -> list[tuple[str, int, Program]]:
    """The same of the operators of a decoder, whose shared memory is static."""
    found = [("norm of 4096", launch.program("fused_norm", arch, norm.defines(4096, half, 0)))]
    found.append(("sum and norm of 4096", launch.program("fused_norm", arch, norm.defines(4096, half, 1))))
    found.append(("gate of 11008", launch.program("fused_gated", arch, gated.defines(11008, half, "silu"))))
    for name, spec in SPECS.items():
        found.append((f"rope, {name}", launch.program("fused_rope", arch, rope.defines(spec, half))))
        found += [(f"attention, {name}", each) for each in attention.programs(spec, half, False, target, arch)]
    return [(f"{program.name.removesuffix('.cu')} {name}", 0, program) for name, program in found]


def resources(program: Program) -> tuple[int, int, int]:
    """Registers of a thread, static shared memory and bytes spilled, as the compiler reports them."""
    _, log = nvrtc.compile_with_log(program, "--ptxas-options=-v")
    registers = re.findall(r"Used (\d+) registers", log)
    shared = re.findall(r"(\d+) bytes smem", log)
    spills = re.findall(r"(\d+) bytes spill stores", log)
    return max(map(int, registers)), sum(map(int, shared)), sum(map(int, spills))


if __name__ == "__main__":
    sys.exit(main())
