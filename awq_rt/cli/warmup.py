"""`awq-rt warmup`: kernels that are compiled at run time, compiled now."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from .console import console
from .options import checkpoint_options

if TYPE_CHECKING:
    import torch

    from ..backend import LinearSpec, Prepared

DTYPES = ("float16", "bfloat16")

COMMON_GROUP_SIZE = 128
COMMON_SHAPES = (
    # (in_features, out_features), linears that read the same input as one and by themselves
    (4096, 4096), (4096, 12288), (4096, 11008), (4096, 22016), (11008, 4096),  # Llama 2 7B
    (4096, 1024), (4096, 6144), (4096, 14336), (4096, 28672), (14336, 4096),  # Llama 3 8B, Mistral 7B
    (3584, 3584), (3584, 512), (3584, 4608), (3584, 18944), (3584, 37888), (18944, 3584),  # Qwen2.5 7B
    (8192, 8192), (8192, 1024), (8192, 10240), (8192, 28672), (8192, 57344), (28672, 8192),  # Llama 2 and 3 70B
)  # fmt: skip


@click.command()
@click.argument("model", required=False)
@click.option("--device", help="cuda:0, ...  [default: the best there is]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of activations.  [default: as `generate` chooses]")
@click.option("--backend", help="A backend by name.  [default: the best that serves each linear]")
@click.option("--kernel", default="auto", show_default=True, help="A kernel family: gemv, gemm, exllama, ...")
@checkpoint_options
def warmup(
    model: str | None, device: str | None, dtype: str | None, backend: str | None, kernel: str, **opening: Any
) -> None:
    """Compile ahead what a model needs.

    MODEL is a folder, a file or a hub id; only headers of its files are read. Without MODEL it is what common models
    need. What is in the cache already is not compiled again; AWQ_RT_CACHE moves the cache.
    """
    from .. import cache, open_checkpoint, registry
    from .. import warmup as ahead

    if model is None:
        specs = common_specs(_dtype(dtype, {}), kernel)
    else:
        checkpoint = open_checkpoint(model, **opening)
        specs = ahead.specs_of(checkpoint, _dtype(dtype, checkpoint.config), kernel)
    target = registry.default_device() if device is None else registry.checked_device(device)
    where = registry.device_for(target)
    started = time.perf_counter()
    prepared = _shown(ahead.warmup(specs, target, backend))
    if not prepared:
        click.echo(f"nothing to compile: no backend for {where} compiles kernels at run time")
        return
    compiled = sum(kernel.compiled for kernel in prepared)
    click.echo(
        f"{len(prepared)} kernels are ready for {where}: {compiled} compiled, {len(prepared) - compiled} from the "
        f"cache in {cache.cache_dir()}, {time.perf_counter() - started:.1f} s"
    )


def common_specs(dtype: torch.dtype, kernel: str) -> list[LinearSpec]:
    """What linears of common models ask of a backend."""
    from ..backend import LinearSpec

    return [LinearSpec(k, n, COMMON_GROUP_SIZE, dtype, kernel=kernel, scale_dtype=dtype) for k, n in COMMON_SHAPES]


def _dtype(dtype: str | None, config: dict[str, Any]) -> torch.dtype:
    """The dtype asked for, else the one that `load` chooses on a GPU."""
    import torch

    own = config.get("dtype") or config.get("torch_dtype")
    return torch.bfloat16 if (dtype or own) == "bfloat16" else torch.float16


def _shown(kernels: Iterable[Prepared]) -> list[Prepared]:
    """All of `kernels`, with a line that says how far they are where somebody looks."""
    err = console(stderr=True)
    found = []
    with err.status("looking for kernels") as status:
        for kernel in kernels:
            found.append(kernel)
            status.update(f"{kernel.done} of {kernel.total} kernels, {kernel.name}")
    return found
