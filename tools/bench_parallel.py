"""Time decoding on one GPU and on all that are here, a process each; needs NVIDIA GPUs of one host.

    torchrun --nproc-per-node=2 tools/bench_parallel.py --json benchmarks/parallel-2xh200.json

Random 4-bit weights of a model's shape are made on the GPUs, each process keeping its part. The first process decodes
alone, then all together: with sums through peer-mapped memory, then with NCCL's. Greedy, through `model.generate`;
medians over whole generations after two that are not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_kernels import commit

import awq_rt
from awq_rt.bench.bandwidth import read_bandwidth
from awq_rt.bench.limit import step_bytes
from awq_rt.bench.measure import Case, measured, never_ending
from awq_rt.bench.shapes import SHAPES, Shape
from awq_rt.bench.synthetic import SyntheticCheckpoint


def main() -> None:
    arguments = parsed()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=datetime.timedelta(minutes=5))
    host = dist.new_group(backend="gloo")
    rank, device = dist.get_rank(), torch.device("cuda", torch.cuda.current_device())
    name = shape_of(arguments)
    cases = [Case(batch, arguments.prefill, arguments.decode) for batch in arguments.batch]
    rows: list[dict[str, Any]] = []
    if rank == 0:
        rows += timed(load(name, device), cases, arguments.repeats, gpus=1, sums=None)
    wait_for_all(host)
    model = load(name, None)
    group = model.awq_rt_group
    if group.inbox is not None:
        rows += timed(model, cases, arguments.repeats, gpus=group.size, sums="peer memory")
        group.inbox = None
        del model.awq_rt_engine.session  # its graphs hold the sums as they were
    rows += timed(model, cases, arguments.repeats, gpus=group.size, sums="NCCL")
    del model.awq_rt_engine.session  # NCCL waits for graphs that hold its kernels
    if rank == 0:
        report(arguments, rows, read_bandwidth(device))
    dist.barrier(host)
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-70b")
    parser.add_argument("--layers", type=int, help="of the shape, all by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prefill", type=int, default=128)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def shape_of(arguments: argparse.Namespace) -> str:
    """The name under which `SHAPES` has what is asked for."""
    if arguments.layers is None:
        return str(arguments.shape)
    whole = SHAPES[arguments.shape]
    name = f"{arguments.shape}, {arguments.layers} layers"
    SHAPES[name] = Shape(whole.model_type, {**whole.sizes, "num_hidden_layers": arguments.layers}, whole.group_size)
    return name


def load(name: str, device: torch.device | None) -> Any:
    """The model on `device`, or this process's part of it."""
    started = time.perf_counter()
    here = torch.device("cuda", torch.cuda.current_device())
    where: dict[str, Any] = {"tp_plan": "auto"} if device is None else {"device": device}
    model = awq_rt.load(SyntheticCheckpoint(name.replace("/", "-"), here), dtype="float16", fuse=True, **where)
    never_ending(model)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated() / 1e9
    print(f"process {dist.get_rank()}: {name}, {taken:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True)
    return model


def timed(model: Any, cases: list[Case], repeats: int, **what: Any) -> list[dict[str, Any]]:
    rows = []
    for case in cases:
        speed = measured(model, case, repeats)
        least = step_bytes(model, case.batch, case.prefill, case.decode)
        rows.append(
            {
                **what,
                **dataclasses.asdict(case),
                "decode_tps": round(case.batch / speed.step_s, 2),
                "step_us": round(speed.step_s * 1e6, 1),
                "gpu_step_us": None if speed.gpu_step_s is None else round(speed.gpu_step_s * 1e6, 1),
                "first_ms": round(speed.first_s * 1e3, 2),
                "gpu_bytes_a_step": least,
            }
        )
        if dist.get_rank() == 0:
            print(rows[-1], flush=True)
    return rows


def wait_for_all(host: Any) -> None:
    """Free this process's GPU and wait until all have."""
    gc.collect()
    torch.cuda.empty_cache()
    dist.barrier(host)


def report(arguments: argparse.Namespace, rows: list[dict[str, Any]], bandwidth: float) -> None:
    alone = {row["batch"]: row["decode_tps"] for row in rows if row["gpus"] == 1}
    for row in rows:
        row["of_one_gpu"] = round(row["decode_tps"] / alone[row["batch"]], 3)
        print(
            f"{row['gpus']} GPUs, {row['sums'] or 'no'} sums, batch {row['batch']}: {row['decode_tps']} tokens/s, "
            f"{row['of_one_gpu']} of one GPU"
        )
    if arguments.json is not None:
        facts = {
            "device": f"{dist.get_world_size()}x {torch.cuda.get_device_name()}",
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "command": f"torchrun --nproc-per-node={dist.get_world_size()} tools/bench_parallel.py "
            + " ".join(sys.argv[1:]),
            "torch": torch.__version__,
            "shape": arguments.shape,
            "layers": arguments.layers or SHAPES[arguments.shape].sizes["num_hidden_layers"],
            "read_tbps": round(bandwidth / 1e12, 4),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
