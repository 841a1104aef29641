"""Time the CUDA kernels beside cuBLAS and torch's int4 operator; needs an NVIDIA GPU.

    python tools/bench_kernels.py --json benchmarks/kernels-h100.json
    python tools/tabulate_kernels.py benchmarks/kernels-h100.json
    python tools/plot_kernels.py benchmarks/kernels-h100.json

Each figure is the median of CUDA-graph replays over copies of the weight that together exceed the L2 cache several
times, so weights come from device memory; ours and cuBLAS's take turns, for with many rows power sets the clock. A
result is checked against float64 before it is timed. The floor of a shape is the bare cost of a kernel plus its packed
bytes over the read bandwidth, which is measured in the same run.

The shapes of `--models` are timed in full with the first group size; `--sampled-models`, and the other group sizes, at
`--sampled-rows` and beside cuBLAS alone. The file is written after every row; `--resume` goes on where a run ended.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from awq_rt.backend import Packed
from awq_rt.ops import AttentionSpec
from awq_rt.packing import Layout
from awq_rt.rtc import Builder, KernelStore, Program
from awq_rt.testing import excess
from awq_rt.testing.conformance import spec_of
from awq_rt.weights import AwqWeight
from awq_rt_cuda import backend, driver, fused, nvrtc, tiled
from awq_rt_cuda.driver import Kernel, Shape
from awq_rt_cuda.nvrtc import Nvrtc

SHAPES = {
    "7b": ((4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096)),
    "8b": ((4096, 6144), (4096, 28672), (14336, 4096)),
    "70b": ((8192, 8192), (8192, 10240), (28672, 8192)),
    "qwen7b": ((3584, 4608), (18944, 3584)),
}
ATTENTION = AttentionSpec(32, 32, 128, 128**-0.5, 128)
"""Of Llama 2 7B."""

ROWS = (1, 2, 3, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128, 300, 512, 1000, 2048, 8192)
ROWS_BESIDE_OTHERS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)
SAMPLED_ROWS = (1, 4, 16, 64, 128, 512, 2048)
FEW_ROWS = 128
"""Up to here plain launches are timed too, for with more rows a kernel's start does not matter; and torch's int4
operator, which takes a thousand times as long as any other beyond it."""
ROTATED_BYTES = 220e6
LAUNCH_US = 1.65
"""The floor's constant: a kernel that reads nothing, in a chain of a graph. NVIDIA H100 80GB HBM3, 2026-11-22."""

READ = r"""
extern "C" __global__ void __launch_bounds__(1024, 2) read_all(
    const uint4* p,          // [count] device memory to read
    unsigned int* out,       // [1] never written; it keeps the reads
    unsigned long long count) {
#if EARLY
    asm volatile("griddepcontrol.launch_dependents;");
#endif
    unsigned int seen = 0;
    unsigned long long step = (unsigned long long)gridDim.x * 1024;
    for (unsigned long long i = (unsigned long long)blockIdx.x * 1024 + threadIdx.x; i < count; i += step * 4)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (i + j * step < count) {
                uint4 v = __ldg(p + i + j * step);
                seen |= v.x ^ v.y ^ v.z ^ v.w;
            }
#if EARLY
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (seen == 0x12345678u && count == 1) *out = seen;
}
"""
"""What only reads. EARLY: with programmatic dependent launch, all of it before the kernel ahead has ended."""


