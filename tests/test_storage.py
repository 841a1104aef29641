"""Files that lie: cut, mutated, oversized, or pickles that would run code. Every one is a typed error."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import some_weights, stored
from safetensors.torch import save_file
from torch import Tensor

from awq_rt.checkpoint import open_checkpoint
from awq_rt.checkpoint.storage import open_file
from awq_rt.errors import CheckpointError, CorruptFile, UnsafePickle, UnsupportedFormat


def state_dict() -> dict[str, Tensor]:
    (weight,) = some_weights({"layer": (64, 64, 64)}).values()
    return {f"layer.{suffix}": tensor for suffix, tensor in stored(weight, "gemm").items()} | {
        "norm.weight": torch.ones(4)
    }


def safetensors(header: bytes, content: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + content


@pytest.mark.parametrize("where", ["header length", "header", "start of the data", "last byte"])
def test_a_cut_file_is_corrupt_wherever_it_was_cut(tmp_path: Path, where: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state_dict(), path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    kept = {"header length": 5, "header": header // 2, "start of the data": header, "last byte": len(whole) - 1}
    path.write_bytes(whole[: kept[where]])
    with pytest.raises(CorruptFile, match=r"model\.safetensors is no whole safetensors file .*; download it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pt"])
def test_an_empty_file_is_corrupt(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CorruptFile, match=f"{name} is empty; download it again"):
        open_checkpoint(tmp_path)


TENSOR = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]}
LYING_HEADERS: Mapping[str, bytes] = {
    "a header length beyond the file": safetensors(b"{}", length=1 << 20),
    "a header length beyond memory": safetensors(b"{}", length=(1 << 64) - 1),
    "a header that is no JSON": safetensors(b"\x80\x04garbage"),
    "a header that is a list": safetensors(b"[1, 2, 3]"),
    "a header nested without end": safetensors(b'{"a":' * 50_000),
    "a tensor that is no object": safetensors(b'{"a": 7}', bytes(8)),
    "an unknown dtype": safetensors(json.dumps({"a": TENSOR | {"dtype": "F13"}}).encode(), bytes(8)),
    "a shape larger than its bytes": safetensors(json.dumps({"a": TENSOR | {"shape": [2, 3]}}).encode(), bytes(8)),
    "a shape that overflows": safetensors(json.dumps({"a": TENSOR | {"shape": [1 << 62] * 3}}).encode(), bytes(8)),
    "a negative shape": safetensors(json.dumps({"a": TENSOR | {"shape": [-2, -2]}}).encode(), bytes(8)),
    "offsets beyond the file": safetensors(json.dumps({"a": TENSOR | {"data_offsets": [8, 16]}}).encode(), bytes(8)),
    "offsets that run backwards": safetensors(json.dumps({"a": TENSOR | {"data_offsets": [8, 0]}}).encode(), bytes(8)),
    "tensors that overlap": safetensors(json.dumps({"a": TENSOR, "b": TENSOR}).encode(), bytes(8)),
    "bytes that belong to no tensor": safetensors(json.dumps({"a": TENSOR}).encode(), bytes(64)),
    "an HTML page": b"<!DOCTYPE html><html><body>404: Entry not found</body></html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 113999952\n",
}


@pytest.mark.parametrize("content", LYING_HEADERS.values(), ids=LYING_HEADERS.keys())
def test_a_header_that_lies_is_corrupt(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CorruptFile, match="is no whole safetensors file"):
        open_file(path)


def test_a_dtype_that_torch_has_no_name_for_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(json.dumps({"a": TENSOR | {"dtype": "F8_E8M0", "shape": [8]}}).encode(), bytes(8)))
    with pytest.raises(UnsupportedFormat, match="a has dtype F8_E8M0"):
        open_file(path)


@pytest.mark.parametrize("values", [torch.tensor([float("nan"), 1.0]), torch.tensor([True, False])])
@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_weight_shape_that_holds_no_integers_has_no_values(tmp_path: Path, name: str, values: Tensor) -> None:
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)({"layer.weight_shape": values}, path)
    assert open_file(path).tensors["layer.weight_shape"].values is None


@pytest.mark.parametrize("archive", [True, False], ids=["zip archive", "before torch 1.6"])
@pytest.mark.parametrize("nested", [True, False], ids=["under state_dict", "plain"])
def test_a_plain_state_dict_reads_back(tmp_path: Path, archive: bool, nested: bool) -> None:
    state = state_dict()
    path = tmp_path / "model.pt"
    torch.save({"state_dict": state} if nested else state, path, _use_new_zipfile_serialization=archive)
    file = open_file(path)
    assert file.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(file.read(name), tensor)


def test_parameters_come_back_without_their_gradient(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"scales": torch.nn.Parameter(torch.ones(2))}, path)
    file = open_file(path)
    assert not file.read("scales").requires_grad
    assert not file.view("scales").requires_grad


@pytest.mark.parametrize("archive", [True, False], ids=["zip archive", "before torch 1.6"])
def test_a_modules_state_dict_of_any_dtype_reads_back(tmp_path: Path, archive: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    integers = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
    state = module.state_dict()  # an OrderedDict with _metadata
    state |= {str(dtype): torch.ones(3, dtype=dtype) for dtype in floats + integers}
    state |= {f"parameter.{name}": parameter for name, parameter in module.named_parameters()}
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=archive)
    file = open_file(tmp_path / "model.pt")
    assert all(torch.equal(file.read(name), tensor) for name, tensor in state.items())


class Hoard:
    """Unpickling this calls `function` with a size, which takes that much memory."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return (self.function, (1 << 40,))


