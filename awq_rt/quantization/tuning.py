"""Scales and norms of a quantised model adjusted as a whole, so that it predicts what the dense model predicts.

Block by block, each linear is rounded as if the others were exact and all errors of its outputs mattered alike. Here
the whole model runs, and the scales of groups and the norms follow the gradient of the divergence between the dense
model's predictions and its own; codes and zero points stay. No labels are needed, so any text will do, and the dense
model writes it: a calibration text has too few words for so many scales.

Sources: Hinton et al., "Distilling the knowledge in a neural network", 2015; Liu et al., "LLM-QAT: data-free
quantization aware training for large language models", 2023, section 2.1; Chen et al., "EfficientQAT", 2024, section
3.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..weights import AwqWeight
from .report import TuningReport

Done = Callable[[int, int], None]
"""Told what was done, and of how much."""

STEP_TOKENS = 1024
"""Tokens from which a step's gradient is taken."""

RATE = 2e-3
"""By how much of itself a value moves in a step at most, about; falls to 0 along a half cosine."""

WARM_UP = 0.1
"""Share of the steps in which the rate rises: Adam's first estimates of the gradient's size are poor."""

CACHE_BYTES = 1 << 31
"""Of keys and values, by which the samples are bounded that are written side by side."""

HELD_OUT = 8
"""Samples that are not learnt from, and say what the tuning was worth."""

LOGITS_AT_ONCE = 1 << 28
"""Logits that are compared at a time: 1 GiB in float32, of which some copies are held."""

LENGTH = 256
"""Tokens of a written sample."""

PASSES = 4
"""How often a sample is learnt from: on a CPU writing one takes as long as learning from it once."""


@torch.no_grad()
def write_text(model: Any, steps: int, seed: int, progress: Done) -> Tensor:
    """int64 [samples, LENGTH], enough for `steps`, drawn from the dense `model`'s predictions.

    Every sample goes on from a random token.
    """
    samples = HELD_OUT + math.ceil(steps * STEP_TOKENS / (PASSES * LENGTH))
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator(model.device).manual_seed(seed)
    first = torch.randint(vocabulary, (samples, 1), generator=generator, device=model.device)
    written, done = [], 0
    for part in torch.split(first, written_at_once(model)):
        tokens = []
        for token in _written(model, part, generator):
            tokens.append(token)
            done += len(token)
            progress(done, samples * LENGTH)
        written.append(torch.cat(tokens, 1).cpu())
    return torch.cat(written)


