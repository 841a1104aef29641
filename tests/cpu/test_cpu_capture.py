"""A captured function does again what it did, on the same memory; what would do something else is not captured."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from awq_rt_cpu import _native, backend, fused
from awq_rt_cpu.capture import capture
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.ops import AttentionSpec, AttentionTensors
from awq_rt.testing import hurtful_weight

EPS = 1e-5


class Work:
    """A linear and norms on tensors that stay, with torch before, between and after."""

    def __init__(self) -> None:
        weight = hurtful_weight("random", 64, 48, 32)
        self.packed: Packed = backend.pack(weight, LinearSpec.of(weight, torch.float32), torch.device("cpu"))
        self.table, self.norm = torch.randn(10, 64), torch.rand(48)
        self.rows = torch.zeros(2, dtype=torch.int64)
        self.count = torch.zeros((), dtype=torch.int64)

    def __call__(self) -> Tensor:
        x = torch.nn.functional.embedding(self.rows, self.table)
        x = fused.rms_norm(x, torch.ones(64), EPS)
        y = backend.linear(x.unsqueeze(0), self.packed)[0]
        residual = y.clone()
        for _ in range(3):
            y = fused.add_rms_norm(y, residual, self.norm, EPS)
        self.count += 1
        return y * 2


def test_replays_compute_from_what_the_tensors_hold_by_then(threads: int) -> None:
    work = Work()
    replay, result = capture(work)
    assert replay is not None
    assert work.count == 1
    torch.set_num_threads(2)
    for rows in ([1, 2], [7, 7], [9, 0]):
        work.rows.copy_(torch.tensor(rows))
        replay()
        assert torch.equal(result, work())
    assert work.count == 7


def test_what_a_capture_made_stays_where_it_is() -> None:
    work = Work()
    replay, result = capture(work)
    assert replay is not None
    expected = result.clone()
    gc.collect()
    others = [torch.full((2, 64), torch.nan) for _ in range(100)]
    replay()
    assert torch.equal(result, expected)
    assert all(other.isnan().all() for other in others)


def test_draws_are_new_ones() -> None:
    x, weight = torch.randn(2, 64), torch.rand(64)

    def noisy() -> Tensor:
        y = fused.rms_norm(fused.rms_norm(fused.rms_norm(x, weight, EPS), weight, EPS), weight, EPS)
        return y + torch.rand(2, 64)

    replay, result = capture(noisy)
    assert replay is not None
    torch.manual_seed(1)
    expected = noisy()
    torch.manual_seed(1)
    replay()
    assert torch.equal(result, expected)
    replay()
    assert not torch.equal(result, expected)


@pytest.mark.parametrize("look", [lambda x: bool(x.sum() > 0), lambda x: x.nonzero(), lambda x: x.sum().item()])
def test_a_look_at_values_is_not_captured(look: object) -> None:
    work = Work()

    def looks() -> Tensor:
        y = work()
        look(y)  # type: ignore[operator]
        return y

    replay, result = capture(looks)
    assert replay is None
    assert torch.equal(result, work())


def test_what_torch_does_most_of_is_not_captured() -> None:
    x = torch.randn(2, 64)
    replay, result = capture(lambda: fused.rms_norm(x + 1 + 2 + 3, torch.ones(64), EPS))
    assert replay is None
    assert result.shape == (2, 64)


def test_positions_are_checked_each_time() -> None:
    spec = AttentionSpec(2, 2, 16, 0.25)
    caches = torch.zeros(2, 1, 2, 4, 16)
    positions, empty = torch.zeros(1, dtype=torch.int32), torch.empty(0)
    tensors = AttentionTensors(empty, empty)
    qkv = torch.randn(1, 96)
    replay, _ = capture(lambda: fused.decode_attention(qkv, positions, *caches, spec, tensors))
    assert replay is not None
    positions.fill_(3)
    replay()
    positions.fill_(4)
    with pytest.raises(IndexError, match="positions 4 to 4 of row 0"):
        replay()


def test_an_error_ends_the_capture() -> None:
    def fails() -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        capture(fails)
    assert capture(Work())[0] is not None


def test_only_what_this_thread_does_is_captured() -> None:
    x, weight = torch.randn(2, 64), torch.ones(64)
    tape = _native.Tape()
    tape.start()
    with pytest.raises(RuntimeError, match="records on a tape already"):
        _native.Tape().start()
    other = threading.Thread(target=fused.rms_norm, args=(x, weight, EPS))
    other.start()
    other.join()
    assert len(tape) == 0
    fused.rms_norm(x, weight, EPS)
    tape.stop()
    assert len(tape) == 1
    fused.rms_norm(x, weight, EPS)
    assert len(tape) == 1
    with pytest.raises(IndexError, match="less work"):
        tape.run(0, 2, 1)
