"""What every AMD kernel needs on every target, and how far decoding is from being bound by instructions; needs no GPU.

    python tools/rocm_resources.py                                        # the table of resources
    python tools/rocm_resources.py --json benchmarks/rocm-simulated.json  # and the shares, recorded

Compiled and simulated, not run on hardware. The exit status is 1 when a kernel spills or lacks an instruction it is
written for, or when what decodes one row issues for more than `GOAL` of the memory's time. How the shares are reckoned
is in docs/amd.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
import torch
from amdsim import TARGETS, CodeObject, In, Out
from amdsim import Program as Simulated
from amdsim.disassembly import disassemble
from amdsim.toolchain import Clang, compilers
from awq_rt_rocm import exllama, kernel, packing, selection, targets
from awq_rt_rocm.kernel import KERNELS, Variant

from awq_rt import kernels
from awq_rt.kernels import attention, gated, greedy, logits, norm, rope
from awq_rt.ops import AttentionSpec
from awq_rt.packing import Kind
from awq_rt.packing import exllama as strips
from awq_rt.rtc import Compiler, Program
from awq_rt.testing import excess, hurtful_weight

ROOT = Path(__file__).resolve().parents[1]
GOAL = 0.6
TILES = 32
"""Of the weight that variants are chosen for, 4096 rows: more would choose the same."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card as its maker describes it: compute units, boost clock, memory bandwidth, peak float16 matrix rate."""

    name: str
    target: str
    units: int
    clock_ghz: float
    bandwidth_gbs: float
    matrix_tflops: float

    @property
    def weights_a_cycle(self) -> float:
        """Weights of group size 128 that the memory brings one compute unit in a cycle."""
        bytes_a_weight = 0.5 + 4 / 128  # a code, and a 2-byte scale and two bytes of zero point a group
        return self.bandwidth_gbs / self.clock_ghz / self.units / bytes_a_weight


