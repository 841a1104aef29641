"""AutoAWQ's interface: programs written for `from awq import AutoAWQForCausalLM` need another import and nothing else.

Every argument of AutoAWQ 0.2.9 is there. What has no counterpart here is refused with a reason; what only bounded
AutoAWQ's memory, which is bounded here anyway, is warned about when it is set. Three defaults differ: code in a
checkpoint runs only with `trust_remote_code=True`; without `calib_data` the bundled text is used, no download; and
without `max_seq_len` there is no limit to the length of a generation.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from . import registry
from .cache import cache_dir
from .checkpoint import Checkpoint, open_checkpoint
from .conversion import convert
from .errors import DestinationExists, InvalidCalibration, InvalidConfig, InvalidSetting
from .models import load
from .quantization import quantize
from .quantization.calibration import Source, calibration_samples
from .quantization.source import DenseSource

DATA_SETS = {"pileval": ("mit-han-lab/pile-val-backup", None), "wikitext": ("wikitext", "wikitext-2-raw-v1")}
"""AutoAWQ's short names: a data set on the hub and its configuration."""

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", re.IGNORECASE)
SEED = 42
"""With which AutoAWQ shuffles the calibration data."""


class AutoAWQForCausalLM:
    """The class that AutoAWQ's programs import. Made by `from_pretrained` (dense) or `from_quantized` (4-bit) only."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError("make one with AutoAWQForCausalLM.from_pretrained or AutoAWQForCausalLM.from_quantized")

    @classmethod
    def from_pretrained(
        cls,
        model_path: str | Path,
        torch_dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        safetensors: bool = True,
        device_map: Any = None,
        download_kwargs: Mapping[str, Any] | None = None,
        low_cpu_mem_usage: bool = True,
        use_cache: bool = False,
        **model_init_kwargs: Any,
    ) -> AwqModel:
        """A dense model that waits to be quantised. Its weights are read block by block then, or when it generates.

        `torch_dtype` is that of what is saved; "auto" is float16, in which AutoAWQ packs. `device_map` names the one
        device that quantises.
        """
        download = _download(download_kwargs, model_init_kwargs)
        attention = model_init_kwargs.pop("attn_implementation", None)
        _nothing_left("from_pretrained", model_init_kwargs)
        if not low_cpu_mem_usage:
            _no_effect("low_cpu_mem_usage=False", "one block at a time is read")
        source = DenseSource(model_path, **download)
        _check_files(source.root, safetensors)
        options = {"trust_remote_code": trust_remote_code, "use_cache": use_cache, "attn_implementation": attention}
        return AwqModel(source=source, dtype=torch_dtype, device=_one_device(device_map), options=options)

    @classmethod
    def from_quantized(
        cls,
        quant_path: str | Path,
        quant_filename: str = "",
        max_seq_len: int | None = None,
        trust_remote_code: bool = False,
        fuse_layers: bool = True,
        use_exllama: bool = False,
        use_exllama_v2: bool = False,
        use_ipex: bool = False,
        batch_size: int = 1,
        safetensors: bool = True,
        device_map: Any = "balanced",
        max_memory: Mapping[Any, Any] | None = None,
        offload_folder: str | Path | None = None,
        download_kwargs: Mapping[str, Any] | None = None,
        **config_kwargs: Any,
    ) -> AwqModel:
        """A 4-bit model, fused where its architecture allows unless `fuse_layers` is False.

        `max_seq_len` allots the cache once, for so many positions in all. `use_exllama` and `use_exllama_v2` ask for
        the one family of kernels of that name. `torch_dtype` and `attn_implementation` may be among `config_kwargs`.
        """
        download = _download(download_kwargs, config_kwargs)
        if use_exllama and use_exllama_v2:
            raise InvalidConfig("use_exllama and use_exllama_v2 are both set; choose one, they are one family here")
        if use_ipex:
            _no_effect("use_ipex=True", "awq_rt has CPU kernels of its own")
        if batch_size != 1:
            _no_effect(f"batch_size={batch_size}", "the cache takes the batch that comes")
        if config_kwargs.get("max_new_tokens") is not None:  # its old name
            max_seq_len = config_kwargs.pop("max_new_tokens")
        options = {name: config_kwargs.pop(name, None) for name in ("torch_dtype", "dtype", "attn_implementation")}
        _nothing_left("from_quantized", config_kwargs)
        placed: dict[str, Any] = {"max_memory": max_memory, "offload_folder": offload_folder}
        checkpoint = open_checkpoint(quant_path, **download)
        if quant_filename:
            checkpoint = open_checkpoint(checkpoint.root / quant_filename)
        _check_files(checkpoint.root, safetensors)
        model = load(
            checkpoint,
            dtype=options["dtype"] or options["torch_dtype"],
            kernel="exllama" if use_exllama or use_exllama_v2 else "auto",
            device_map=device_map,
            attn_implementation=options["attn_implementation"],
            trust_remote_code=trust_remote_code,
            fuse="auto" if fuse_layers else False,
            max_seq_len=max_seq_len,
            **{name: value for name, value in placed.items() if value is not None},
        )
        return AwqModel(model=model, checkpoint=checkpoint)


class AwqModel:
    """What AutoAWQ's calls return: `model` is transformers' model, and what is not found here is looked for there."""

    def __init__(
        self,
        *,
        model: Any = None,
        checkpoint: Checkpoint | None = None,
        source: DenseSource | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        self._model, self._checkpoint, self._source = model, checkpoint, source
        self._dtype, self._device, self._options = dtype, device, dict(options or {})

    @property
    def model(self) -> Any:
        """The transformers model: dense until `quantize` was called, then 4-bit."""
        if self._model is None and self._checkpoint is not None:
            self._model = load(self._checkpoint, device=self._device, trust_remote_code=self._remote_code)
        elif self._model is None:
            self._model = self._dense_model()
        return self._model

    @property
    def is_quantized(self) -> bool:
        return self._checkpoint is not None

    @property
    def quant_config(self) -> dict[str, Any]:
        """The `quantization_config` of the 4-bit checkpoint; empty for a dense model."""
        return dict(self._checkpoint.quantization.raw) if self._checkpoint is not None else {}

    @property
    def model_type(self) -> str:
        described = self._checkpoint or self._source
        assert described is not None
        return str(described.config.get("model_type"))

    def quantize(
        self,
        tokenizer: Any = None,
        quant_config: Mapping[str, Any] | None = None,
        calib_data: str | Path | Sequence[str] | Sequence[Sequence[int]] | None = None,
        split: str = "train",
        text_column: str = "text",
        duo_scaling: bool = True,
        export_compatible: bool = False,
        apply_clip: bool = True,
        n_parallel_calib_samples: int | None = None,
        max_calib_samples: int = 128,
        max_calib_seq_len: int = 512,
        max_chunk_memory: int | None = None,
        quantizer_cls: Any = None,
    ) -> None:
        """Quantise with AWQ's search. The result lies in the cache folder until `save_quantized`, or until this object
        goes.

        `calib_data` is the name of a data set (also "pileval", "wikitext"), a text or `.jsonl` file, or a list of
        strings or of token ids; None is the bundled text.
        """
        if self._source is None:
            raise InvalidConfig("this model was loaded by from_quantized; only one of from_pretrained can be quantised")
        if export_compatible:
            raise NotImplementedError(
                "export_compatible=True scales the weights without packing them; awq_rt writes packed checkpoints only"
            )
        if quantizer_cls is not None:
            raise NotImplementedError(f"quantizer_cls={quantizer_cls!r}: the search is awq_rt's own")
        for name, value in (
            ("n_parallel_calib_samples", n_parallel_calib_samples),
            ("max_chunk_memory", max_chunk_memory),
        ):
            if value is not None:
                _no_effect(f"{name}={value}", "memory holds one block and the hidden states whatever it is")
        settings = _settings(quant_config or {})
        text = calibration_samples(
            _documents(calib_data, split, text_column, max_calib_samples),
            tokenizer,
            samples=max_calib_samples,
            length=max_calib_seq_len,
            seed=SEED,
        )
        home = cache_dir()
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = Path(tempfile.mkdtemp(prefix="quantized-", dir=home))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        quantize(
            self._source.source,
            folder / "model",
            calibration=text.tokens.tolist(),
            device=self._device,
            trust_remote_code=self._remote_code,
            samples=len(text.tokens),
            length=max_calib_seq_len,
            grid="autoawq" if duo_scaling else "original",
            clip=apply_clip,
            seed=SEED,
            dtype=_dtype_name(self._dtype),
            **settings,
        )
        self._checkpoint, self._model = open_checkpoint(folder / "model"), None

    def save_quantized(self, save_dir: str | Path, safetensors: bool = True, shard_size: str | int = "5GB") -> None:
        """Write the 4-bit checkpoint to the folder `save_dir`, which may exist if it is empty."""
        if self._checkpoint is None:
            raise InvalidConfig("the model is not quantised yet; call quantize first")
        if not safetensors:
            raise NotImplementedError("safetensors=False writes pickles, which awq_rt does not; leave it out")
        destination = Path(save_dir)
        empty = destination.is_dir() and not any(destination.iterdir())
        if destination.exists() and not empty:
            raise DestinationExists(f"{destination} exists and is not empty; choose another name or remove it")
        layout = self._checkpoint.layout
        convert(self._checkpoint.source, destination, layout, force=empty, max_shard_bytes=_bytes(shard_size))

    def generate(self, *args: Any, max_seq_len: int | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`. `max_seq_len`, which AutoAWQ's example passes, is its `max_length`."""
        if max_seq_len is not None:
            kwargs.setdefault("max_length", max_seq_len)
        return self.model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    __call__ = forward

    def to(self, *args: Any, **kwargs: Any) -> AwqModel:
        self.model.to(*args, **kwargs)
        return self

    def eval(self) -> AwqModel:
        self.model.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # before there is a model to ask
            raise AttributeError(name)
        return getattr(self.model, name)

    @property
    def _remote_code(self) -> bool:
        return bool(self._options.get("trust_remote_code"))

    def _dense_model(self) -> Any:
        from .models.architecture import dense_model

        assert self._source is not None
        options = {"trust_remote_code": False} | {n: value for n, value in self._options.items() if value is not None}
        model = dense_model(self._source.root, dtype=self._dtype, **options)
        return model.to(self._device or registry.default_device())


