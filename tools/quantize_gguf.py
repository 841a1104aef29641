"""A GGUF file as a 4-bit AWQ checkpoint, rounded to nearest: the model of `make demo`.

    python tools/quantize_gguf.py MODEL.gguf OUT [--group-size 64]

GGUF models are quantised already and rounding is not the AWQ search, so this is for trying things out, not for quality.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from awq_rt.checkpoint import write_checkpoint
from awq_rt.conversion import describe, stored_tensors
from awq_rt.rounding import round_to_nearest


@click.command()
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--group-size", default=64, show_default=True)
@click.option("--force", is_flag=True, help="Replace OUT where it exists.")
def main(gguf: Path, out: Path, group_size: int, force: bool) -> None:
    """Quantise the linears of GGUF's decoder blocks and write an AWQ checkpoint (gemm layout) to OUT."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config |= {"quantization_config": describe("gemm", group_size, dense=[]), "dtype": "float16"}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        tokenizer.clean_up_tokenization_spaces = False  # meant for WordPiece; this tokenizer's text needs no mending
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_checkpoint(out, quantised(model, group_size), config, beside=Path(folder), force=force)
    click.echo(f"{out}: {len(packed_linears(model))} linears in 4 bits, groups of {group_size}")


def packed_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linears of the decoder blocks, by name: all but the head."""
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def quantised(model: PreTrainedModel, group_size: int) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, one linear at a time; dense ones in float16, and a tied head left out."""
    linears = packed_linears(model)
    for name, linear in linears.items():
        bias = None if linear.bias is None else linear.bias.detach().half()
        weight = round_to_nearest(linear.weight.detach(), group_size, bias=bias)
        yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in stored_tensors(weight, "gemm").items())
    tied = set(model.all_tied_weights_keys)
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in linears and name not in tied:
            yield name, tensor.half() if tensor.is_floating_point() else tensor


if __name__ == "__main__":
    main()