def main() -> int:
    """Measure, print the tables, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["7b", "8b"], choices=sorted(SHAPES))
    parser.add_argument("--sampled-models", nargs="*", default=["70b", "qwen7b"], choices=sorted(SHAPES))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--sampled-rows", nargs="*", type=int, default=list(SAMPLED_ROWS))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--group-sizes", nargs="*", type=int, default=[128, 64, 32])
    parser.add_argument("--commit", default=commit(), help="of the measured tree, where git cannot say it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json has of this commit and GPU")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no NVIDIA GPU that torch can use; nothing measured", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    record = begun(options)
    print(f"{record.device}, commit {record.commit}: reads {record.read_tbps:.3f} TB/s", flush=True)
    print(f"the floor is {LAUNCH_US} us + packed bytes / that", flush=True)
    dtype = getattr(torch, options.dtype)
    record.compiling = record.compiling or compile_times(options.group_sizes[0], dtype)
    print(f"all that a 7B model needs, compiled and read from the cache: {record.compiling}", flush=True)
    for model in options.models:
        record.chains.setdefault(model, measured_chain(SHAPES[model], options.group_sizes[0], dtype))
        print(f"one row through the linears of a layer of {model}: {record.chains[model]}", flush=True)
    record.save(options.json)
    for part in parts(options):
        for row in part.measured(dtype, record):
            print(line(row), flush=True)
            record.rows.append(row)
            record.save(options.json)
    for group_size in options.group_sizes:
        print_summary(group_size, [row for row in record.rows if row["group_size"] == group_size])
    return 0


Row = dict[str, object]
"""One line of the grid, as the file has it."""


@dataclass
class Record:
    """What the file holds."""

    device: str
    date: str
    commit: str
    command: str
    torch: str
    read_tbps: float
    chains: dict[str, dict[str, float]]
    compiling: dict[str, float]
    rows: list[Row]

    def save(self, path: Path | None) -> None:
        """Write the file, also of a grid that is not complete yet; a reader never sees half of it."""
        if path is not None:
            beside = path.with_suffix(".part")
            beside.write_text(json.dumps(asdict(self), indent=1) + "\n")
            beside.replace(path)

    def has(self, k: int, n: int, group_size: int, m: int, dtype: torch.dtype) -> bool:
        wanted = {"k": k, "n": n, "group_size": group_size, "m": m, "dtype": str(dtype)[6:]}
        return any(wanted.items() <= row.items() for row in self.rows)


def begun(options: argparse.Namespace) -> Record:
    """A new record, or the one to go on with."""
    device = torch.cuda.get_device_name()
    if options.resume and options.json is not None and options.json.exists():
        record = Record(**json.loads(options.json.read_text()))
        if (record.device, record.commit, record.torch) != (device, options.commit, torch.__version__):
            raise SystemExit(
                f"{options.json} is of commit {record.commit} on {record.device} with torch {record.torch}, this run "
                f"of commit {options.commit} on {device} with torch {torch.__version__}: leave --resume out"
            )
        return record
    date = datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d")
    command = "python tools/bench_kernels.py " + " ".join(sys.argv[1:])
    return Record(device, date, options.commit, command, torch.__version__, round(read_bandwidth(), 4), {}, {}, [])


def parts(options: argparse.Namespace) -> Iterator[Part]:
    """The grid, the most wanted first."""
    complete = [shape for model in options.models for shape in SHAPES[model]]
    sampled = [shape for model in options.sampled_models for shape in SHAPES[model]]
    first, *others = options.group_sizes
    for shape in complete:
        yield Part(*shape, first, tuple(options.rows), beside_others=True)
    for shape in sampled:
        yield Part(*shape, first, tuple(options.sampled_rows))
    for group_size in others:
        for shape in complete:
            yield Part(*shape, group_size, tuple(options.sampled_rows))


@dataclass(frozen=True)
class Part:
    """What is measured of one weight."""

    k: int
    n: int
    group_size: int
    row_counts: tuple[int, ...]
    beside_others: bool = False  # plain launches, the exllama family and torch's int4 operator too

    def measured(self, dtype: torch.dtype, record: Record) -> Iterator[Row]:
        """A row for each number of rows of x that `record` does not have."""
        wanted = [m for m in self.row_counts if not record.has(self.k, self.n, self.group_size, m, dtype)]
        if not wanted:
            return
        device = torch.device("cuda", torch.cuda.current_device())
        weight = random_weight(self.k, self.n, self.group_size, dtype, device)
        floor_us = round(LAUNCH_US + packed_bytes(weight) / record.read_tbps / 1e6, 3)
        dense = rotated([torch.randn(self.n, self.k, device=device, dtype=dtype)], 2 * self.k * self.n, Tensor.clone)
        ours = Rotated.of(weight, dtype, "auto")
        shuffled = Rotated.of(weight, dtype, "exllama") if self.beside_others else None
        int4 = torch_int4(weight) if self.beside_others else None
        for m in wanted:
            x = torch.randn(m, self.k, device=device, dtype=dtype)
            row: Row = {"k": self.k, "n": self.n, "group_size": self.group_size, "m": m, "dtype": str(dtype)[6:]}
            errors = [ours.error(x, weight)]
            us, cublas_us = in_turn_us([ours.run(x), (functools.partial(lambda x, i: x @ dense[i].T, x), len(dense))])
            row |= {"us": round(us, 3), "floor_us": floor_us, "cublas_us": round(cublas_us, 3)}
            if self.beside_others and m <= FEW_ROWS:
                with plain_launches():
                    row["plain_us"] = round(ours.us(x), 3)
            if shuffled is not None and m in ROWS_BESIDE_OTHERS:
                errors.append(shuffled.error(x, weight))
                row["exllama_us"] = round(shuffled.us(x), 3)
            if int4 is not None and m in ROWS_BESIDE_OTHERS and m <= FEW_ROWS:
                row["torch_int4_us"] = round(graph_us(functools.partial(int4, x), INT4_COPIES), 3)
            row |= {"error_over_bound": round(max(errors), 3), "variant": ours.variant(m)}
            yield row


@dataclass(frozen=True)
class Rotated:
    """A weight packed for a kernel family, in so many copies that each comes from device memory when its turn comes."""

    copies: list[Packed]

    @staticmethod
    def of(weight: AwqWeight, dtype: torch.dtype, kernel: str) -> Rotated:
        packed = backend.pack(weight, spec_of(weight, dtype, kernel), weight.codes.device)
        return Rotated(rotated([packed], packed_bytes(weight), copied))

    def error(self, x: Tensor, weight: AwqWeight) -> float:
        """The largest error over the bound. Ends the program where it is above 1."""
        packed = self.copies[0]
        error = excess(backend.linear(x, packed), x, weight)
        if not error <= 1:
            raise SystemExit(f"{packed.layout}, M {len(x)}: {error:.3g} times the bound off; nothing is timed")
        return error

    def run(self, x: Tensor) -> tuple[Run, int]:
        """The product of `x` with each of the copies."""
        return lambda i: backend.linear(x, self.copies[i]), len(self.copies)

    def us(self, x: Tensor) -> float:
        return graph_us(*self.run(x))

    def variant(self, m: int) -> str:
        """What serves `m` rows in `auto`."""
        plan = tiled.plan(self.copies[0].layout, torch.cuda.current_device())
        return "dequantize + cuBLAS" if plan.by_blas(m) else str(plan.variant(plan.step(m)))


def line(row: Row) -> str:
    """A record for people."""
    us, floor, cublas = (float(str(row[key])) for key in ("us", "floor_us", "cublas_us"))
    text = f"{row['k']:6}x{row['n']:<6} G {row['group_size']:<4} M {row['m']:<5} {us:8.2f} us ({us / floor:5.2f} of "
    text += f"the floor), cuBLAS {cublas:8.2f} ({cublas / us:.2f}x)"
    for name in ("plain", "exllama", "torch_int4"):
        if f"{name}_us" in row:
            text += f", {name} {float(str(row[f'{name}_us'])):.2f}"
    return f"{text}  {row['variant']}"


def packed_bytes(weight: AwqWeight) -> int:
    """Codes, and 16 bits of scale and 4 of zero point a group."""
    k, n, groups = weight.in_features, weight.out_features, weight.scales.shape[0]
    return k * n // 2 + groups * n * 5 // 2


def copied(packed: Packed) -> Packed:
    return Packed(packed.layout, tuple(tensor.clone() for tensor in packed.tensors))


def random_weight(k: int, n: int, group_size: int, dtype: torch.dtype, device: torch.device) -> AwqWeight:
    def integers(rows: int) -> Tensor:
        return torch.randint(0, 16, (rows, n), dtype=torch.uint8, device=device)

    scales = torch.rand(k // group_size, n, device=device) * 0.02 + 0.001
    return AwqWeight(integers(k), integers(k // group_size), scales.to(dtype))


def rotated(first: list, size: int, copy: Callable) -> list:  # type: ignore[type-arg]
    """`first` and copies of its one element, together at least `ROTATED_BYTES`."""
    return first + [copy(first[0]) for _ in range(max(1, math.ceil(ROTATED_BYTES / size)) - 1 or 1)]


INT4_COPIES = 8


def torch_int4(weight: AwqWeight) -> Callable[[Tensor, int], Tensor] | None:
    """torch's own int4 product on the same codes, in bfloat16: timed, not checked. None where there is none."""
    k, group_size = weight.in_features, weight.group_size
    codes = weight.codes.T.contiguous()
    try:
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
        scales = torch.stack((weight.scales, weight.scales), dim=2).bfloat16().contiguous()
        torch._weight_int4pack_mm(torch.zeros(1, k, device=codes.device).bfloat16(), packed, group_size, scales)
    except (RuntimeError, AttributeError):
        return None
    copies = [(packed.clone(), scales.clone()) for _ in range(INT4_COPIES)]
    inputs: dict[int, Tensor] = {}

    def run(x: Tensor, index: int) -> Tensor:
        if x.shape[0] not in inputs:
            inputs[x.shape[0]] = x.bfloat16()
        return torch._weight_int4pack_mm(inputs[x.shape[0]], copies[index][0], group_size, copies[index][1])

    return run


