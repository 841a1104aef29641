"""How long quantising takes, in how much memory, and what it costs in perplexity.

    python tools/bench_quantize.py MODEL --text GPL-3 --text topics.txt   a dense model; perplexity on local texts
    python tools/bench_quantize.py --shape 7b                             random weights of Llama-2-7B's shape
    python tools/bench_quantize.py MODEL --text GPL-3 --peer FOLDER       beside a checkpoint of other software

Every row is a process of its own, so that peaks are its own. Times include reading the model and writing the result.
Appends to benchmarks/quantize.json, and keeps the last run's plot of its losses beside it.
"""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch
from bench_reference import ROOT, commit
from safetensors.torch import save_file

from awq_rt.quantization.report import PLOT_NAME

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
SHARD_LAYERS = 8


@click.command()
@click.argument("model", required=False)
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this shape instead of MODEL.")
@click.option("--layers", type=int, help="Fewer blocks than the shape has; said in the row.")
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--max-windows", type=int, help="Windows of 512 tokens read of each text, at most.")
@click.option("--method", "methods", multiple=True, default=("dense", "awq", "rtn"), show_default=True)
@click.option("--calibration", help="As for `awq-rt quantize`.")
@click.option("--group-size", default=128, show_default=True)
@click.option("--samples", default=128, show_default=True)
@click.option("--length", default=512, show_default=True)
@click.option("--tuning", default=0, show_default=True, help="Steps, as for `awq-rt quantize`.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--name", help="The model's name in the rows.")
@click.option("--peer", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkpoint to evaluate.")
@click.option("--peer-name", help="Which software wrote it, and from what.")
@click.option("--note", help="What else should be known of the rows.")
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "benchmarks" / "quantize.json")
def main(
    model: str | None,
    shape: str | None,
    layers: int | None,
    texts: tuple[Path, ...],
    max_windows: int | None,
    methods: tuple[str, ...],
    out: Path,
    name: str | None,
    peer: Path | None,
    peer_name: str | None,
    note: str | None,
    **options: Any,
) -> None:
    """Measure, print and record."""
    if (model is None) == (shape is None):
        raise click.UsageError("give MODEL or --shape")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if shape is not None:
            model = str(Path(folder, "dense"))
            largest = write_random(Path(model), {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})})
            name = f"random, {shape} shape" + (f", {layers} layers" if layers else "")
        assert model is not None
        name = name or Path(model).name
        if texts and "dense" in methods:
            rows.append({"model": name, "method": "dense", "perplexity": perplexities(model, texts, max_windows)})
        for method in (method for method in methods if method != "dense"):
            packed = Path(folder, method)
            row = {"model": name, "method": method, **measured(model, packed, method, random=bool(shape), **options)}
            if shape is not None:
                row["largest_shard_gb"] = largest
            if texts:
                row["perplexity"] = perplexities(str(packed), texts, max_windows)
            if note:
                row["note"] = note
            rows.append(row)
            click.echo(json.dumps(row))
            if shape is None and (packed / PLOT_NAME).is_file():
                shutil.copyfile(packed / PLOT_NAME, out.with_suffix(".png"))
        if peer is not None:
            found = perplexities(str(peer), texts, max_windows)
            rows.append({"model": name, "method": peer_name or peer.name, "perplexity": found})
    command = f"python tools/bench_quantize.py {' '.join(sys.argv[1:])}"
    before = json.loads(out.read_text()) if out.is_file() else {"command": command, "rows": []}
    if before["command"] != command:
        command = f"{before['command']}; {command}"
    record = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": command,
        "rows": [*before["rows"], *rows],
    }
    out.write_text(json.dumps(record, indent=1) + "\n")