CARDS = (
    Card("MI210", "gfx90a", 104, 1.70, 1638, 181),
    Card("MI300X", "gfx942", 304, 2.10, 5300, 1307),
    Card("MI355X", "gfx950", 256, 2.40, 8000, 2500),
    Card("PRO W6800", "gfx1030", 60, 2.32, 512, 0),
    Card("RX 7900 XTX", "gfx1100", 96, 2.50, 960, 123),
    Card("PRO W7900", "gfx1100", 96, 2.495, 864, 123),
    Card("AI PRO R9700", "gfx1201", 64, 2.92, 640, 191),
)
SLOW = re.compile(r"v_(mul_lo_u32|mul_hi_u32|mad_u64_u32|mad_co_u64_u32|rcp|rsq|sqrt|exp|log)")
"""Vector instructions that take four times the cycles of the others."""
WIDE = re.compile(r"v_(lshlrev_b64|lshrrev_b64|lshl_add_u64|pk_\w+_f32|mov_b64)")
"""Those that take twice."""


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled kernel: its name in the table, its code object, and what it must contain."""

    name: str
    target: str
    code: CodeObject
    expected: tuple[str, ...]

    @property
    def missing(self) -> list[str]:
        """Patterns of expected instructions that occur nowhere in the machine code."""
        text = self.code.image[self.code.text.start : self.code.text.stop]
        decoded = disassemble(text, self.code.text.start, self.target)
        names = {part.mnemonic for parts in decoded.values() for part in parts}
        return [pattern for pattern in self.expected if not any(re.match(pattern, name) for name in names)]


def variants(kind: Kind, target: str) -> list[Variant]:
    """Every variant that selection may choose for `kind` on `target`, in any family; that of one row first."""
    architecture = targets.architecture(target)
    assert architecture is not None
    found = []
    for family in ("auto", "gemv", "gemm"):
        unit = selection.matrix_unit(kind, family, architecture)
        if unit or family != "gemm":
            found += selection.variants(TILES, family, unit)
    return list(dict.fromkeys(found))


def decoding_variant(kind: Kind, target: str) -> Variant:
    """The variant that one row of x gets, whether the family gemv is asked for or none."""
    return variants(kind, target)[0]


def expected_instructions(entry: str, kind: Kind, target: str) -> tuple[str, ...]:
    """Patterns of what the kernel is written for."""
    loads = "global_load_(dwordx4|b128)"
    if entry == "exllama":
        return loads, r"v_(fma_mix_f32|(dual_)?fmac_f32|pk_fma_f32|fma_f32)"
    if entry == "gemm":
        return loads, "v_mfma_f32" if target.startswith("gfx9") else "v_wmma_f32"
    if entry == "gemv":
        product = r"v_(dual_)?dot2\w*_f32_f16" if kind.half else r"v_(fma_mix_f32|(dual_)?fmac_f32|pk_fma_f32|fma_f32)"
        return loads, product, r"v_pk_fma_f16", r"v_and_or_b32|v_bitop3_b32|v_or_b32"
    return loads, "global_store_(dwordx4|b128)"


def build(compiler: Compiler, kind: Kind, target: str) -> Iterator[Built]:
    """Every kernel of `kind` for `target`."""
    programs: list[tuple[str, str, Program]] = [
        (str(variant), variant.entry, variant.program(kind, target)) for variant in variants(kind, target)
    ]
    programs.append(("dequantize", "dequantize", kernel.dequantize_program(kind, target)))
    for rows in exllama.ROW_STEPS:
        programs.append((f"exllama rows {rows}", "exllama", exllama_program(rows, kind, target)))
    of_weight = kernels.program("exllama_dequantize", target, kind.defines(), KERNELS)
    programs.append(("exllama dequantize", "dequantize", of_weight))
    for name, entry, program in programs:
        code = CodeObject.parse(compiler.compile(program))
        yield Built(f"{name}, {_kind_name(kind)}", target, code, expected_instructions(entry, kind, target))


def exllama_program(rows: int, kind: Kind, target: str) -> Program:
    """The kernel of `rows` rows for a weight of `TILES` tiles."""
    defines = exllama.choose(rows, TILES * exllama.TILE_DEPTH).defines(kind)
    return kernels.program("exllama", target, defines, KERNELS)


LLAMA_3 = AttentionSpec(32, 8, 128, 128**-0.5, 128)
OTHER_ATTENTIONS = {
    "one head a head": AttentionSpec(32, 32, 128, 0.1, 128),
    "head dim 256, window, softcap": AttentionSpec(16, 8, 256, 0.1, 256, window=4096, softcap=50.0),
    "normed": AttentionSpec(32, 8, 128, 0.1, 128, norm_eps=1e-6),
    "interleaved": AttentionSpec(16, 16, 256, 0.1, 64, interleaved=True),
    "head dim 80": AttentionSpec(32, 32, 80, 0.1, 32),
    "head dim 64, 71 heads a head": AttentionSpec(71, 1, 64, 0.1, 64),
}


EXPECTED_OF_OPERATORS = {
    "fused_norm": (r"v_(s_)?rsq_f32",),
    "fused_gated": ("v_exp_f32", "v_rcp_f32"),
    "fused_attention": ("v_exp_f32", "v_rcp_f32"),
    "fused_attention_sum": ("v_exp_f32", "v_rcp_f32"),
    "fused_logits": (r"v_(dot2\w*|fma_mix|(dual_)?fmac|pk_fma|fma)_f32",),
}
"""Beside whole loads. One instruction for a root, an exponential and a reciprocal says that no library's is called."""


