"""The text on which activations are observed, from any of its sources to equally long samples of token ids."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationTooShort, InvalidCalibration, TokenizerMismatch

BUNDLED = Path(__file__).parent / "text" / "calibration.txt"
TEXT_KEYS = ("text", "content", "prompt")
"""Keys of a JSON line, or columns of a data set, that may hold its text; `messages` is read as a conversation."""

Source = str | Path | Sequence[str] | Sequence[Sequence[int]] | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """`tokens` int64 [samples, length]; `source` says where they come from."""

    tokens: Tensor
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.tokens.contiguous().numpy().tobytes()).hexdigest()


def calibration_samples(source: Source, tokenizer: Any, *, samples: int, length: int, seed: int) -> Calibration:
    """At most `samples` samples of `length` tokens from `source`.

    `source` is None for the bundled text, the path of a text file (paragraphs separated by blank lines) or a `.jsonl`
    file, the name of a Hugging Face data set ("owner/name", "owner/name:split"), a list of strings, or a list of token
    id lists. Documents are shuffled with `seed`, joined, and cut; what does not fill a last sample is dropped. Raises
    `InvalidCalibration`, `TokenizerMismatch` where text meets no tokenizer, or `CalibrationTooShort`.
    """
    documents, name = _documents(source)
    rng = random.Random(seed)
    if isinstance(documents, list):
        rng.shuffle(documents)
    wanted, pieces, found = samples * length, [], 0
    for document in documents:
        ids = _ids(document, tokenizer, name)
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        found += len(ids)
        if found >= wanted:
            break
    count = min(samples, found // length)
    if count == 0:
        raise CalibrationTooShort(
            f"{name} gives {found} tokens; at least {length} are needed for one sample "
            f"(128 samples of 512 tokens are usual); give more text or a smaller length"
        )
    return Calibration(torch.cat(pieces)[: count * length].view(count, length), name)


def _documents(source: Source) -> tuple[list[Any] | Iterator[Any], str]:
    """(documents: strings or token ids, a name for messages)."""
    if source is None:
        return _paragraphs(BUNDLED), "the bundled text"
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            return _json_lines(path) if path.suffix == ".jsonl" else _paragraphs(path), str(path)
        if isinstance(source, Path) or path.suffix in (".txt", ".jsonl", ".json") or path.is_dir():
            raise InvalidCalibration(f"{source} is no file; give a text or .jsonl file, or a data set's name")
        return _data_set(source), f"the data set {source}"
    if isinstance(source, Iterable):
        return list(source), "the list given as calibration"
    raise InvalidCalibration(f"calibration is a {type(source).__name__}; a path, a name or a list is expected")


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCalibration(f"{path} cannot be read as UTF-8 text ({error})") from error
    return [f"{paragraph}\n\n" for paragraph in text.split("\n\n") if paragraph.strip()]


def _json_lines(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            try:
                documents.append(_text(json.loads(line)))
            except (ValueError, KeyError) as error:
                raise InvalidCalibration(
                    f"{path}, line {number}: {error}; an object with one of {', '.join(TEXT_KEYS)}, or a string"
                ) from error
    return documents


def _text(record: Any) -> str:
    if isinstance(record, str):
        return record
    if isinstance(record, dict):
        for key in TEXT_KEYS:
            if isinstance(record.get(key), str):
                return str(record[key])
        if isinstance(messages := record.get("messages"), list):
            return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    raise KeyError(f"no text in {str(record)[:60]!r}")


def _data_set(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InvalidCalibration(
            f"{name!r} is no file here; if it names a data set, `pip install datasets` to read it"
        ) from error
    repository, _, split = name.partition(":")
    try:
        rows = load_dataset(repository, split=split or "train", streaming=True)
        yield from (_text(row) for row in rows)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidCalibration(f"the data set {name!r} cannot be read: {error}") from error


def _ids(document: Any, tokenizer: Any, name: str) -> list[int]:
    if isinstance(document, str):
        if tokenizer is None:
            raise TokenizerMismatch(f"the model has no tokenizer to read {name} with; give lists of token ids instead")
        return list(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
    try:
        return [int(token) for token in document]
    except (TypeError, ValueError) as error:
        raise InvalidCalibration(
            f"{name} holds {document!r:.40}; strings or lists of token ids are expected"
        ) from error


def check_vocabulary(calibration: Calibration, vocabulary: int) -> None:
    """Raise `TokenizerMismatch` where a token id has no embedding."""
    largest = int(calibration.tokens.max())
    if largest >= vocabulary or int(calibration.tokens.min()) < 0:
        raise TokenizerMismatch(
            f"token ids reach {largest} but the model embeds 0..{vocabulary - 1}; the tokenizer is of another model"
        )