Run = Callable[[int], object]
"""What is timed; it is given which of the copies is its turn."""


def graph_us(run: Run, count: int, replays: int = 11) -> float:
    """The median time of one of `count` calls captured in a graph and replayed."""
    return in_turn_us([(run, count)], replays)[0]


def in_turn_us(runs: list[tuple[Run, int]], replays: int = 11) -> list[float]:
    """`graph_us` of each of `runs`, whose graphs take turns: the clock that power leaves is then the same for all."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        graphs = [captured(run, count, stream) for run, count in runs]
        warm_up(graphs, stream)
        turns = []
        for _ in range(replays):
            for graph in graphs:
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record(stream)
                graph.replay()
                end.record(stream)
                turns.append((start, end))
        stream.synchronize()
    times = [start.elapsed_time(end) * 1000 for start, end in turns]
    return [float(statistics.median(times[i :: len(runs)]) / count) for i, (_, count) in enumerate(runs)]


def captured(run: Run, count: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """`count` calls as a graph; `stream` is current."""
    run(0)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            run(index)
    return graph


def warm_up(graphs: list[torch.cuda.CUDAGraph], stream: torch.cuda.Stream) -> None:
    """Replay in turn until the clocks have risen: an idle GPU's first 20 ms measured up to a fifth slower."""
    end = time.monotonic() + 0.03 * len(graphs)
    while time.monotonic() < end:
        for graph in graphs:
            graph.replay()
        stream.synchronize()