@pytest.mark.parametrize("function", [bytearray, torch.UntypedStorage], ids=lambda function: function.__name__)
@pytest.mark.parametrize("archive", [True, False], ids=["zip archive", "before torch 1.6"])
@pytest.mark.parametrize("place", ["value", "key"])
def test_what_would_take_any_amount_of_memory_is_refused_unloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], archive: bool, place: str
) -> None:
    hoard = Hoard(function)
    value = {"a": torch.ones(2), **({"b": hoard} if place == "value" else {hoard: 1})}
    torch.save(value, tmp_path / "model.pt", _use_new_zipfile_serialization=archive)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UnsafePickle, match=rf"asks for \w+(\.\w+)*\.{function.__name__}\b"):
        open_file(tmp_path / "model.pt")


def test_the_names_of_storages_behind_an_old_pickle_are_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt"
    torch.save({}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    names = pickle.dumps([], protocol=2)
    assert whole.endswith(names)
    path.write_bytes(whole.removesuffix(names) + pickle.dumps(Hoard(bytearray), protocol=2))
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UnsafePickle, match=r"asks for __builtin__\.bytearray"):
        open_file(path)


def test_a_hoard_of_173_bytes_behind_a_zip_that_only_zipfile_sees_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(Hoard(bytearray), path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
    with pytest.raises(UnsafePickle, match="bytearray"):
        open_file(path)


class Payload:
    """Unpickling this makes a folder: the proof that code ran."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.witness),))


PICKLERS: Mapping[str, Callable[[object, Path], None]] = {
    "torch.save": lambda value, path: torch.save(value, path),
    "torch.save before 1.6": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle.dump": lambda value, path: path.write_bytes(pickle.dumps(value)) and None,
    "pickle.dump, protocol 0": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)) and None,
}


# The unpickler warns of every protocol that torch.save does not write, and refuses the pickle afterwards.
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", PICKLERS.values(), ids=PICKLERS.keys())
@pytest.mark.parametrize("where", ["alone", "beside tensors", "as a key"])
def test_a_pickle_that_runs_code_is_refused_without_running_it(
    tmp_path: Path, write: Callable[[object, Path], None], where: str
) -> None:
    witness = tmp_path / "the payload ran"
    payload = Payload(witness)
    value = {"alone": payload, "beside tensors": {"a": torch.ones(2), "b": payload}, "as a key": {payload: 1}}[where]
    path = tmp_path / "pytorch_model.bin"
    write(value, path)
    with pytest.raises(UnsafePickle, match=r"was not executed .*; ask its author for safetensors"):
        open_checkpoint(tmp_path)
    assert not witness.exists()
    if write is PICKLERS["pickle.dump"]:
        pickle.loads(path.read_bytes())
        assert witness.exists(), "the payload is harmless: this test proves nothing"


def test_a_pickle_of_custom_classes_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(UnsafePickle, match="not a plain state dict"):
        open_checkpoint(tmp_path)


def test_the_refusal_says_what_the_pickle_asked_for_and_gives_no_unsafe_advice(tmp_path: Path) -> None:
    torch.save(Payload(tmp_path / "the payload ran"), tmp_path / "model.pt")
    with pytest.raises(UnsafePickle) as refusal:
        open_checkpoint(tmp_path)
    assert f"it asks for {os.mkdir.__module__}.mkdir" in str(refusal.value)
    assert "can still be loaded" not in str(refusal.value)
    assert "\033" not in str(refusal.value)


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), {"a": [torch.ones(2)]}, {1: torch.ones(2)}])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "model.pt")
    with pytest.raises(UnsafePickle, match="a mapping from names to tensors is expected"):
        open_checkpoint(tmp_path)


def test_the_entry_that_is_no_tensor_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "layer._extra_state": "text"}, tmp_path / "model.pt")
    with pytest.raises(UnsafePickle, match=r"layer\._extra_state, a str;"):
        open_checkpoint(tmp_path)


def test_the_results_of_a_search_are_not_weights(tmp_path: Path) -> None:
    found = {
        "scale": [("input_layernorm", ("self_attn.q_proj",), torch.ones(4))],
        "clip": [("mlp.up_proj", torch.ones(4, 1, 1))],
    }
    torch.save(found, tmp_path / "opt-125m-w4-g128.pt")
    with pytest.raises(UnsupportedFormat, match=r"results of llm-awq's search .*; the weights are in quant_cache"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(1, dtype=torch.int32).expand(1 << 40, 1 << 10), CorruptFile, r"layer\.qweight"),
        (torch.eye(3).to_sparse(), UnsafePickle, r"asks for torch\._utils\._rebuild_sparse_tensor"),
        (torch.empty(3, device="meta"), UnsafePickle, r"asks for torch\._utils\._rebuild_meta_tensor_no_storage"),
    ],
    ids=["stride 0", "sparse", "no content"],
)
def test_a_pickled_tensor_that_is_not_whole_in_the_file_is_refused(
    tmp_path: Path, tensor: Tensor, error: type[CheckpointError], message: str
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"layer.qweight": tensor}, path)
    with pytest.raises(error, match=message):
        open_file(path)


def rezipped(path: Path, compression: int) -> None:
    """The same entries, stored otherwise."""
    with zipfile.ZipFile(path) as old:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in entries.items():
            new.writestr(name, content)


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"bomb": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CorruptFile, match=r"unpacks to \d+; torch\.save writes no such file"):
        open_file(path)


def test_a_compressed_archive_is_refused_whatever_its_size(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"noise": torch.randint(0, 256, (4096,), dtype=torch.uint8), "zeros": torch.zeros(64)}, path)
    rezipped(path, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("padding", random.Random(0).randbytes(4096), zipfile.ZIP_STORED)
    with pytest.raises(CorruptFile, match=r"torch\.save writes no such file"):
        open_file(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("archive", [True, False], ids=["zip archive", "before torch 1.6"])
def test_a_cut_pickle_is_refused(tmp_path: Path, archive: bool, kept: float) -> None:
    path = tmp_path / "model.pt"
    torch.save(state_dict(), path, _use_new_zipfile_serialization=archive)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    # An old pickle that ends within a name asks for a class that nobody knows.
    with pytest.raises(CorruptFile if archive else (CorruptFile, UnsafePickle), match=r"model\.pt"):
        open_file(path)


def test_a_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model-q4_0.gguf"
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UnsupportedFormat, match="GGUF"):
        open_checkpoint(path)


def mutated(whole: bytes, generator: random.Random) -> bytes:
    """`whole` with a few bytes changed near its start, near its end or anywhere, or cut."""
    content = bytearray(whole)
    if generator.random() < 0.2:
        return bytes(content[: generator.randrange(len(content))])
    for _ in range(generator.randint(1, 5)):
        span = generator.choice((len(content), 600, -400))
        position = generator.randrange(span) if span > 0 else len(content) - 1 - generator.randrange(-span)
        content[position] = generator.randrange(256)
    return bytes(content)


WRITERS: Mapping[str, Callable[[dict[str, Tensor], Path], None]] = {
    "model.safetensors": save_file,
    "model.pt": torch.save,
    "pytorch_model.bin": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("name", "write"), WRITERS.items(), ids=WRITERS.keys())
def test_no_mutation_of_a_file_raises_anything_but_our_errors(
    tmp_path: Path, name: str, write: Callable[[dict[str, Tensor], Path], None]
) -> None:
    path = tmp_path / name
    write(state_dict(), path)
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(400):
        path.write_bytes(mutated(whole, generator))
        with contextlib.suppress(CheckpointError):
            checkpoint = open_checkpoint(tmp_path)
            for linear in checkpoint:
                checkpoint.read(linear)
            for dense in checkpoint.dense:
                checkpoint.view(dense)


def test_a_huge_integer_in_a_pickle_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    pickle.dump({"a": 10**5000}, stream, protocol=2)
    (tmp_path / "model.pt").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)
