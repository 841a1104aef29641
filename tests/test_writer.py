"""A checkpoint appears whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from builders import some_weights, write_json, write_layout
from safetensors import safe_open
from torch import Tensor

from awq_rt.checkpoint import open_checkpoint, write_checkpoint, writer
from awq_rt.errors import CheckpointError, CheckpointNotFound, DestinationExists, WriteError

TENSORS = {f"layers.{i}.weight": torch.full((10, 10), float(i)) for i in range(5)}  # 400 bytes each


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def failing(error: Exception) -> Iterator[tuple[str, Tensor]]:
    yield from list(TENSORS.items())[:3]
    raise error


def read_all(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    return tensors


def assert_same(read: dict[str, Tensor], written: dict[str, Tensor]) -> None:
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())


def test_a_small_checkpoint_is_one_file_without_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "new", TENSORS.items(), {"model_type": "llama"})
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"model.safetensors", "config.json"}
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"model_type": "llama"}
    assert_same(read_all(tmp_path / "new"), TENSORS)


@pytest.mark.parametrize(("limit", "shards"), [(2000, 1), (1999, 2), (800, 3), (799, 5), (1, 5), (0, 5)])
def test_shards_stay_under_the_limit_and_the_index_is_true(tmp_path: Path, limit: int, shards: int) -> None:
    write_checkpoint(tmp_path / "new", TENSORS.items(), {}, max_shard_bytes=limit)
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) == shards
    assert_same(read_all(tmp_path / "new"), TENSORS)
    if shards > 1:
        assert [path.name for path in files] == [
            f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)
        ]
        index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 2000
        for name, file_name in index["weight_map"].items():
            with safe_open(tmp_path / "new" / file_name, framework="pt") as file:
                assert name in file.keys()  # noqa: SIM118 (not a mapping)
        assert index["weight_map"].keys() == TENSORS.keys()


def test_what_transformers_looks_for_in_a_shard_is_there(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "new", TENSORS.items(), {})
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_that_share_memory_are_written_as_two(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"embed.weight": whole, "lm_head.weight": whole, "rows.weight": whole[1:], "columns.weight": whole[:, 1:]}
    write_checkpoint(tmp_path / "new", tensors.items(), {})
    assert_same(read_all(tmp_path / "new"), tensors)


def test_small_files_come_along_and_old_statements_do_not(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    kept = {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "modeling.py", "vocab.tiktoken"}
    left = {"quant_config.json", "quantize_config.json", "model.safetensors.index.json", "pytorch_model.bin", "a.png"}
    for name in kept | left | {"config.json"}:
        (beside / name).write_text(f"old {name}")
    (beside / "folder.json").mkdir()
    write_checkpoint(tmp_path / "new", TENSORS.items(), {"new": True}, beside=beside)
    assert {path.name for path in (tmp_path / "new").iterdir()} == kept | {"config.json", "model.safetensors"}
    assert (tmp_path / "new" / "merges.txt").read_text() == "old merges.txt"
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"new": True}


@pytest.mark.parametrize("subfolder", [".", "awq"])
def test_links_into_the_blobs_of_the_hubs_cache_are_copied_as_files(tmp_path: Path, subfolder: str) -> None:
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    (tmp_path / "cache" / "blobs" / "0123").write_text("content")
    beside = tmp_path / "cache" / "snapshots" / "main" / subfolder
    beside.mkdir(parents=True)
    (beside / "tokenizer.json").symlink_to(os.path.relpath(tmp_path / "cache" / "blobs" / "0123", beside))
    (tmp_path / "linked").symlink_to(beside)
    for number, folder in enumerate((beside, tmp_path / "linked")):
        write_checkpoint(tmp_path / f"new {number}", TENSORS.items(), {}, beside=folder)
        copy = tmp_path / f"new {number}" / "tokenizer.json"
        assert (copy.read_text(), copy.is_symlink()) == ("content", False)


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "other").write_text("not of this cache")
    (beside / "real.json").write_text("content")
    (beside / "tokenizer.json").symlink_to(beside / "real.json")
    (beside / "notes.txt").symlink_to(tmp_path / "secret")
    (beside / "vocab.json").symlink_to(os.path.relpath(tmp_path / "secret", beside))
    (beside / "merges.txt").symlink_to(tmp_path / "blobs" / "other")
    (beside / "lost.json").symlink_to(tmp_path / "nowhere")
    write_checkpoint(tmp_path / "new", TENSORS.items(), {}, beside=beside)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"config.json", "model.safetensors", "real.json", "tokenizer.json"}


def test_beside_a_single_file_only_well_known_names_are_copied(tmp_path: Path) -> None:
    downloads = tmp_path / "Downloads"
    downloads.mkdir()
    kept = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
        "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja", "preprocessor_config.json",
        "spiece.model",
    }  # fmt: skip
    left = {"passwords.txt", "diary.json", "script.py", "other.model", "my_tokenizer.json", "config.json", "other.pt"}
    for name in kept | left | {"model.pt"}:
        (downloads / name).write_text("{}")
    write_checkpoint(tmp_path / "new", TENSORS.items(), {}, beside=downloads / "model.pt")
    assert {path.name for path in (tmp_path / "new").iterdir()} == kept | {"config.json", "model.safetensors"}


def test_the_folder_has_the_rights_of_any_new_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "new", TENSORS.items(), {})
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a" / "b" / "new", TENSORS.items(), {})
    assert_same(read_all(tmp_path / "a" / "b" / "new"), TENSORS)


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_an_existing_destination_is_refused_before_a_tensor_is_read(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "old"
    if kind == "file":
        destination.write_text("precious")
    else:
        destination.mkdir()
        if kind == "folder":
            (destination / "precious").write_text("precious")
    with pytest.raises(DestinationExists, match=r"old exists; choose another name, or force"):
        write_checkpoint(destination, failing(AssertionError("read")), {})
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_force_replaces_the_whole_destination(tmp_path: Path) -> None:
    destination = tmp_path / "old"
    write_checkpoint(destination, {"old.weight": torch.ones(3)}.items(), {"old": True}, max_shard_bytes=1)
    (destination / "stale.txt").write_text("stale")
    write_checkpoint(destination, TENSORS.items(), {"old": False}, force=True, max_shard_bytes=1)
    assert not (destination / "stale.txt").exists()
    assert_same(read_all(destination), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_force_does_not_replace_what_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "old"
    precious = destination if kind == "file" else destination / "precious"
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("precious")
    with pytest.raises(DestinationExists, match="no checkpoint"):
        write_checkpoint(destination, TENSORS.items(), {}, force=True)
    assert precious.read_text() == "precious"


def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_checkpoint(tmp_path / "link", TENSORS.items(), {}, force=True)
    assert (tmp_path / "target" / "precious").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("depth", [1, 2])
def test_not_even_force_replaces_a_folder_that_holds_the_source(tmp_path: Path, depth: int) -> None:
    source = write_layout(tmp_path / "models" / "owner" / "source", some_weights(), "gemm")
    before = content(tmp_path)
    with pytest.raises(DestinationExists, match="holds the source"):
        write_checkpoint(source.parents[depth - 1], TENSORS.items(), {}, beside=source, force=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), CheckpointError("a bad tensor"), KeyboardInterrupt()])
@pytest.mark.parametrize("force", [False, True], ids=["new", "replacing"])
def test_an_exception_midway_leaves_everything_as_it_was(tmp_path: Path, error: Exception, force: bool) -> None:
    destination = tmp_path / "model"
    if force:
        write_checkpoint(destination, {"old.weight": torch.ones(3)}.items(), {"old": True})
    before = content(tmp_path)
    with pytest.raises(type(error)):
        write_checkpoint(destination, failing(error), {}, force=force, max_shard_bytes=1)
    assert content(tmp_path) == before
    assert destination.exists() is force
    assert len(list(tmp_path.iterdir())) == int(force)


@pytest.mark.parametrize("what", ["save_file", "copyfile", "_swap"])
def test_a_full_disk_is_a_write_error_that_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    beside, destination = tmp_path / "beside", tmp_path / "model"
    beside.mkdir()
    write_json(beside / "tokenizer.json", {})
    write_checkpoint(destination, {"old.weight": torch.ones(3)}.items(), {"old": True})
    before = content(tmp_path)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.shutil if what == "copyfile" else writer, what, full)
    with pytest.raises(WriteError, match=r"model could not be written \(.*No space left on device\); it is as it was"):
        write_checkpoint(destination, TENSORS.items(), {}, beside=beside, force=True)
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"beside", "model"}


@pytest.mark.parametrize("failing", [{"new to name"}, {"old away"}, {"new to name", "old back"}], ids=sorted)
def test_a_rename_that_fails_never_loses_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: set[str]
) -> None:
    destination = tmp_path / "model"
    write_checkpoint(destination, {"old.weight": torch.ones(3)}.items(), {"old": True})
    before = content(destination)
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        step = "old away" if source == destination else "old back" if source.name == "old" else "new to name"
        if step in failing and destination in (source, target):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(writer.os, "rename", fails)
    with pytest.raises(WriteError, match="it is now .*/old" if "old back" in failing else "it is as it was"):
        write_checkpoint(destination, TENSORS.items(), {}, force=True)
    if "old back" in failing:
        (kept,) = tmp_path.glob(".model.*/old")
        assert content(kept) == before
    else:
        assert content(destination) == before
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_parent_that_is_a_file_is_a_write_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="could not be written"):
        write_checkpoint(tmp_path / "file" / "model", TENSORS.items(), {})


SCRIPT = """
import sys
from pathlib import Path
from awq_rt.conversion import convert