class plain_launches:  # noqa: N801  # used as a statement's verb
    """Within it, kernels start when the one before has ended."""

    def __enter__(self) -> None:
        os.environ[driver.NO_OVERLAP] = "1"
        self._forget()

    def __exit__(self, *_: object) -> None:
        del os.environ[driver.NO_OVERLAP]
        self._forget()

    def _forget(self) -> None:
        for cached in (driver.may_overlap, tiled.load, tiled.load_dequantize, tiled.plan):
            cached.cache_clear()


def measured_chain(shapes: tuple[tuple[int, int], ...], group_size: int, dtype: torch.dtype) -> dict[str, float]:
    """us of one row through each of `shapes`, one after the other, and of kernels that only read as many bytes.

    Each kernel starts early; every round has weights of its own.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    rounds: list[tuple[Tensor, Packed, int]] = []
    size = 0
    while size < ROTATED_BYTES:
        for k, n in shapes:
            weight = random_weight(k, n, group_size, dtype, device)
            packed = backend.pack(weight, spec_of(weight, dtype), device)
            rounds.append((torch.randn(1, k, device=device, dtype=dtype), packed, packed_bytes(weight)))
            size += rounds[-1][2]
    us = graph_us(lambda i: backend.linear(*rounds[i][:2]), len(rounds)) * len(shapes)
    data = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    starts = [sum(taken for *_, taken in rounds[:i]) for i in range(len(rounds))]
    read = reader(early=True)
    read_us = graph_us(lambda i: read(data[starts[i] :], rounds[i][2]), len(rounds)) * len(shapes)
    return {"us": round(us, 2), "read_us": round(read_us, 2)}


def compile_times(group_size: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds to compile all that a Llama 2 7B needs into an empty cache, and to read it from there."""
    index = torch.cuda.current_device()
    programs = fused.programs(dtype, index, [4096], [(11008, "silu")], [(ATTENTION, False)])
    for k, n in SHAPES["7b"]:
        layout = Layout(tiled.PREFIX, k, n, group_size, dtype, dtype, None, "auto")
        programs += tiled.plan(str(layout), index).programs()
    programs = list(dict.fromkeys(programs))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first_s", "cached_s"):
            begin = time.perf_counter()
            Builder(Nvrtc(), KernelStore(Path(folder))).machine_codes(programs)
            seconds[name] = round(time.perf_counter() - begin, 3)
    return {"programs": len(programs), "cores": os.cpu_count() or 0, **seconds}


