"""`awq_rt.quantize`: a dense checkpoint to a 4-bit one, one decoder block after another."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..checkpoint import write_checkpoint
from ..checkpoint.writer import MAX_SHARD_BYTES
from ..conversion import describe
from ..errors import CannotPack, DestinationExists, InvalidSetting, TokenizerMismatch, UnsupportedDevice
from ..memory import Trimmer
from ..models.architecture import tokenizer
from .block import packable, round_block, search_block
from .calibration import Calibration, Source, calibration_samples, check_vocabulary
from .groups import TOKENS, Structure, find_structure
from .packing import packed_tensors, packed_weight, restore
from .report import BlockReport, Report, TuningReport, write_report
from .settings import Settings
from .source import DenseSource, as_stored
from .store import Store
from .streaming import Block, Call, StreamedModel
from .tuning import Teacher, tune, write_text

Progress = Callable[[str, int, int], None]


def quantize(
    model: str | Path | nn.Module,
    out: str | Path,
    *,
    calibration: Source = None,
    tokenizer: Any = None,
    device: str | torch.device | None = None,
    force: bool = False,
    restart: bool = False,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **settings: Any,
) -> Report:
    """Write the dense `model` (a folder, a hub id, or a transformers model) to the folder `out` in 4 bits.

    `settings` are the fields of `Settings`: method "awq" or "rtn", group_size, zero_point, layout, samples, length,
    seed, ... `calibration` is None for the bundled text, a text or `.jsonl` file, a Hugging Face data set's name, or a
    list of strings or token ids. `device` defaults to a GPU where there is one. Memory holds one block and the
    calibration's hidden states; with `tuning` the whole model in float32 in the end. Finished blocks are kept beside
    `out`: the same call takes an interrupted run up again, `restart` begins anew. `progress` is called with (what is
    done, how much of it, and of how much).

    A transformers model in memory is written beside `out` first, with `tokenizer`, and always begun anew.

    Raises a `CheckpointError` for a bad source, a `QuantizeError` for what cannot be quantised, a `WriteError` for a
    bad destination (which is then as it was); NotImplementedError for architectures whose blocks cannot be run one by
    one.
    """
    chosen = Settings(**settings)
    destination = Path(out)
    if destination.exists() and not force:
        raise DestinationExists(f"{destination} exists; choose another name, or force")
    if isinstance(model, nn.Module):
        with _written(model, tokenizer, destination) as folder:
            return quantize(
                folder, out, calibration=calibration, device=device, force=force, restart=True,
                trust_remote_code=trust_remote_code, progress=progress, max_shard_bytes=max_shard_bytes, **settings,
            )  # fmt: skip
    if tokenizer is not None:
        raise InvalidSetting(f"tokenizer goes with a model in memory; that of {model} is read from beside it")
    source = DenseSource(model, revision=revision, token=token)
    run = _Run(source, chosen, _device(device), progress or (lambda *_: None), trust_remote_code)
    text = run.calibration(calibration) if chosen.method == "awq" else None
    store = Store(destination, run.identity(text), restart=restart)
    started = time.perf_counter()
    with _fast_matmul(run.device):
        reports, resumed = run.blocks(store, text)
        tuning = run.tune(store, reports) if chosen.tuning else None
    config = run.config()
    run.progress("writing", len(reports), len(reports))
    write_checkpoint(
        destination, run.tensors(store), config, beside=source.source, force=force, max_shard_bytes=max_shard_bytes
    )
    report = Report(
        destination,
        chosen.to_json(),
        None if text is None else text.source,
        0 if text is None else text.tokens.numel(),
        _device_name(run.device),
        time.perf_counter() - started,
        tuple(reports),
        resumed,
        tuning,
    )
    write_report(report, destination)
    store.remove()
    return report


@contextmanager
def _written(model: nn.Module, tokenizer: Any, destination: Path) -> Iterator[Path]:
    """A transformers model in a folder beside `destination`, for as long as it is needed."""
    if not hasattr(model, "save_pretrained"):
        raise InvalidSetting(
            f"model is a {type(model).__name__}; a folder, a hub id or a transformers model is expected"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.dense-") as folder:
        parts: tuple[Any, ...] = (model, tokenizer)
        for part in parts:
            if part is not None:
                part.save_pretrained(folder)
        yield Path(folder)


class _Run:
    """One quantisation: the model, block by block, and what becomes of each."""

    def __init__(
        self, source: DenseSource, settings: Settings, device: torch.device, progress: Progress, remote_code: bool
    ):
        self.source, self.settings, self.device, self.progress = source, settings, device, progress
        self.remote_code = remote_code
        self.model = StreamedModel(source, device, trust_remote_code=remote_code)
        self.packable = [packable(block, settings) for block in self.model.blocks]
        self._structures: dict[Any, Structure] = {}
        self._tuned: dict[str, Tensor] = {}
        self._memory = Trimmer()
        self._check_packable()
        self._check_outside()

    def calibration(self, source: Source) -> Calibration:
        tokenizer = _tokenizer(self.source.root, self.remote_code)
        settings = self.settings
        found = calibration_samples(
            source, tokenizer, samples=settings.samples, length=settings.length, seed=settings.seed
        )
        check_vocabulary(found, self.model.vocabulary)
        return found

    def identity(self, text: Calibration | None) -> dict[str, Any]:
        """What finished blocks depend on, in words that an unfinished run is compared by."""
        digest = None if text is None else text.digest
        settings = {name: value for name, value in self.settings.to_json().items() if name != "tuning"}
        return {
            "awq_rt": __version__,
            "source": self.source.digest,
            "calibration": digest,
            "device": self.device.type,
            **settings,
        }

    def blocks(self, store: Store, text: Calibration | None) -> tuple[list[BlockReport], int]:
        """(every block's report, how many blocks an earlier run had finished). All tensors are in `store`
        afterwards."""
        hidden: Tensor | None = None
        calls: list[Call] = []
        short: list[Call] = []
        if text is not None:
            self.progress("reading the text", 0, len(self.model.blocks))
            hidden, calls = self.model.embed(text.tokens)
            _, short = self.model.embed(text.tokens[:1, :TOKENS])
        reports, resumed = [], 0
        for number, block in enumerate(self.model.blocks):
            self.progress(block.path, number, len(self.model.blocks))
            report = store.report(number)
            last = number == len(self.model.blocks) - 1
            if report is not None:
                resumed += 1
                if hidden is not None and not last:
                    with self.model.loaded(block):
                        self._advance(block, number, store, calls[number], hidden)
            else:
                with self.model.loaded(block):
                    report = self._quantize(block, number, store, hidden, calls, short)
                    if hidden is not None and not last:
                        self._advance(block, number, store, calls[number], hidden)
            reports.append(report)
        return reports, resumed

    def tune(self, store: Store, reports: list[BlockReport]) -> TuningReport:
        """Tune the finished blocks together. They come behind the others in `store`, and are what is written."""
        settings, blocks = self.settings, self.model.blocks
        with self.model.whole() as model:
            text = write_text(model, settings.tuning, settings.seed, partial(self.progress, "tuning: writing text"))
            teacher = Teacher(model, text, partial(self.progress, "tuning: reading it"))
            weights = []
            for number, (block, chosen) in enumerate(zip(blocks, self.packable, strict=True)):
                stored = store.tensors(number)
                restore(block, stored, chosen.shapes, settings.layout)
                weights += [
                    (
                        block.module.get_submodule(path),
                        packed_weight(block, path, stored, shape, settings.layout, self.device),
                    )
                    for path, shape in chosen.shapes.items()
                ]
            tuned, report = tune(
                model, weights, teacher, steps=settings.tuning, seed=settings.seed,
                progress=partial(self.progress, "tuning"),
            )  # fmt: skip
            remaining = iter(tuned)
            for number, (block, chosen) in enumerate(zip(blocks, self.packable, strict=True)):
                own = {path: next(remaining) for path in chosen.shapes}
                tensors = packed_tensors(block, own, settings.layout, settings.stored_dtype)
                store.save(len(blocks) + number, tensors, reports[number])
            self._tuned = {
                stored_name: as_stored(stored_name, vector, settings.stored_dtype).cpu()
                for name, stored_name in self.model.outside.items()
                if (vector := model.get_parameter(name)).dim() == 1
            }
        return report

    def config(self) -> dict[str, Any]:
        """config.json of the result."""
        packed = self._packed_names()
        renamed = {name for block in self.model.blocks for name, _ in block.stored.values()}
        matrices = [n for n, info in self.source.tensors.items() if len(info.shape) == 2 and n not in renamed]
        matrices += [
            name
            for block in self.model.blocks
            for path in block.stored
            if block.module.get_parameter(path).dim() == 2
            for name in block.names[path]
        ]
        dense = [prefix for name in matrices if (prefix := name.removesuffix(".weight")) not in packed]
        settings = self.settings
        stated = describe(settings.layout, settings.group_size, dense, packed=sorted(packed))
        config = {**self.source.config, "quantization_config": stated}
        for holder in (config, config.get("text_config")):
            for key in ("dtype", "torch_dtype"):
                if isinstance(holder, dict) and key in holder:
                    holder[key] = settings.dtype
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = settings.dtype  # read by every release of transformers
        return config

    def tensors(self, store: Store) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the result by name: the source's own order outside the blocks, then the blocks."""
        for name, tensor in self._outside():
            yield name, self._tuned.get(name, tensor)
        first = len(self.model.blocks) if self.settings.tuning else 0
        for number in range(len(self.model.blocks)):
            yield from store.tensors(first + number).items()

    def _quantize(
        self,
        block: Block,
        number: int,
        store: Store,
        hidden: Tensor | None,
        calls: list[Call],
        short: list[Call],
    ) -> BlockReport:
        chosen, settings = self.packable[number], self.settings
        if hidden is None:
            weights, report = round_block(block, chosen, settings)
        else:
            structure = self._structure(block, short[number], hidden[:1, :TOKENS])
            weights, report = search_block(block, chosen, structure, calls[number], hidden, settings)
        tensors = packed_tensors(block, weights, settings.layout, settings.stored_dtype)
        store.save(number, tensors, report)
        self._memory.worked_through(sum(4 * p.numel() for p in block.module.parameters()))
        return report

    def _advance(self, block: Block, number: int, store: Store, call: Call, hidden: Tensor) -> None:
        """Run the loaded block as it was stored: `hidden` becomes what the next block will see."""
        restore(block, store.tensors(number), self.packable[number].shapes, self.settings.layout)
        with torch.no_grad():
            for sample in hidden:
                sample.copy_(call(block.module, sample[None])[0])

    def _structure(self, block: Block, call: Call, hidden: Tensor) -> Structure:
        """The block's groups, found once for all blocks of the same make."""
        make = tuple((path, type(m), _shapes(m)) for path, m in block.module.named_modules())
        if make not in self._structures:
            self._structures[make] = find_structure(block.module, call, hidden, self.model.config)
        return self._structures[make]

    def _packed_names(self) -> set[str]:
        return {
            name.removesuffix(".weight")
            for block, chosen in zip(self.model.blocks, self.packable, strict=True)
            for path in chosen.shapes
            for name in block.names[f"{path}.weight"]
        }

    def _outside(self) -> Iterator[tuple[str, Tensor]]:
        """The result's tensors outside the blocks."""
        inside = {name for block in self.model.blocks for name in block.sources}
        for name in self.source.tensors:
            if name not in inside:
                yield name, self.source.stored(name, self.settings.stored_dtype)

    def _check_outside(self) -> None:
        """Raise `NonFiniteWeights` now rather than when the work is done."""
        for _, tensor in self._outside():
            self._memory.worked_through(tensor.nbytes)

    def _check_packable(self) -> None:
        dense = {name: reason for chosen in self.packable for name, reason in chosen.dense.items()}
        unfit = {name: reason for name, reason in dense.items() if "to be skipped" not in reason}
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in list(unfit.items())[:5])
        if not any(chosen.shapes for chosen in self.packable):
            raise CannotPack(
                f"no linear of {self.source.root} can be packed"
                + (f":\n  {listed}" if listed else "; its blocks hold no nn.Linear that is not to be skipped")
            )
        if unfit and self.settings.strict:
            more = f"\n  and {len(unfit) - 5} more" if len(unfit) > 5 else ""
            raise CannotPack(f"{len(unfit)} linears cannot be packed, and strict was asked for:\n  {listed}{more}")


def _shapes(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedDevice(f"device {str(device)!r} cannot be used: {error}") from error
    return chosen


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def _fast_matmul(device: torch.device) -> Iterator[None]:
    """Products of float32 on tensor cores: their 11 bits are those of float16 activations, and sums stay in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _tokenizer(root: Path, trust_remote_code: bool) -> Any:
    try:
        return tokenizer(root, trust_remote_code)
    except Exception as error:  # tokenizers raise whatever their library does
        raise TokenizerMismatch(f"{root}: the tokenizer cannot be used: {error}") from error