def build_operators(compiler: Compiler, half: bool, target: str) -> Iterator[Built]:
    """The fused operators of an 8B model of Llama 3, and attention of other shapes."""
    lanes, is_half = TARGETS[target].wave_size, int(half)
    of_attention = attention.defines(LLAMA_3, is_half, False, lanes)
    programs = [
        ("norm", "fused_norm", norm.defines(4096, is_half, 0, lanes)),
        ("add and norm", "fused_norm", norm.defines(4096, is_half, 1, lanes)),
        ("silu", "fused_gated", gated.defines(14336, is_half, "silu")),
        ("gelu", "fused_gated", gated.defines(14336, is_half, "gelu")),
        ("rope", "fused_rope", rope.defines(LLAMA_3, is_half)),
        ("attention", "fused_attention", of_attention),
        ("attention sum", "fused_attention_sum", of_attention),
        *((f"logits rows {n}", "fused_logits", logits.defines(4096, is_half, n)) for n in logits.ROW_STEPS),
        ("argmax", "fused_argmax", greedy.defines(is_half)),
    ]
    for name, spec in OTHER_ATTENTIONS.items():
        given = attention.defines(spec, is_half, False, lanes)
        programs.append((f"attention, {name}", "fused_attention", given))
    for name, entry, defines in programs:
        code = CodeObject.parse(compiler.compile(kernels.program(entry, target, defines, KERNELS)))
        expected = ("global_load_(dwordx4|b128)", *EXPECTED_OF_OPERATORS.get(entry, ()))
        yield Built(f"fused {name}, {'float16' if half else 'bfloat16'}", target, code, expected)


def _kind_name(kind: Kind) -> str:
    scales = (
        ("", ", bfloat16 scales", ", float32 scales")[kind.scale_kind] if kind.scale_kind != (not kind.half) else ""
    )
    return f"{'float16' if kind.half else 'bfloat16'}, group {kind.group_size}{scales}"


@dataclass(frozen=True, slots=True)
class Shares:
    """What one product takes of a card's time at full bandwidth. `error` is the largest, over its bound."""

    card: str
    rows: int
    vector_a_weight: float
    issue_share: float
    matrix_share: float
    lds_share: float
    error: float


def shares(clang: Clang, card: Card, variant: Variant, kind: Kind, rows: int) -> Shares:
    """Simulate `rows` rows of x, 4096 deep, for 64 columns, and count."""
    k, n = TILES * packing.TILE_DEPTH, 64
    dtype = torch.float16 if kind.half else torch.bfloat16
    weight = hurtful_weight("random", k, n, kind.group_size, scale_dtype=dtype)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(rows, n, dtype=dtype)
    groups = packing.group_count(k, kind.group_size)
    tensors = [packing.pack_codes(weight.codes, weight.zeros), packing.pack_groups(weight.scales, weight.zeros, groups)]
    program = Simulated(CodeObject.parse(clang.compile(variant.program(kind, card.target))), variant.entry)
    wave = TARGETS[card.target].wave_size
    shape = variant.shape(rows, n, wave)
    counts = program.launch(
        [*(In(_bytes(tensor)) for tensor in tensors), 0, In(_bytes(x)), Out(_bytes(y)), rows, n, k, TILES, groups],
        shape.grid,
        shape.threads,
    )
    vector, matrix, lds = _cycles(counts.instructions, wave, card)
    budget = k * n / card.weights_a_cycle  # cycles of one compute unit
    return Shares(
        card.name,
        rows,
        round(vector * 64 / (k * n), 3),
        round(vector / budget, 3),
        round(matrix / budget, 3),
        round(lds / budget, 3),
        round(excess(y, x, weight), 3),
    )


def exllama_shares(clang: Clang, card: Card, rows: int, kind: Kind) -> Shares:
    """The same of the family exllama."""
    k, n = TILES * exllama.TILE_DEPTH, 64
    dtype = torch.float16 if kind.half else torch.bfloat16
    weight = hurtful_weight("random", k, n, kind.group_size, scale_dtype=dtype)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(rows, n, dtype=dtype)
    tensors = [
        strips.pack_codes(weight.codes),
        strips.pack_scales(weight.scales),
        strips.pack_zeros(weight.zeros),
    ]
    variant, wave = exllama.choose(rows, k), TARGETS[card.target].wave_size
    program = Simulated(CodeObject.parse(clang.compile(exllama_program(rows, kind, card.target))), "exllama")
    counts = program.launch(
        [*(In(_bytes(tensor)) for tensor in tensors), 0, In(_bytes(x)), Out(_bytes(y)), rows, n, k],
        variant.grid(rows, n),
        variant.waves * wave,
        dynamic_lds_bytes=variant.shared_bytes,
    )
    vector, matrix, lds = _cycles(counts.instructions, wave, card)
    budget = k * n / card.weights_a_cycle
    numbers = [round(number, 3) for number in (vector / budget, matrix / budget, lds / budget, excess(y, x, weight))]
    return Shares(card.name, rows, round(vector * 64 / (k * n), 3), *numbers)