def _written(model: Any, token: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """LENGTH times [n, 1], of which `token` is the first. What `generate` does, but a draw takes one random number."""
    yield token
    cache = None
    for _ in range(LENGTH - 1):
        found = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        reached = found.logits[:, -1].float().softmax(-1).cumsum(-1)
        drawn = torch.rand(len(token), 1, generator=generator, device=token.device) * reached[:, -1:]
        token = torch.searchsorted(reached, drawn, right=True).clamp_max_(reached.shape[1] - 1)
        yield token


@torch.no_grad()
def written_at_once(model: Any) -> int:
    """How many samples of LENGTH tokens have at most `CACHE_BYTES` of keys and values, as a token's say."""
    cache = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=True).past_key_values
    held = (value.nbytes for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor))
    return max(1, CACHE_BYTES // max(1, sum(held) * LENGTH))


class Teacher:
    """The dense model's predictions for `tokens` [n, length], kept as hidden states before the head."""

    @torch.no_grad()
    def __init__(self, model: Any, tokens: Tensor, progress: Done):
        self.tokens = tokens
        decoder, states, done = model.get_decoder(), [], 0
        for part in torch.split(tokens, samples_at_once(model, tokens.shape[1])):
            states.append(decoder(input_ids=part.to(model.device), use_cache=False).last_hidden_state.cpu())
            done += len(part)
            progress(done, len(tokens))
        self._states = torch.cat(states)

    @torch.no_grad()
    def logits(self, model: Any, chosen: Tensor) -> Tensor:
        """[len(chosen), length, vocabulary] for the samples `chosen`, by the head of `model`, which is never tuned."""
        from transformers.modeling_outputs import MoeModelOutputWithPast

        states = self._states[chosen].to(model.device)
        decoder = model.get_decoder()
        decoder.forward = lambda *args, **kwargs: MoeModelOutputWithPast(last_hidden_state=states)
        try:
            found: Tensor = model(input_ids=self.tokens[chosen].to(model.device), use_cache=False).logits
        finally:
            del decoder.forward
        return found


def tune(
    model: Any,
    weights: Sequence[tuple[nn.Module, AwqWeight]],
    teacher: Teacher,
    *,
    steps: int,
    seed: int,
    progress: Done,
) -> tuple[list[AwqWeight], TuningReport]:
    """The linears' weights with tuned scales, and what it was worth; the norms of `model` are left tuned.

    `model` holds the quantised model: `weights` are its linears and what is stored of each. Where held-out samples are
    not predicted better in the end, everything stays as it was.
    """
    length = teacher.tokens.shape[1]
    order = torch.randperm(len(teacher.tokens), generator=torch.Generator().manual_seed(seed))
    held_out, learnt = order.tensor_split([HELD_OUT])
    each = max(1, STEP_TOKENS // length)
    with _tunable(model, weights) as (scales, changes):
        before = _divergence(model, teacher, held_out)
        optimizer = torch.optim.Adam(changes, betas=(0.9, 0.99))
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            _divergence(model, teacher, learnt[torch.arange(step * each, (step + 1) * each) % len(learnt)], learn=True)
            optimizer.step()
            progress(step + 1, steps)
        after = _divergence(model, teacher, held_out)
        if not after < before:
            after = before
            with torch.no_grad():
                for change in changes:
                    change.zero_()
        tuned = [scale.tuned(weight) for scale, (_, weight) in zip(scales, weights, strict=True)]
    return tuned, TuningReport(steps, learnt.numel() * length, before, after)


@contextmanager
def _tunable(
    model: nn.Module, weights: Sequence[tuple[nn.Module, AwqWeight]]
) -> Iterator[tuple[list[_TunedScales], list[nn.Parameter]]]:
    """(the linears' scales, relative changes of scales and norms), with which `model` computes until the end.

    Norms keep their changes.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(w := module._parameters.get("weight"), Tensor) and w.dim() == 1
    ]
    scales = [_TunedScales(weight) for _, weight in weights]
    vectors = [
        (norm, name, _TunedVector(vector)) for norm in norms for name, vector in norm.named_parameters(recurse=False)
    ]
    places: list[tuple[nn.Module, str, nn.Module]] = [*vectors]
    for (linear, weight), scale in zip(weights, scales, strict=True):
        steps = weight.codes.float() - weight.zeros.float().repeat_interleave(weight.group_size, 0)
        linear.weight = nn.Parameter(steps.T.contiguous(), requires_grad=False)
        places.append((linear, "weight", scale))
    for module, name, parametrization in places:
        parametrize.register_parametrization(module, name, parametrization)
    try:
        yield scales, [scale.change for scale in scales] + [vector.change for _, _, vector in vectors]
    finally:
        for module, name, _ in places:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _divergence(model: Any, teacher: Teacher, chosen: Tensor, *, learn: bool = False) -> float:
    """Mean over tokens of the divergence of the model's predictions from the teacher's, for the samples `chosen`."""
    total = 0.0
    with torch.set_grad_enabled(learn), torch.autocast(model.device.type, torch.bfloat16, learn and _bfloat16(model)):
        for part in torch.split(chosen, samples_at_once(model, teacher.tokens.shape[1])):
            expected = teacher.logits(model, part).log_softmax(-1)
            found = model(input_ids=teacher.tokens[part].to(model.device), use_cache=False).logits.log_softmax(-1)
            loss = functional.kl_div(found.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="sum")
            loss = loss / (len(chosen) * teacher.tokens.shape[1])
            if learn:
                loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total


def _bfloat16(model: Any) -> bool:
    """Whether the model's device multiplies bfloat16 quicker than float32. Gradients need no more."""
    if model.device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not say
    return any(found.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def samples_at_once(model: Any, length: int) -> int:
    """How many samples of `length` tokens have at most `LOGITS_AT_ONCE` logits."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    return max(1, LOGITS_AT_ONCE // (length * vocabulary))


class _TunedScales(nn.Module):
    """Parametrises a linear's weight: the steps that its codes stand for, times scales that can change."""

    def __init__(self, weight: AwqWeight):
        super().__init__()
        self.scales = weight.scales.T.float().unsqueeze(-1)
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, steps: Tensor) -> Tensor:
        groups = steps.view(*self.scales.shape[:2], -1)
        return (groups * (self.scales * (1 + self.change))).flatten(1)

    def tuned(self, weight: AwqWeight) -> AwqWeight:
        """`weight` with these scales."""
        scales = (self.scales * (1 + self.change)).detach().squeeze(-1).T
        return AwqWeight(weight.codes, weight.zeros, scales.to(weight.scales.dtype).contiguous(), weight.bias)


class _TunedVector(nn.Module):
    """Parametrises a norm's weight or bias."""

    def __init__(self, vector: Tensor):
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(vector))

    def forward(self, vector: Tensor) -> Tensor:
        return vector * (1 + self.change)