def get_best_device() -> str:
    """The device that AutoAWQ's `awq.utils.utils.get_best_device` names: the first that can be used, else "cpu"."""
    return str(registry.default_device())


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings for AutoAWQ's `quant_config`. Raises `InvalidSetting` for what it cannot say."""
    left = dict(config)
    bits = left.pop("w_bit", left.pop("bits", 4))
    if bits != 4:
        raise InvalidSetting(f"quant_config has w_bit {bits!r}; awq_rt packs 4 bits")
    method = left.pop("quant_method", "awq")
    if str(method).lower() != "awq":
        raise InvalidSetting(f"quant_config has quant_method {method!r}; 'awq' is expected")
    version = str(left.pop("version", "gemm")).lower()
    settings = {
        "group_size": left.pop("q_group_size", left.pop("group_size", 128)),
        "zero_point": left.pop("zero_point", True),
        "layout": version,
        "skip": tuple(left.pop("modules_to_not_convert", None) or ()),
    }
    if left:
        raise InvalidSetting(
            f"quant_config has {', '.join(sorted(left))}, which means nothing here; known are w_bit, q_group_size, "
            "zero_point, version and modules_to_not_convert"
        )
    return settings


def _documents(data: Any, split: str, column: str, samples: int) -> Source:
    """The calibration data as `calibration_samples` takes it. A data set is read as far as it is needed."""
    if not isinstance(data, str) or Path(data).is_file():
        return data  # type: ignore[no-any-return]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InvalidCalibration(
            f"calib_data {data!r} is no file here, and data sets need `pip install datasets`; "
            "leave calib_data out to use the bundled text"
        ) from error
    name, part = DATA_SETS.get(data, (data, None))
    try:
        rows = load_dataset(name, part, split="validation" if data == "pileval" else split, streaming=True)
        return [str(row[column]) for row in islice(rows, 8 * samples)]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidCalibration(f"the data set {name!r} cannot be read: {error}") from error


