"""Tensors in a safetensors file or a pickle, opened lazily and checked before anything is allocated.

safetensors' own reader checks every offset against the file; torch's `weights_only` unpickler builds tensors in plain
containers, and is shown only pickles that ask for nothing but these. Neither is ever bypassed.
"""

from __future__ import annotations

import mmap
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CorruptFile, UnsafePickle, UnsupportedFormat
from ..formats import TensorInfo
from .files import check_not_empty

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip

UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, AssertionError,
    struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What zipfile and torch.load raise for a file that is cut or mutated."""

PLAIN_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|"
    r"torch (Size|[A-Z]\w*Storage|b?float\d+|u?int\d+|bool)"
)
"""What a pickled state dict may name. Not `builtins bytearray`, nor `torch.storage UntypedStorage` (which only float8
and unsigned words need): the `weights_only` unpickler would call them with any size that a file asks for.
"""

REMAP_BYTES = 64 << 20
"""A mapping is left to its views after this much was read from it, so that its pages do not add up beside copies."""


def open_file(path: Path) -> SafetensorsFile | PickleFile:
    """The file's tensors. Raises `CorruptFile`, `UnsafePickle` or `UnsupportedFormat`."""
    size = check_not_empty(path)
    if path.suffix == ".gguf":
        raise UnsupportedFormat(f"{path} is a GGUF file, not an AWQ checkpoint; llama.cpp runs it")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path, size)


class SafetensorsFile:
    """A memory-mapped safetensors file. `tensors` are its headers; `read` copies, `view` shares the file's pages."""

    def __init__(self, path: Path):
        self.path = path
        self._read_bytes = 0
        self._file = self._open()
        self.tensors = {name: self._info(name) for name in self._file.keys()}  # noqa: SIM118 (not a mapping)

    def read(self, name: str) -> Tensor:
        return self.view(name).clone()

    def view(self, name: str) -> Tensor:
        if self._read_bytes >= REMAP_BYTES:
            self._read_bytes = 0
            self._file = self._open()
        tensor: Tensor = self._file.get_tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor

    def _open(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{self.path} is no whole safetensors file ({error}); download it again") from error

    def _info(self, name: str) -> TensorInfo:
        header = self._file.get_slice(name)
        dtype = header.get_dtype()
        if dtype not in DTYPES:
            raise UnsupportedFormat(f"{self.path}: {name} has dtype {dtype}, which awq_rt does not read")
        shape = tuple(header.get_shape())
        values = None
        if _holds_a_shape(name, shape, DTYPES[dtype]):
            values = tuple(int(value) for value in self._file.get_tensor(name))
        return TensorInfo(name, shape, DTYPES[dtype], values)


class PickleFile:
    """A state dict written by `torch.save`: llm-awq's `.pt`, or an older `pytorch_model.bin`."""

    def __init__(self, path: Path, size: int):
        self.path = path
        self._state = _plain_tensors(path, size, _load(path, size))
        self.tensors = {
            name: TensorInfo(
                name,
                tuple(tensor.shape),
                tensor.dtype,
                tuple(tensor.tolist()) if _holds_a_shape(name, tuple(tensor.shape), tensor.dtype) else None,
            )
            for name, tensor in self._state.items()
        }

    def read(self, name: str) -> Tensor:
        return self._state[name].clone()

    def view(self, name: str) -> Tensor:
        return self._state[name]


def _holds_a_shape(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the tensor is compressed-tensors' two sizes of a linear."""
    return name.endswith(".weight_shape") and shape == (2,) and dtype in (torch.int64, torch.int32)


def _load(path: Path, size: int) -> object:
    """The unpickled object: mapped where the file is a zip archive, as torch has written them since 1.6."""
    try:
        with path.open("rb") as file:
            archive = file.read(4) == b"PK\x03\x04"  # torch's own criterion; zipfile's differs
        if archive:
            _check_archive(path, size)
        for wanted in _globals(path, archive):
            if not PLAIN_GLOBALS.fullmatch(wanted):
                raise _unsafe(path, f"it asks for {wanted.replace(' ', '.')}")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        # torch's own sentences advise to load the file unsafely; only the name in them is repeated.
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise _unsafe(path, f"it asks for {named[1]}" if named else "torch.save writes no such pickle") from error
    except UNREADABLE as error:
        raise CorruptFile(f"{path} cannot be read as a torch file ({error}); download it again") from error


def _unsafe(path: Path, reason: str) -> UnsafePickle:
    return UnsafePickle(
        f"{path} is not a plain state dict, and was not executed ({reason}); "
        "ask its author for safetensors, or for torch.save(model.state_dict())"
    )


def _globals(path: Path, archive: bool) -> Iterator[str]:
    """Every "module name" that the file's pickles ask for, found without unpickling."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        # An archive is read by torch's reader here as in torch.load, so that both see the same record. Before torch 1.6
        # a file began with five pickles: magic number, protocol, machine, the object, names of storages.
        pickles: list[Any] = [pages] * 5
        if archive:
            pickles = [torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")]
        for stream in pickles:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield str(argument)
                elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                    yield opcode.name  # protocols that torch.save does not write; the name is on the stack


def _check_archive(path: Path, size: int) -> None:
    """Raise `CorruptFile` where a zip archive could unpack to more than it holds: torch stores without compressing."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    claimed = sum(entry.file_size for entry in entries)
    if claimed > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CorruptFile(f"{path} has {size} bytes and unpacks to {claimed}; torch.save writes no such file")


def _plain_tensors(path: Path, size: int, loaded: object) -> dict[str, Tensor]:
    """The mapping of names to tensors in `loaded`, perhaps under "state_dict"; no tensor claims more than `size`."""
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if isinstance(loaded, dict) and loaded.keys() >= {"scale", "clip"}:
        raise UnsupportedFormat(
            f"{path} holds the results of llm-awq's search (its awq_cache), not weights; "
            "the weights are in quant_cache, written with --dump_quant"
        )
    expected = "a mapping from names to tensors is expected"
    if not isinstance(loaded, dict):
        raise UnsafePickle(f"{path} holds a {type(loaded).__name__}; {expected}")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UnsafePickle(f"{path} holds {name}, a {type(tensor).__name__}; {expected}")
        # A tensor of stride 0, say, is larger than its bytes: copying it could take all memory.
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.nbytes > size:
            raise CorruptFile(f"{path}: {name} {list(tensor.shape)} is not stored element by element in the file")
    return {name: tensor.detach() for name, tensor in loaded.items()}


TensorFile = SafetensorsFile | PickleFile
