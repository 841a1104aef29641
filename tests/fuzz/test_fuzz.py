"""The checkpoint reader under hostile files: a minute here, hours with `run.py` beside this file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import torch
import trial
from builders import write_json
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tiny import build, config_of
from trial import ExcessiveAllocation, attempt, attempt_to_load

from awq_rt.checkpoint import reader
from awq_rt.errors import InvalidTensor

SECONDS = 45
SECONDS_OF_MODELS = 15


def rounds(one: Callable[[bytes], str], seconds: float, examples: int) -> Counter[str]:
    """The outcomes of `one`, tried on new inputs until time is up: round n has the same inputs on every machine."""
    outcomes: Counter[str] = Counter()

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(min_size=4, max_size=64))
    def trial_of(data: bytes) -> None:
        outcomes[one(data)] += 1

    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        seed(number)(trial_of)()
        number += 1
    return outcomes


@pytest.mark.filterwarnings("ignore")  # of torch and pickletools, which read on
def test_a_spoiled_checkpoint_is_read_or_refused(tmp_path: Path) -> None:
    outcomes = rounds(lambda data: attempt(data, tmp_path / "trial"), SECONDS, examples=500)
    assert outcomes["read"], "no edit was harmless: the seeds are wrong"
    assert len(outcomes) > 6, f"the edits reach too little: {outcomes}"


@pytest.mark.filterwarnings("ignore")  # whatever transformers and tokenizers think of such files
def test_a_spoiled_configuration_makes_a_model_or_an_error_of_ours(tmp_path: Path) -> None:
    build(tmp_path / "model", config_of("llama"))
    write_json(tmp_path / "model" / "generation_config.json", {"eos_token_id": [1, 2], "do_sample": True, "top_p": 0.9})
    write_json(tmp_path / "model" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    outcomes = rounds(lambda data: attempt_to_load(data, tmp_path / "model", tmp_path / "trial"), SECONDS_OF_MODELS, 25)
    assert outcomes["loaded"]
    assert len(outcomes) > 2, f"the edits reach too little: {outcomes}"


def test_a_header_whose_every_tensor_was_taken_out_before_is_spoiled_no_further(tmp_path: Path) -> None:
    """Found by half an hour of run.py: the edits, not the reader, divided by zero."""
    data = b"\x04]\x00\x10\x81\xff\x00$\xcc\x00\x10\x81\xff\x00$\xcc\xb9\xb9"
    assert attempt(data, tmp_path / "trial") == "CorruptFile"


def test_the_seeds_are_valid(tmp_path: Path) -> None:
    for number, files in enumerate(hostile.seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        assert trial.read(folder) == "read"


INPUTS = [bytes([n, 0, 0, m, 1, 2, 3, 4, 5, 6, 7, 8]) for n in range(8) for m in range(16)]


def try_all(inputs: list[bytes], folder: Path) -> None:
    for data in inputs:
        attempt(data, folder / "trial")


def test_a_reader_that_lets_another_error_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(reader, "_check_bias", careless)
    with pytest.raises(ZeroDivisionError):
        try_all(INPUTS, tmp_path)


def test_a_reader_that_allocates_what_a_header_claims_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object) -> None:
        torch.empty(1 << 24)
        raise InvalidTensor("too late")

    monkeypatch.setattr(reader, "_check_bias", greedy)
    with pytest.raises(ExcessiveAllocation):
        try_all(INPUTS, tmp_path)