def progress(done, total, name):
    if done == 1:
        {midway}

convert(sys.argv[1], sys.argv[2], "gemv", progress=progress, force=True, max_shard_bytes=1)
"""


def converting(source: Path, destination: Path, midway: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(midway=midway), str(source), str(destination)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_a_kill_midway_leaves_the_destination_and_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", some_weights(), "gemm")
    destination = write_layout(tmp_path / "model", some_weights(), "gemv_fast")
    before = content(destination)
    with converting(source, destination, "print('midway', flush=True); import signal; signal.pause()") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "midway\n"
        process.send_signal(signal.SIGKILL)
    assert content(destination) == before
    left = [path for path in tmp_path.iterdir() if path.name not in ("source", "model")]
    assert len(left) == 1
    assert left[0].name.startswith(".model.")
    assert list(left[0].iterdir()), "some shards were written already"
    with pytest.raises(CheckpointNotFound):
        open_checkpoint(left[0])


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
def test_a_file_that_may_not_grow_is_a_write_error_that_leaves_everything_as_it_was(tmp_path: Path) -> None:
    source = write_layout(tmp_path / "source", some_weights(), "gemm")
    before = content(tmp_path)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    with converting(source, tmp_path / "model", limit) as process:
        _, errors = process.communicate(timeout=60)
    assert f"WriteError: {tmp_path / 'model'} could not be written (" in errors
    assert "File too large" in errors
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