def read_bandwidth() -> float:
    """TB/s of a kernel that only reads 4 GB."""
    data = torch.randint(0, 255, (1 << 32,), dtype=torch.uint8, device="cuda")
    read = reader(early=False)
    return data.numel() / graph_us(lambda _: read(data, data.numel()), 1) / 1e6


def reader(*, early: bool) -> Callable[[Tensor, int], None]:
    """Reads so many bytes of a tensor, which are made a multiple of 16."""
    index = torch.cuda.current_device()
    arch = nvrtc.target(f"sm_{tiled.target_of(index).arch}")
    program = Program((("read.cu", READ),), (("EARLY", str(int(early))),), arch)
    kernel = Kernel(tiled.builder().machine_code(program), "read_all", index, 3)
    kernel.overlap = early and kernel.overlap
    shape = Shape((2 * tiled.target_of(index).multiprocessors, 1, 1), 1024)

    def read(data: Tensor, size: int) -> None:
        kernel.launch(shape, driver.current_stream(index), data.data_ptr() // 16 * 16, data.data_ptr(), size // 16)

    return read


def print_summary(group_size: int, rows: list[Row]) -> None:
    """Geometric means over the shapes, a line for each number of rows."""
    ratios = {
        "time/floor": ("us", "floor_us"),
        "plain/floor": ("plain_us", "floor_us"),
        "exllama/floor": ("exllama_us", "floor_us"),
        "cuBLAS/ours": ("cublas_us", "us"),
        "int4/ours": ("torch_int4_us", "us"),
    }
    print(f"\ngroup size {group_size}, geometric means\n    M  " + "  ".join(f"{name:>13}" for name in ratios))
    for m in sorted({int(str(row["m"])) for row in rows}):
        text = f"{m:5}  "
        for over, under in ratios.values():
            both = [row for row in rows if row["m"] == m and over in row]
            values = [float(str(row[over])) / float(str(row[under])) for row in both]
            text += f"{geometric_mean(values):13.2f}  " if values else f"{'-':>13}  "
        print(text.rstrip())


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def commit() -> str:
    """The commit that is checked out, `+dirty` where files differ from it; "unknown" outside a repository."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "HEAD")
    return head + "+dirty" * bool(git("status", "--porcelain")) if head else "unknown"


if __name__ == "__main__":
    sys.exit(main())