def dequantizes_exactly(clang: Clang, kind: Kind, target: str) -> bool:
    """Whether the weight that dequantize.hip writes is, bit for bit, the canonical one rounded once."""
    dtype = torch.float16 if kind.half else torch.bfloat16
    weight = hurtful_weight("wide scales", 8 * kind.group_size, 40, kind.group_size, scale_dtype=dtype)
    codes = packing.pack_codes(weight.codes, weight.zeros)
    groups = packing.group_count(weight.in_features, kind.group_size)
    constants = packing.pack_groups(weight.scales, weight.zeros, groups)
    w = torch.zeros(weight.out_features, weight.in_features, dtype=dtype)
    strips, tiles = codes.shape[:2]
    shape = kernel.dequantize_shape(strips, tiles)
    code = CodeObject.parse(clang.compile(kernel.dequantize_program(kind, target)))
    sizes = [weight.out_features, weight.in_features, tiles, groups]
    Simulated(code, "dequantize_tiles").launch(
        [In(_bytes(codes)), In(_bytes(constants)), Out(_bytes(w)), *sizes], shape.grid, shape.threads
    )
    return torch.equal(w, weight.dequantize().to(dtype).T)


def _operators_pass(target: str) -> bool:
    """Whether the tests that execute the fused operators, and the family exllama, pass on `target`."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/amd/test_rocm_ops.py", "tests/amd/test_rocm_exllama.py"]
    command += ["-k", target]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0


def _cycles(instructions: Counter[str], wave: int, card: Card) -> tuple[float, float, float]:
    """Cycles of one compute unit's vector units, matrix units and shared memory.

    A unit issues 64 lanes of a plain vector instruction a cycle: one wave of 64, or two of 32. Its matrix units are
    taken to run at the card's peak; shared memory moves 128 bytes a cycle, as much as its instructions ask of it.
    """
    vector = matrix = lds = 0.0
    for name, count in instructions.items():
        plain = name.replace("v_dual_", "v_")
        if match := re.search(r"(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)", name):
            flops = 2 * int(match[1]) * int(match[2]) * int(match[3])
            matrix += count * flops / (card.matrix_tflops * 1e3 / card.clock_ghz / card.units)
        elif name.startswith("v_"):
            factor = 4 if SLOW.match(plain) else 2 if WIDE.match(plain) else 1
            vector += count * factor * wave / 64
        elif match := re.match(r"ds_(?:read|load|write|store)(2|_2addr)?\w*?_b(\d+)", name):
            lds += count * wave * (2 if match[1] else 1) * int(match[2]) / 8 / 128
        elif name.startswith("ds_"):
            lds += count * wave * 4 / 128
    return vector, matrix, lds


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.view(torch.uint8).numpy()
    return array


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--group-size", nargs="*", type=int, default=[128])
    parser.add_argument("--json", type=Path, help="simulate decoding too (group size 128), and record both tables here")
    options = parser.parse_args()
    if options.json:
        options.group_size = [128]
    clang = compilers()[0]
    kinds = [Kind(half, 0 if half else 1, size) for size in options.group_size for half in (True, False)]
    rows, bad = [], 0
    print("target    VGPRs  SGPRs  LDS bytes  spills  kernel")

    def build_all(target: str) -> list[Built]:
        found = [one for kind in kinds for one in build(clang, kind, target)]
        return found + [one for half in (True, False) for one in build_operators(clang, half, target)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tables = list(pool.map(build_all, options.target))
    for target, built in zip(options.target, tables, strict=True):
        for found in built:
            needs = next(iter(found.code.kernels.values()))
            spills, missing = needs.spills + needs.scratch_bytes, found.missing
            bad += bool(spills or missing)
            lacks = f"  LACKS {', '.join(missing)}" if missing else ""
            sizes = f"{needs.vgprs:6} {needs.sgprs:6} {needs.lds_bytes:10} {spills:7}"
            print(f"{target:8} {sizes}  {found.name}{lacks}", flush=True)
            resources = {"vgprs": needs.vgprs, "lds_bytes": needs.lds_bytes, "spills": spills}
            rows.append({"target": target, "kernel": found.name} | resources)
    if options.json:
        bad += record(options.json, clang, rows)
    return 1 if bad else 0


@dataclass(frozen=True, slots=True)
class Task:
    """A product to simulate. Without a variant it is the family exllama's."""

    card: Card
    kind: Kind
    variant: Variant | None
    rows: int

    @property
    def name(self) -> str:
        return f"{self.variant or f'exllama rows {self.rows}'}, {_kind_name(self.kind)}"

    @property
    def decodes(self) -> bool:
        """Whether this is what serves one row, in `auto` and in the family gemv."""
        return self.rows == 1 and self.variant == decoding_variant(self.kind, self.card.target)

    def shares(self) -> Shares:
        clang = compilers()[0]
        if self.variant is None:
            return exllama_shares(clang, self.card, self.rows, self.kind)
        return shares(clang, self.card, self.variant, self.kind, self.rows)


