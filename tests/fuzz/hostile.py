"""Bytes to a checkpoint folder that somebody spoiled: a valid one of some layout, and edits that the bytes choose.

Edits know the formats (a safetensors header stays JSON, a torch archive stays a zip), so that most of what they make
gets past the first check. The same bytes make the same folder: a failure is repeated from its input.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from builders import LAYOUTS, some_weights, write_layout

Files = dict[str, bytes]
T = TypeVar("T")

NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
)
VALUES: tuple[Any, ...] = (
    None, True, False, "", "0", "gemm", "awq", "../../outside", "/etc/passwd", "\x00", "é\ud800", [], {}, [[]],
    {"": {}}, 1e308, -0.5, float("nan"), float("inf"), ["model"], {"group_size": 2**40}, [0] * 64, "x" * 4096, *NUMBERS,
)  # fmt: skip
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "U64",
    "C64",
    "F4",
    "",
    "i32",
)
SUFFIXES = ("qweight", "qzeros", "scales", "scaled_zeros", "bias", "g_idx", "weight", "weight_packed", "weight_shape")
NAMES = (
    "model.safetensors", "pytorch_model.bin", "model-00001-of-99999.safetensors", "model.pt", "config.json",
    "quant_config.json", "model.safetensors.index.json",
)  # fmt: skip
LINKS = ("/etc/passwd", "../outside", ".", "model.safetensors", "/dev/zero", "/proc/self/environ")


class Choices:
    """Decisions read from bytes, zeros where they end (as a fuzzer's data provider, with nothing of the fuzzer)."""

    def __init__(self, data: bytes):
        self._data = io.BytesIO(data)

    def number(self, below: int) -> int:
        width = max(1, (below.bit_length() + 7) // 8)
        return int.from_bytes(self._data.read(width), "little") % below

    def pick(self, options: Sequence[T]) -> T:
        if not options:
            raise IndexError("there is nothing to choose from")
        return options[self.number(len(options))]

    def bytes(self, length: int) -> bytes:
        return self._data.read(length)


@cache
def seeds() -> tuple[Files, ...]:
    """Valid checkpoints: every layout in one file, one of two shards with an index, one pickle."""
    weights = some_weights({"model.layers.0.q_proj": (256, 256, 64), "model.layers.1.up_proj": (256, 64, 64)})
    even = some_weights({"model.layers.0.q_proj": (128, 256, 128)}, kind="symmetric")
    found = []
    with TemporaryDirectory() as folder:
        for number, layout in enumerate(LAYOUTS):
            write_layout(Path(folder) / str(number), even if layout == "marlin" else weights, layout)
        write_layout(Path(folder) / "sharded", weights, "gemm", shards=2)
        write_layout(Path(folder) / "pickled", weights, "llm-awq", pickle=True)
        for root in sorted(Path(folder).iterdir()):
            found.append({path.name: path.read_bytes() for path in sorted(root.iterdir())})
    return tuple(found)


def spoil(data: bytes, folder: Path) -> None:
    """Write into `folder`, which is empty, the checkpoint that `data` chooses, with at most six edits."""
    choices = Choices(data)
    files = dict(choices.pick(seeds()))
    for _ in range(1 + choices.number(6)):
        choices.pick(EDITS)(files, choices)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if choices.number(16) == 15 and files:
        name = choices.pick(sorted(files))
        (folder / name).unlink()
        os.symlink(choices.pick(LINKS), folder / name)


def spoil_words(data: bytes, folder: Path) -> None:
    """Edit JSON files of the checkpoint in `folder`, three times at most: configuration, generation, tokenizer."""
    choices = Choices(data)
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.json"))}
    for _ in range(1 + choices.number(3)):
        choices.pick((edit_json, edit_json, edit_json, break_json))(files, choices)
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- edits -----------------------------------------------------------------------------------------------------------


def _some_file(files: Files, choices: Choices, *suffixes: str) -> str | None:
    names = [name for name in sorted(files) if name.endswith(suffixes or "")]
    return choices.pick(names) if names else None


def overwrite(files: Files, choices: Choices) -> None:
    """Some bytes become others."""
    if (name := _some_file(files, choices)) and files[name]:
        content = bytearray(files[name])
        for _ in range(1 + choices.number(8)):
            # Headers and directories are at the ends.
            place = choices.pick(
                (choices.number(64), choices.number(len(content)), len(content) - 1 - choices.number(256))
            )
            content[max(0, min(place, len(content) - 1))] = choices.number(256)
        files[name] = bytes(content)


def resize(files: Files, choices: Choices) -> None:
    """A download that was cut, or went on."""
    if name := _some_file(files, choices):
        files[name] = files[name][: choices.number(len(files[name]) + 1)] + choices.bytes(choices.number(64))


def rearrange(files: Files, choices: Choices) -> None:
    """A file is missing, or has another's name."""
    if name := _some_file(files, choices):
        content = files.pop(name)
        if choices.number(2):
            files[choices.pick(NAMES)] = content


def edit_json(files: Files, choices: Choices) -> None:
    """A value somewhere in a JSON file is another, or gone, or under another key."""
    name = _some_file(files, choices, ".json")
    if name is None:
        return
    try:
        document = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    holder: Any = document
    while isinstance(holder, (dict, list)) and holder:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = choices.pick(keys)
        if isinstance(holder[key], (dict, list)) and holder[key] and choices.number(4):
            holder = holder[key]
            continue
        action = choices.number(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[str(choices.pick(VALUES))] = holder.pop(key)
        else:
            holder[key] = choices.pick(VALUES)
        break
    files[name] = json.dumps(document).encode("utf-8", "surrogatepass")


def break_json(files: Files, choices: Choices) -> None:
    """Text that is no JSON, or more of it than a parser likes."""
    if name := _some_file(files, choices, ".json"):
        files[name] = choices.pick(
            (
                b"[" * 50_000,
                b'{"a":' * 50_000,
                b"null",
                b"[]",
                b"{}",
                b"\xff\xfe{",
                b"1" * 10_000,
                b'{"a":1,"a":2}',
                b"",
            )
        )


def edit_header(files: Files, choices: Choices) -> None:
    """A tensor's entry in a safetensors header says something else; the length in front is right again, or wrong."""
    name = _some_file(files, choices, ".safetensors")
    if name is None or len(files[name]) < 8:
        return
    (length,) = struct.unpack("<Q", files[name][:8])
    try:
        header = json.loads(files[name][8 : 8 + length])
        tensor = choices.pick(sorted(key for key in header if key != "__metadata__"))
        entry = header[tensor]
        place, dimension = choices.number(2), choices.number(len(entry["shape"]) or 1)
        action = choices.number(8)
        if action == 0:
            entry["dtype"] = choices.pick(DTYPES)
        elif action == 1:
            entry["shape"][dimension] = choices.pick(NUMBERS)
        elif action == 2:
            entry["shape"] = choices.pick(([], [0], [1] * 64, entry["shape"][::-1], [*entry["shape"], 1], "64", None))
        elif action == 3:
            entry["data_offsets"][place] = choices.pick((*NUMBERS, entry["data_offsets"][1 - place]))
        elif action == 4:
            del header[tensor]
        elif action == 5:
            header[f"{tensor.rpartition('.')[0]}.{choices.pick(SUFFIXES)}"] = header.pop(tensor)
        elif action == 6:
            header[choices.pick((".qweight", "qweight", "a" * 5000, f"{tensor}.qweight", "", "9" * 5000))] = dict(entry)
        else:
            header["__metadata__"] = choices.pick(VALUES)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    said = len(text) if choices.number(8) else choices.number(2**64)
    files[name] = struct.pack("<Q", said) + text + files[name][8 + length :]


def edit_values(files: Files, choices: Choices) -> None:
    """The tensors' own bytes: NaN among the scales, another zero point, padding that is not zero."""
    if name := _some_file(files, choices, ".safetensors"):
        content = bytearray(files[name])
        for _ in range(1 + choices.number(4)):
            place = choices.number(max(1, len(content) - 8))
            content[place : place + 2] = choices.pick((b"\x00\x7e", b"\x00\x7c", b"\x00\x00", b"\xff\xff", b"\x00\xfc"))
        files[name] = bytes(content)


class _Asks:
    """An object whose pickle asks for a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def edit_pickle(files: Files, choices: Choices) -> None:
    """A torch archive whose pickle was cut, spliced, or asks for something; records that claim other sizes."""
    name = _some_file(files, choices, ".bin", ".pt")
    if name is None:
        return
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(files[name])) as source, zipfile.ZipFile(made, "w") as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = _other_pickle(content, choices)
                compressed = choices.number(16) == 15
                target.writestr(entry.filename, content, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, LookupError, EOFError, OSError):
        return
    files[name] = made.getvalue()


OPERANDS = (b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 8, b"K\x00", b"N", b"\x88")
"""Pickle's opcodes for numbers, None and True."""


def _other_pickle(content: bytes, choices: Choices) -> bytes:
    action = choices.number(5)
    if action == 0:  # a number in the stream: sizes, strides, offsets
        place = choices.number(len(content) or 1)
        return content[:place] + choices.pick(OPERANDS) + content[place + 2 :]
    if action == 1:
        return content[: choices.number(len(content) + 1)] + b"."
    if action == 2:
        asked = choices.pick(
            (_Asks(os.system, "exit 1"), _Asks(bytearray, 2**40), _Asks(eval, "1"), _Asks(open, "/tmp/x", "w"))
        )
        return pickle.dumps({"model.layers.0.q_proj.qweight": asked}, protocol=2)
    if action == 3:
        return pickle.dumps(choices.pick(VALUES), protocol=2)
    flipped = bytearray(content)
    for _ in range(1 + choices.number(4)):
        flipped[choices.number(len(flipped))] = choices.number(256)
    return bytes(flipped)


EDITS: tuple[Callable[[Files, Choices], None], ...] = (
    edit_header, edit_json, edit_pickle, edit_values, overwrite, resize, break_json, rearrange,
)  # fmt: skip