def measured(model: str, out: Path, method: str, **options: Any) -> dict[str, Any]:
    """One run of `awq_rt.quantize` in a process of its own."""
    arguments = json.dumps({"model": model, "out": str(out), "method": method, **options})
    done = subprocess.run(
        [sys.executable, __file__, "--measure", arguments], check=True, text=True, stdout=subprocess.PIPE
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(arguments: dict[str, Any]) -> None:
    """In the process of its own: quantise, and print what it took."""
    import transformers  # noqa: F401 (its import is no part of the time)

    from awq_rt.quantization import quantize

    before_bytes = status("VmRSS")
    started, calibration = time.perf_counter(), arguments["calibration"]
    if arguments["random"]:  # no tokenizer: token ids
        shape = (arguments["samples"], arguments["length"])
        calibration = torch.randint(1000, 30000, shape, generator=torch.Generator().manual_seed(0)).tolist()
    blocks: list[float] = []
    steps: list[float] = []

    def mark(what: str, done: int, total: int) -> None:
        if what == "tuning":
            steps.append(time.perf_counter())
        elif not what.startswith("tuning"):
            blocks.append(time.perf_counter())

    report = quantize(
        arguments["model"],
        arguments["out"],
        progress=mark,
        method=arguments["method"],
        calibration=calibration,
        group_size=arguments["group_size"],
        samples=arguments["samples"],
        length=arguments["length"],
        tuning=arguments["tuning"] if arguments["method"] == "awq" else 0,
        device=arguments["device"],
    )
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    on_gpu = arguments["device"].startswith("cuda")
    row = {
        "group_size": arguments["group_size"],
        "tokens": report.tokens,
        **({} if report.tuning is None else {"tuning": {**asdict(report.tuning), "seconds_per_step": apart(steps)}}),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds_per_block": apart(blocks[1:]),  # the first mark is of the text
        "device": report.device,
        "threads": torch.get_num_threads(),
        "peak_host_gb": round(status("VmHWM") / 1e9, 2),
        "host_gb_before": round(before_bytes / 1e9, 2),
        "peak_device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2) if on_gpu else None,
    }
    click.echo(json.dumps(row))


def apart(marks: list[float]) -> float | None:
    """Seconds from one to the next, median; None where there is one only."""
    seconds = [late - early for early, late in itertools.pairwise(marks)]
    return round(statistics.median(seconds), 2) if seconds else None


def perplexities(model: str, texts: tuple[Path, ...], max_windows: int | None) -> dict[str, float]:
    """Text -> perplexity, by `awq-rt eval`."""
    command = [sys.executable, "-c", "from awq_rt.cli import main; main()", "eval", model, "--json"]
    command += [argument for text in texts for argument in ("--text", str(text))]
    command += ["--max-windows", str(max_windows)] if max_windows else []
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    found = json.loads(done.stdout)["texts"]
    return {Path(text).name: round(result["perplexity"], 3) for text, result in found.items()}


def status(key: str) -> int:
    """A field of this process's status, in bytes."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(key))


def write_random(folder: Path, sizes: dict[str, int]) -> float:
    """A dense float16 Llama checkpoint in shards of some blocks each; returns the largest shard in GB.

    Made where there is a GPU on the GPU: values do not matter, but must be random, of a trained model's size.
    """
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes, tie_word_embeddings=False, torch_dtype="float16")
    hidden, ffn = config.hidden_size, config.intermediate_size
    keys = config.num_key_value_heads * config.head_dim
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"}
    shapes |= {f"self_attn.{name}_proj": (keys, hidden) for name in "kv"}
    shapes |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder.mkdir(parents=True)
    weight_map, largest = {}, 0

    def save(tensors: dict[str, torch.Tensor]) -> None:
        nonlocal largest
        file_name = f"shard-{len(set(weight_map.values())):02d}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file_name)
        weight_map.update(dict.fromkeys(tensors, file_name))
        largest = max(largest, sum(tensor.nbytes for tensor in tensors.values()))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float16, device=device) * 0.02

    save({name: random(config.vocab_size, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")})
    pending: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(hidden, dtype=torch.float16)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        pending |= {f"{prefix}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            pending[f"{prefix}.{norm}.weight"] = 1 + random(hidden)
        if (layer + 1) % SHARD_LAYERS == 0 or layer + 1 == config.num_hidden_layers:
            save(pending)
            pending = {}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return round(largest / 1e9, 2)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(json.loads(sys.argv[2]))
    else:
        main()
