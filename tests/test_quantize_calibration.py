"""Where calibration samples come from, and what is said of sources that cannot be used."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import word_tokenizer

from awq_rt.errors import CalibrationTooShort, InvalidCalibration, TokenizerMismatch
from awq_rt.quantization.calibration import BUNDLED, Calibration, calibration_samples, check_vocabulary


def samples(source: Any, tokenizer: Any = None, *, samples: int = 3, length: int = 4, seed: int = 0) -> Calibration:
    return calibration_samples(source, tokenizer, samples=samples, length=length, seed=seed)


def test_the_bundled_text_is_in_the_package_and_described() -> None:
    words = len(BUNDLED.read_text(encoding="utf-8").split())
    assert words > 4000
    assert "CC0" in (BUNDLED.parent / "README.md").read_text(encoding="utf-8")


def test_the_bundled_text_gives_samples() -> None:
    found = samples(None, word_tokenizer(), samples=5, length=64)
    assert found.tokens.shape == (5, 64)
    assert found.source == "the bundled text"


def test_token_ids_are_joined_and_cut() -> None:
    found = samples([[1, 2, 3], [4, 5, 6, 7], [8, 9]])
    assert found.tokens.shape == (2, 4)
    ids = found.tokens.flatten().tolist()
    assert len(set(ids)) == 8
    assert set(ids) <= {*range(1, 10)}


def test_a_seed_decides_the_order_and_nothing_else_does() -> None:
    source = [[number] * 4 for number in range(20)]
    first, again, other = (samples(source, samples=20, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort(0).values, other.sort(0).values)
    assert source[0] == [0] * 4  # the caller's list is as it was


def test_no_more_is_taken_than_is_asked_for() -> None:
    assert samples([[1] * 100]).tokens.shape == (3, 4)


def test_a_text_file_is_read_by_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8\n\n\n")
    found = samples(path, word_tokenizer())
    assert sorted(map(tuple, found.tokens.tolist())) == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert samples(str(path), word_tokenizer()).digest == found.digest


def test_json_lines_hold_text_or_conversations(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = ["w1 w2", {"text": "w3 w4"}, {"content": "w5 w6"}, {"messages": [{"role": "w7", "content": "w8"}]}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = samples(path, word_tokenizer(), length=7)  # the role is followed by a colon, which makes it another word
    assert set(found.tokens.flatten().tolist()) <= {*range(9)}
    assert found.tokens.shape == (1, 7)  # 2 + 2 + 2 + 2 words


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "w1"}\n{"label": 3}\n')
    with pytest.raises(InvalidCalibration, match=r"text.jsonl, line 2"):
        samples(path, word_tokenizer())


@pytest.mark.parametrize("source", [[], [[1, 2]], ["w1 w2 w3"]])
def test_too_little_says_how_much_is_needed(source: Any) -> None:
    with pytest.raises(CalibrationTooShort, match="at least 4 are needed"):
        samples(source, word_tokenizer())


def test_an_empty_file_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationTooShort, match="gives 0 tokens"):
        samples(tmp_path / "empty.txt", word_tokenizer())


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(TokenizerMismatch, match="no tokenizer"):
        samples(None)


def test_an_id_beyond_the_vocabulary_is_a_wrong_tokenizer() -> None:
    found = samples([[1, 2, 3, 127]])
    check_vocabulary(found, 128)
    with pytest.raises(TokenizerMismatch, match=r"reach 127 but the model embeds 0..126"):
        check_vocabulary(found, 127)


@pytest.mark.parametrize("source", [3, [object()], [["a"]], Path("no/such/text"), "missing.txt"])
def test_other_sources_are_refused(source: Any) -> None:
    with pytest.raises(InvalidCalibration):
        samples(source, word_tokenizer())


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidCalibration, match="UTF-8"):
        samples(tmp_path / "binary.txt", word_tokenizer())


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_data_set_needs_the_package_that_reads_them() -> None:
    with pytest.raises(InvalidCalibration, match="pip install datasets"):
        samples("owner/name", word_tokenizer())


def test_a_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    asked: list[Any] = []

    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        asked.append((name, split, streaming))
        return ({"text": f"w{number} w{number}"} for number in range(1, 50))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = samples("owner/name:validation", word_tokenizer())
    assert asked == [("owner/name", "validation", True)]
    assert found.tokens.tolist() == [[1, 1, 2, 2], [3, 3, 4, 4], [5, 5, 6, 6]]
