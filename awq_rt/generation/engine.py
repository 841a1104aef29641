"""transformers' `generate` on a fused decoder; what the engine does not run goes to transformers' own loop."""

from __future__ import annotations

import contextvars
import functools
import logging
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation import stopping_criteria as stopping

from ..errors import InvalidInput
from ..fusion import Decoder, fuse
from ..fusion.cache import rounded_length
from ..models.narrow import widen
from .requests import Prepared, Request, Requests, request
from .sampler import Sampler, Unsupported
from .session import Session

log = logging.getLogger("awq_rt")

CRITERIA = (
    stopping.MaxLengthCriteria,
    stopping.MaxTimeCriteria,
    stopping.EosTokenCriteria,
    stopping.StopStringCriteria,
)
"""Criteria that need nothing but the ids, which they get on the host, in order, a few steps late."""

ARGUMENTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "tokenizer"}
OURS = "_awq_rt_unused"
"""Marks a cache that transformers made for a generation and nobody else holds."""


class Engine:
    """Decodes for one model. One generation at a time: others wait for it, as they share its buffers."""

    def __init__(self, decoder: Decoder | None, max_seq_len: int | None):
        self.decoder, self.max_seq_len = decoder, max_seq_len
        self.requests = Requests()
        self._lock = threading.Lock()
        self._session: Session | None = None

    @property
    def session(self) -> Session | None:
        """The buffers and graphs of the generation before, which the next one takes where it fits."""
        return self._session

    @session.deleter
    def session(self) -> None:
        self._session = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine(None, self.max_seq_len)  # a copied model has weights of its own

    def generate(
        self, ids: Tensor, lengths: list[int], sampler: Sampler, criteria: Any, pad: Tensor | None, streamer: Any
    ) -> Tensor:
        """`ids` [B, T], row b's last `lengths[b]` count -> [B, T + new]. Stops when `criteria` say so for every row."""
        on_host = ids.cpu()  # after the prompt was sent to the device this would wait until it is read
        with self._lock:
            session = self._session_for(len(ids), max(lengths) + criteria.max_length - ids.shape[1])
            try:
                session.start(ids, lengths, sampler)
                return _collect(session, on_host, criteria, pad, streamer).to(ids.device)
            finally:
                session.finish()

    def decoder_of(self, model: Any) -> Decoder:
        """The decoder of `model` as it is now. Raises `Unsupported` when there is none."""
        with self._lock:
            if self.decoder is not None and not self.decoder.current:
                self.decoder = self._session = None  # their weights are no longer the model's
                model.fusion = fuse(model)
                self.decoder = model.fusion.decoder
        if self.decoder is None or not self.decoder.intact:
            raise Unsupported("the model was changed after it was loaded")
        if model.training or torch.is_autocast_enabled(self.decoder.device.type):
            raise Unsupported("the model is in training, or under autocast")
        return self.decoder

    def _session_for(self, batch: int, length: int) -> Session:
        """The session of the generation before where it fits, else a new one in its place."""
        if self.max_seq_len is not None and length > self.max_seq_len:
            raise InvalidInput(
                f"the generation may grow to {length} positions, and the model was loaded with max_seq_len="
                f"{self.max_seq_len}; load it with max_seq_len={length} or more, or lower max_new_tokens"
            )
        assert self.decoder is not None
        rows = 1 << (batch - 1).bit_length() if self.decoder.device.type == "cuda" else batch
        session = self._session
        if session is None or len(session.tokens) != rows or session.cache.length < length:
            session = self._session = None  # its memory is needed first
            session = self._session = Session(self.decoder, rows, rounded_length(self.max_seq_len or length))
        return session


class FusedGeneration:
    """Goes before a transformers model class: greedy decoding and sampling run on `awq_rt_engine` where they can."""

    awq_rt_engine: Engine

    @functools.wraps(GenerationMixin.generate)
    def generate(self, inputs: Any = None, generation_config: Any = None, *rest: Any, **keywords: Any) -> Any:
        asked = None if rest else request(self, inputs, generation_config, keywords)
        if asked is not None and (prepared := self.awq_rt_engine.requests.get(asked.key)) is not None:
            try:
                return self._generate_again(asked, prepared)
            except Unsupported as reason:
                log.debug("transformers looks at this request anew: %s", reason)
        token = _asked.set(asked)
        try:
            return super().generate(inputs, generation_config, *rest, **keywords)  # type: ignore[misc]
        finally:
            _asked.reset(token)

    def resize_token_embeddings(self, *arguments: Any, **keywords: Any) -> Any:
        widen(self)  # transformers gives new modules the dtype of the weights before
        return super().resize_token_embeddings(*arguments, **keywords)  # type: ignore[misc]

    @torch.no_grad()
    def _generate_again(self, asked: Request, prepared: Prepared) -> Tensor:
        """The result of a request that was prepared before. Raises `Unsupported` for a prompt that needs more."""
        engine, ids = self.awq_rt_engine, asked.ids
        decoder = engine.decoder_of(self)
        criteria = prepared.criteria_for(ids.shape[1])
        _check_lengths(decoder, ids, criteria)
        if asked.mask is not None:
            lengths = _lengths(ids, asked.mask)
        elif prepared.pad is not None and bool((ids == prepared.pad.to(ids.device)).any()):
            raise Unsupported("a mask may follow from the padding")
        else:
            lengths = [ids.shape[1]] * len(ids)
        if asked.streamer is not None:
            asked.streamer.put(ids.cpu())
        return engine.generate(ids, lengths, prepared.sampler, criteria, prepared.pad, asked.streamer)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any
    ) -> Any:
        given = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **more)  # type: ignore[misc]
        cache = model_kwargs.get("past_key_values")
        if given is None and type(cache) is DynamicCache:
            setattr(cache, OURS, True)
        return result

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        engine, asked = self.awq_rt_engine, _asked.get()
        try:
            decoder = engine.decoder_of(self)
            sampler = Sampler(logits_processor, generation_config.do_sample, input_ids.shape[1])
            lengths = _prompt_lengths(
                decoder, input_ids, generation_config, stopping_criteria, synced_gpus, model_kwargs
            )
        except Unsupported as reason:
            log.info("transformers' own loop runs this generation: %s", reason)
            arguments = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
            return super()._sample(*arguments, **model_kwargs)  # type: ignore[misc]
        if asked is not None and asked.ids is input_ids:
            prepared = Prepared.of(sampler, generation_config, stopping_criteria, input_ids.shape[1])
            if prepared is not None:
                engine.requests.keep(asked.key, prepared)
        pad = generation_config._pad_token_tensor
        pad = None if pad is None else pad.cpu()
        return engine.generate(input_ids, lengths, sampler, stopping_criteria, pad, streamer)