def _download(given: Mapping[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """`revision` and `token` out of `download_kwargs` or the other arguments, from which they are taken."""
    download = dict(given or {})
    if unknown := set(download) - {"revision", "token"}:
        raise InvalidConfig(
            f"download_kwargs has {', '.join(sorted(unknown))}; revision and token are known here, the place of the "
            "cache is the environment variable HF_HOME, and HF_HUB_OFFLINE=1 allows it only"
        )
    return {**{name: more.pop(name) for name in ("revision", "token") if name in more}, **download}


def _one_device(device_map: Any) -> Any:
    """The device that a device map names, None where it leaves the choice."""
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise InvalidConfig(f"device_map names {len(places)} devices; quantising holds one block, on one device")
        device_map = places.pop()
    return None if device_map in (None, "auto", "balanced", "balanced_low_0", "sequential") else device_map


def _check_files(root: Path, safetensors: bool) -> None:
    if not safetensors and any(root.glob("*.safetensors")):
        raise InvalidConfig(f"safetensors=False, but {root} holds safetensors files, which are what is read")


def _dtype_name(dtype: str | torch.dtype) -> str:
    return "float16" if dtype == "auto" else str(dtype).removeprefix("torch.")


def _bytes(size: str | int) -> int:
    """5000000000 for "5GB". Raises `InvalidConfig`."""
    if isinstance(size, int):
        return size
    found = SIZE.fullmatch(size.strip())
    if found is None:
        raise InvalidConfig(f"shard_size is {size!r}; a number of bytes, or words like '5GB' or '500MiB', are expected")
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))


def _no_effect(argument: str, reason: str) -> None:
    warnings.warn(f"{argument} has no effect: {reason}", UserWarning, stacklevel=3)


def _nothing_left(call: str, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise TypeError(f"{call} has no meaning for {', '.join(sorted(arguments))} here; leave them out")
