"""How long AutoAWQ takes for the work of `bench_quantize.py`, and the checkpoint that it writes.

    python tools/bench_autoawq.py MODEL OUT --group-size 64

Runs in an environment of its own: autoawq 0.2.9, torch, transformers 4.51.3 and datasets; awq_rt is not imported.
Calibrates on the longest paragraphs of awq_rt's bundled text that have at most `--length` tokens, and writes them to
OUT.txt. Then `bench_quantize.py MODEL --calibration OUT.txt --samples 10 --length 128` does the same work. `--blocks`
stops after so many, for a machine on which all of them take too long; nothing but the row is written then.

AutoAWQ keeps "copies" of weights on the CPU that are the weights themselves, and writes a broken model there; here
state dicts are cloned, as they are on a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

TEXT = Path(__file__).parents[1] / "awq_rt" / "quantization" / "text" / "calibration.txt"


def main() -> None:
    """Quantise, print what it took, and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--blocks", type=int, help="How many decoder blocks to quantise.  [default: all]")
    arguments = parser.parse_args()
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    paragraphs = _paragraphs(tokenizer, arguments.samples, arguments.length)
    arguments.out.with_suffix(".txt").write_text("\n\n".join(paragraphs) + "\n")
    model = AutoAWQForCausalLM.from_pretrained(arguments.model, torch_dtype=torch.float32, device_map="cpu")
    _clone_state_dicts()
    layers = model.model.model.layers
    blocks = arguments.blocks or len(layers)
    del layers[blocks:]
    started, cpu = time.perf_counter(), time.process_time()
    model.quantize(
        tokenizer,
        quant_config={"zero_point": True, "q_group_size": arguments.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=paragraphs,
        max_calib_samples=arguments.samples,
        max_calib_seq_len=arguments.length,
    )
    seconds = time.perf_counter() - started
    row = {
        "method": f"autoawq {_autoawq_version()}",
        "group_size": arguments.group_size,
        "blocks": blocks,
        "seconds": round(seconds, 1),
        "seconds_per_block": round(seconds / blocks, 2),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": "cpu",
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row), flush=True)
    if arguments.blocks is None:
        model.save_quantized(str(arguments.out))
        tokenizer.save_pretrained(arguments.out)


def _paragraphs(tokenizer: Any, count: int, length: int) -> list[str]:
    sizes = {part: len(tokenizer(part).input_ids) for part in TEXT.read_text().split("\n\n") if part.strip()}
    return sorted((part for part in sizes if sizes[part] <= length), key=lambda part: -sizes[part])[:count]


def _clone_state_dicts() -> None:
    plain = torch.nn.Module.state_dict

    def cloned(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, *args, **kwargs)
        if "destination" in kwargs:  # of a module within the one that was asked
            return found
        return type(found)((name, value.clone()) for name, value in found.items())

    torch.nn.Module.state_dict = cloned  # type: ignore[method-assign,assignment]


def _autoawq_version() -> str:
    try:
        return version("autoawq")
    except PackageNotFoundError:  # run from its source distribution
        import awq

        return str(awq.__version__)


if __name__ == "__main__":
    main()
