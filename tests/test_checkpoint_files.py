"""From a path or a hub id to files: indexes that lie, shards that are not there, a hub that does not answer."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from builders import some_weights, write_json, write_layout, write_shards
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from awq_rt.checkpoint import open_checkpoint
from awq_rt.checkpoint.files import locate
from awq_rt.errors import (
    CheckpointNotFound,
    CorruptFile,
    HubUnavailable,
    InvalidConfig,
    InvalidTensor,
    MissingShard,
    MissingTensor,
)

INDEX = "model.safetensors.index.json"
http = importlib.import_module(hub_errors.HfHubHTTPError.__bases__[0].__module__.split(".")[0])
"""The HTTP library that this release of huggingface_hub is built on: httpx or httpx2."""


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "sharded", some_weights(), "gemm", dense={"norm.weight": torch.ones(4)}, shards=3)


def weight_map(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / INDEX).read_text())["weight_map"]
    return found


def test_a_folder_and_a_single_file_open(tmp_path: Path) -> None:
    folder = write_layout(tmp_path, some_weights(), "gemm")
    assert list(open_checkpoint(folder)) == list(open_checkpoint(str(folder / "model.safetensors")))


@pytest.mark.parametrize(
    "path",
    ["/no/such/folder", "./no/such", "no/such/model.pt", "no-such.safetensors", "two words", "", "a/b/c",
     "/" + "x" * 300, "~no-such-user/model", "nul\0byte", "owner/--", "owner/n..", "owner/n.git", "owner/" + "x" * 100],
)  # fmt: skip
def test_what_is_neither_a_path_nor_a_hub_id_is_not_found(path: str) -> None:
    with pytest.raises(CheckpointNotFound, match="not a file or folder here, and not a hub id"):
        locate(path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    with pytest.raises(CheckpointNotFound, match=r"expected one of model\.safetensors.*; found config\.json"):
        locate(tmp_path)


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="found nothing"):
        locate(tmp_path)


def test_safetensors_are_preferred_to_pickles_and_training_states_are_no_weights(tmp_path: Path) -> None:
    write_layout(tmp_path, some_weights(), "gemm")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter.safetensors"):
        (tmp_path / name).write_bytes(b"never opened")
    assert [path.name for path in locate(tmp_path).weights] == ["model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointNotFound):
        locate(tmp_path)


def test_a_folder_whose_name_ends_like_weights_is_none(tmp_path: Path) -> None:
    for name in ("model.safetensors", "runs.pt", "old.bin"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointNotFound, match="holds no weights"):
        locate(tmp_path)


@pytest.mark.parametrize("lost", [[2], [1, 2], [1, 2, 3]])
def test_a_missing_shard_is_named_with_the_index_that_names_it(sharded: Path, lost: list[int]) -> None:
    for number in lost:
        (sharded / f"model-{number:05d}-of-00003.safetensors").unlink()
    message = rf"index\.json names 3 files, of which {len(lost)} are missing: model-0000{lost[0]}-of.*; download"
    with pytest.raises(MissingShard, match=message):
        open_checkpoint(sharded)


def test_shards_without_their_index_must_still_be_complete(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert len(open_checkpoint(sharded)) == 2
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(MissingShard, match=r"model-00002-of-00003\.safetensors"):
        open_checkpoint(sharded)


def test_a_cut_shard_is_corrupt(sharded: Path) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CorruptFile, match="model-00003-of-00003"):
        open_checkpoint(sharded)


def test_an_index_that_names_absent_tensors_is_from_another_version(sharded: Path) -> None:
    places = weight_map(sharded)
    write_json(sharded / INDEX, {"weight_map": places | {"lm_head.weight": next(iter(places.values()))}})
    with pytest.raises(MissingTensor, match=r"places lm_head\.weight in model-0000.*\(1 such tensors\)"):
        open_checkpoint(sharded)


def test_an_index_that_swaps_two_files_is_from_another_version(sharded: Path) -> None:
    places = weight_map(sharded)
    first, second = next(iter(places)), list(places)[-1]
    assert places[first] != places[second]
    write_json(sharded / INDEX, {"weight_map": places | {first: places[second], second: places[first]}})
    with pytest.raises(MissingTensor, match=r"\(2 such tensors\)"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    one, two = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    name, tensor = next(iter(load_file(one).items()))
    save_file(load_file(two) | {name: tensor}, two)
    with pytest.raises(InvalidTensor, match=f"{name} is in {one.name} and again in {two.name}"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "place",
    ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", "./model.safetensors",
     "..", ".", "", "x" * 300, 7, None, []],
    ids="{!r:.30}".format,
)  # fmt: skip
def test_an_index_leads_to_plain_names_in_its_own_folder_only(sharded: Path, place: object) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "outside.safetensors")
    (sharded / "sub").mkdir()
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "sub" / "model.safetensors")
    write_json(sharded / INDEX, {"weight_map": {**weight_map(sharded), "evil": place}})
    with pytest.raises(InvalidConfig, match=r"places evil in .*; a file name is expected"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b'{"weight_map": {}}', b'{"weight_map": []}', b"{}", b"[" * 100_000],
    ids=["empty", "cut", "list", "string", "not UTF-8", "no tensors", "list inside", "no weight_map", "nested"],
)
def test_an_index_that_cannot_be_one_is_refused(sharded: Path, content: bytes) -> None:
    (sharded / INDEX).write_bytes(content)
    with pytest.raises(InvalidConfig, match=r"index\.json.*download it again|index\.json holds a"):
        open_checkpoint(sharded)


def test_pickled_shards_have_an_index_too(tmp_path: Path) -> None:
    weights = some_weights()
    folder = write_layout(tmp_path / "whole", weights, "gemm", dense={"norm.weight": torch.ones(4)})
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    (folder / "model.safetensors").unlink()
    places = {}
    for number in (0, 1):
        torch.save({name: tensors[name] for name in names[number::2]}, folder / f"pytorch_model-{number}.bin")
        places |= dict.fromkeys(names[number::2], f"pytorch_model-{number}.bin")
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": places})
    checkpoint = open_checkpoint(folder)
    assert all(checkpoint[name].equal(weight) for name, weight in weights.items())


STALE = {"weight_map": {"old.weight": "pytorch_model-00001-of-00001.bin"}}


@pytest.mark.parametrize("name", ["model.safetensors", "awq_model.safetensors"])
def test_a_stale_index_of_pickles_does_not_go_before_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = write_layout(tmp_path / "source", some_weights(), "gemm")
    (folder / "model.safetensors").rename(folder / name)
    write_json(folder / "pytorch_model.bin.index.json", STALE)
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"never opened")
    assert [path.name for path in locate(folder).weights] == [name]
    hub = Hub(folder, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert len(open_checkpoint("owner/model")) == 2
    assert hub.fetched == {"config.json", "pytorch_model.bin.index.json", name}


def test_an_index_of_safetensors_goes_before_a_whole_file_and_everything_else(sharded: Path) -> None:
    write_json(sharded / "pytorch_model.bin.index.json", STALE)
    (sharded / "model.safetensors").write_bytes(b"never opened")
    assert locate(sharded).index == weight_map(sharded)


def test_pickles_with_an_index_are_fetched_by_it_though_mistrals_own_format_lies_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_layout(tmp_path / "source", some_weights(), "gemm", pickle=True)
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-1.bin")
    (folder / "pytorch_model-2.bin").write_bytes(b"not named by the index")
    (folder / "consolidated.safetensors").write_bytes(b"never opened")
    names = torch.load(folder / "pytorch_model-1.bin", weights_only=True)
    write_json(folder / "pytorch_model.bin.index.json", {"weight_map": dict.fromkeys(names, "pytorch_model-1.bin")})
    hub = Hub(folder, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert len(open_checkpoint("owner/model")) == 2
    assert "pytorch_model-2.bin" not in hub.fetched


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of huggingface_hub, offline."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def cached(cache: Path, source: Path, revision: str = "main", commit: str = COMMIT) -> Path:
    """`source` as huggingface_hub would have cached owner/model: blobs, links to them in a snapshot, a ref."""
    root = cache / "models--owner--model"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(sorted(source.iterdir())):
        blob = root / "blobs" / f"{commit[:8]}{number:032x}"
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    (root / "refs" / revision).write_text(commit)
    return snapshot


def test_a_hub_id_opens_from_the_cache_without_network(sharded: Path, hub_cache: Path) -> None:
    snapshot = cached(hub_cache, sharded)
    checkpoint = open_checkpoint("owner/model")
    assert checkpoint.root == snapshot
    assert all(checkpoint[name].equal(weight) for name, weight in some_weights().items())


def test_a_revision_is_a_branch_or_a_commit(tmp_path: Path, hub_cache: Path) -> None:
    one, two = some_weights(kind="random"), some_weights(kind="symmetric")
    cached(hub_cache, write_layout(tmp_path / "one", one, "gemm"))
    cached(hub_cache, write_layout(tmp_path / "two", two, "gemm"), "dev", "f" * 40)
    name = next(iter(one))
    assert open_checkpoint("owner/model")[name].equal(one[name])
    assert open_checkpoint("owner/model", revision="dev")[name].equal(two[name])
    assert open_checkpoint("owner/model", revision="f" * 40)[name].equal(two[name])
    with pytest.raises(HubUnavailable, match="owner/model at revision v2 is not a folder here, not in the hub's cache"):
        open_checkpoint("owner/model", revision="v2")


def test_a_hub_id_that_is_not_cached_is_unavailable_offline(hub_cache: Path) -> None:
    with pytest.raises(HubUnavailable, match=r"owner/model is not a folder here.*HF_HUB_OFFLINE"):
        open_checkpoint("owner/model")


def test_a_cached_configuration_without_its_weights_is_no_checkpoint(tmp_path: Path, hub_cache: Path) -> None:
    (tmp_path / "source").mkdir()
    write_json(tmp_path / "source" / "config.json", {})
    cached(hub_cache, tmp_path / "source")
    with pytest.raises(CheckpointNotFound, match="holds no weights"):
        open_checkpoint("owner/model")


def test_a_hub_that_refuses_the_connection_is_unavailable_at_once(tmp_path: Path) -> None:
    with socket.socket() as closed:  # bound and not listening: a port where nobody answers
        closed.bind(("127.0.0.1", 0))
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path),
        }
        script = "from awq_rt.checkpoint.files import locate; locate('owner/model')"
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert "HubUnavailable: owner/model is not a folder here" in run.stderr
    assert "check the name and the network" in run.stderr


def answer(status: int) -> Any:
    return http.Response(status, request=http.Request("GET", "https://hub.invalid/api/models/owner/model"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (hub_errors.GatedRepoError("gated", response=answer(403)), "needs permission: ask for it on its page"),
        (hub_errors.RepositoryNotFoundError("404", response=answer(404)), "no repository 'owner/model' that this"),
        (hub_errors.RevisionNotFoundError("404 at v2", response=answer(404)), "could not be fetched: 404 at v2"),
        (hub_errors.HfHubHTTPError("500 Server Error", response=answer(500)), "could not be fetched: 500"),
        (hub_errors.LocalEntryNotFoundError("not cached"), "could not be fetched: not cached"),
        (http.ProxyError("proxy refused"), "could not be fetched: proxy refused"),
        (http.ReadTimeout("timed out"), "could not be fetched: timed out"),
        (OSError(28, "No space left on device"), "could not be fetched: .*No space left"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_every_fault_of_the_hub_is_a_sentence(monkeypatch: pytest.MonkeyPatch, fault: Exception, message: str) -> None:
    def snapshot_download(*args: Any, **options: Any) -> str:
        raise fault

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HubUnavailable, match=message):
        locate("owner/model", revision="v2")


class Hub:
    """A repository behind `snapshot_download`: fetches what the patterns allow, and remembers what it was asked."""

    def __init__(self, files: Path, snapshot: Path):
        self.files, self.snapshot = files, snapshot
        self.asked: list[dict[str, Any]] = []
        snapshot.mkdir()

    def snapshot_download(self, repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        self.asked.append({"repository": repository, **options})
        names = [path.name for path in self.files.iterdir()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(self.files / name, self.snapshot / name)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {path.name for path in self.snapshot.iterdir()}


SMALL = {"config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "modeling_x.py", "merges.txt"}
LARGE_AND_USELESS = {"optimizer.pt", "model.gguf", "model.onnx", "README.md", "image.png"}


@pytest.mark.parametrize(
    ("arrange", "weights"),
    [
        (lambda folder: None, {"model.safetensors"}),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), {"model.safetensors"}),
        (lambda folder: (folder / "consolidated.safetensors").write_bytes(b"x"), {"model.safetensors"}),
        (lambda folder: (folder / "model.safetensors").rename(folder / "awq_model.safetensors"),
         {"awq_model.safetensors"}),
    ],
    ids=["one file", "a pickle beside", "Mistral's own format beside", "another name"],
)  # fmt: skip
def test_only_the_files_that_are_needed_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrange: Callable[[Path], object], weights: set[str]
) -> None:
    source = write_layout(tmp_path / "source", some_weights(), "gemm")
    for name in (SMALL | LARGE_AND_USELESS) - {"config.json"}:
        (source / name).write_text("{}")
    arrange(source)
    hub = Hub(source, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert len(open_checkpoint("owner/model", revision="v2", token="secret")) == 2
    assert hub.fetched == SMALL | weights
    assert all(asked == {"repository": "owner/model", "revision": "v2", "token": "secret"} for asked in hub.asked)


def test_only_the_shards_that_the_index_names_are_fetched(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(sharded, {"other": torch.ones(1)})  # a second, whole file that the index does not name
    hub = Hub(sharded, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert len(open_checkpoint("owner/model")) == 2
    assert hub.fetched == {"config.json", INDEX, *weight_map(sharded).values()}


def test_an_index_from_the_hub_is_checked_before_anything_is_fetched_by_it(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(sharded / INDEX, {"weight_map": {"evil": "../*"}})
    hub = Hub(sharded, tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(InvalidConfig, match="places evil in"):
        open_checkpoint("owner/model")
    assert hub.fetched == {"config.json", INDEX}


def test_an_index_does_not_lead_out_by_a_link(sharded: Path, tmp_path: Path) -> None:
    shard = next(sharded.glob("model-00001*"))
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidConfig, match=r"model-00001.* is a link to .*elsewhere, outside"):
        open_checkpoint(sharded)
    (tmp_path / "elsewhere").rename(sharded / "kept")
    shard.unlink()
    shard.symlink_to("kept")
    open_checkpoint(sharded)
