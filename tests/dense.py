"""Tiny random dense models on disk: what the quantiser starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import VISION_FAMILIES, config_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

LENGTH = 32


def dense_model(family: str) -> Any:
    """A random model in float32. Norms and biases are moved off their constants, which would hide mistakes."""
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if family in VISION_FAMILIES else AutoModelForCausalLM
    model = auto.from_config(config_of(family), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def write_dense(folder: Path, family: str = "llama") -> Any:
    """Write such a model to `folder` as transformers does; returns it."""
    model = dense_model(family)
    model.save_pretrained(folder)
    return model


def some_tokens(samples: int = 8, length: int = LENGTH, seed: int = 1) -> list[list[int]]:
    """Random token ids that the tiny vocabularies hold."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(3, 100, (samples, length), generator=generator).tolist()
    return found


def word_tokenizer(words: int = 100) -> Any:
    """A tokenizer of the words w0, w1, ... with these numbers as ids."""
    vocabulary = {f"w{number}": number for number in range(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, clean_up_tokenization_spaces=False)