def tasks_of(card: Card) -> Iterator[Task]:
    """Each kernel with as many rows as it is made for, and with one row what serves that."""
    for kind in (Kind(True, 0, 128), Kind(False, 1, 128)):
        one = decoding_variant(kind, card.target)
        for variant in variants(kind, card.target):
            for rows in sorted({1, variant.rows} if variant == one else {variant.rows}):
                yield Task(card, kind, variant, rows)
        yield Task(card, kind, None, 1)


def record(file: Path, clang: Clang, rows: list[dict[str, object]]) -> int:
    """Simulate decoding on every card, print what it takes, and write both tables to `file`.

    Returns how many of the kernels that decode one row miss `GOAL`.
    """
    print("\ncard          rows  vector/weight  issue  matrix    LDS  error  kernel")
    by_kernel: dict[tuple[str, str], list[Shares]] = {}
    decoding: set[tuple[str, str]] = set()
    targets_here = sorted({str(row["target"]) for row in rows})
    tasks = [task for card in CARDS if card.target in targets_here for task in tasks_of(card)]
    missed = 0
    with ProcessPoolExecutor() as pool:
        verdicts = pool.map(_operators_pass, targets_here)
        for task, found in zip(tasks, pool.map(Task.shares, tasks), strict=True):
            key = task.card.target, task.name
            by_kernel.setdefault(key, []).append(found)
            if task.decodes:
                decoding.add(key)
                missed += found.issue_share > GOAL
            numbers = f"{found.vector_a_weight:13.2f} {found.issue_share:6.0%} {found.matrix_share:7.0%}"
            numbers += f" {found.lds_share:6.0%} {found.error:6.2f}"
            print(f"{found.card:13} {found.rows:4} {numbers}  {task.name}{', decodes' * task.decodes}", flush=True)
        passed = dict(zip(targets_here, verdicts, strict=True))
    for row in rows:
        name, target = str(row["kernel"]), str(row["target"])
        kind = Kind(True, 0, 128) if ", float16" in name else Kind(False, 1, 128)
        simulated = by_kernel.get((target, name), [])
        if name.startswith("dequantize"):
            row["simulated_ok"] = dequantizes_exactly(clang, kind, target)
        elif simulated:
            row["simulated_ok"] = all(found.error <= 1 for found in simulated)
        else:
            row["simulated_ok"] = passed[target]
        row["issue_share"] = max((found.issue_share for found in simulated), default=None)
        row["decodes_one_row"] = (target, name) in decoding
        row["decoding"] = [asdict(found) for found in simulated]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    content = {
        "note": "compiled and simulated, not run on hardware",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": "python tools/rocm_resources.py --json benchmarks/rocm-simulated.json",
        "compiler": clang.version,
        "cards": [asdict(card) for card in CARDS],
        "rows": rows,
    }
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)
    return missed


if __name__ == "__main__":
    sys.exit(main())