_asked: contextvars.ContextVar[Request | None] = contextvars.ContextVar("awq_rt_asked", default=None)
"""The request that transformers is preparing."""


def attach(model: Any, decoder: Decoder, max_seq_len: int | None = None) -> None:
    """Let `model.generate` run on `decoder`. The model keeps the name of its class, which is saved with it."""
    own = type(model)
    model.__class__ = type(own.__name__, (FusedGeneration, own), {"__module__": own.__module__, "__doc__": own.__doc__})
    model.awq_rt_engine = Engine(decoder, max_seq_len)


def _collect(session: Session, ids: Tensor, criteria: Any, pad: Tensor | None, streamer: Any) -> Tensor:
    """The tokens of a session that has read its prompts, after `ids` [B, T] on the host, until `criteria` stop all."""
    batch, count = ids.shape
    left = criteria.max_length - count - 1  # steps to be requested: the first token comes with the prompt
    if not any(hasattr(criterion, "eos_token_id") for criterion in criteria):
        pad = None
    out = torch.empty(batch, criteria.max_length, dtype=ids.dtype)
    out[:, :count] = ids
    unfinished = torch.ones(batch, dtype=torch.bool)
    ahead = session.ahead_of_first
    while bool(unfinished.any()):
        while left and session.outstanding <= ahead:
            session.advance()
            left -= 1
        tokens = session.receive()[:batch]
        out[:, count] = tokens if pad is None else torch.where(unfinished, tokens, pad)
        count += 1
        ahead = session.ahead
        if streamer is not None:
            streamer.put(out[:, count - 1])
        unfinished &= ~criteria(out[:, :count], None)
    if streamer is not None:
        streamer.end()
    return out[:, :count]


def _prompt_lengths(
    decoder: Decoder, ids: Tensor, config: Any, criteria: Any, synced_gpus: bool, arguments: dict[str, Any]
) -> list[int]:
    """How many of each row's ids count, at its end. Raises `Unsupported` for what the engine does not run."""
    if synced_gpus or config.return_dict_in_generate:
        raise Unsupported("the result has more than tokens, or is of several processes in step")
    if unknown := sorted(name for name in set(arguments) - ARGUMENTS if arguments[name] is not None):
        raise Unsupported(f"the model is given {', '.join(unknown)}")
    cache = arguments.get("past_key_values")
    if not arguments.get("use_cache", True) or not getattr(cache, OURS, False):
        raise Unsupported("the cache is the caller's, or is turned off")
    if other := [type(c).__name__ for c in criteria if type(c) not in CRITERIA]:
        raise Unsupported(f"it is stopped by {', '.join(other)}")
    _check_lengths(decoder, ids, criteria)
    mask = arguments.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else _lengths(ids, mask)
    positions = arguments.get("position_ids")
    if positions is not None and not _usual(positions, lengths):
        raise Unsupported("the positions are the caller's")
    return lengths


def _check_lengths(decoder: Decoder, ids: Tensor, criteria: Any) -> None:
    """Raises `Unsupported` where there is nothing to do, or the angles of positions would change on the way."""
    count = ids.shape[1]
    if count == 0 or len(ids) == 0 or criteria.max_length is None or criteria.max_length <= count:
        raise Unsupported("there is no prompt, or no token to make")
    limit = decoder.description.rotary_limit
    if limit is not None and criteria.max_length > limit:
        raise Unsupported(f"past {limit} positions the angles depend on the length")


def _lengths(ids: Tensor, mask: Tensor) -> list[int]:
    """How many of each row's `ids` [B, T] count by the `mask` [B, T]. Raises `Unsupported` unless they are the last."""
    if mask.shape != ids.shape:
        raise Unsupported("the attention mask has another shape than the ids")
    count = ids.shape[1]
    if bool(mask.all()):
        return [count] * len(ids)
    sums = mask.sum(-1).long()
    padding = torch.arange(count, device=mask.device) < count - sums[:, None]
    # Told together, because each answer waits for the device.
    *lengths, plain = torch.cat((sums, (mask.bool() ^ padding).all().view(1))).tolist()
    if not plain or min(lengths) == 0:
        raise Unsupported("the attention mask leaves nothing of a row, or is more than padding on the left")
    return lengths


def _usual(positions: Tensor, lengths: list[int]) -> bool:
    """Whether each row counts from 0 after its padding."""
    count = positions.shape[-1]
    return positions.dim() == 2 and all(
        row[count - length :] == list(range(length)) for row, length in zip(positions.tolist(), lengths, strict=True)
    )
