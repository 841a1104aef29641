"""The fused operators in C++ against float64, for each instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import exact_ops
import pytest
import torch
from awq_rt_cpu import backend, fused
from exact_ops import layer
from torch import Tensor

from awq_rt import ops
from awq_rt.ops import AttentionSpec, Ops
from awq_rt.testing import UNIT_ROUNDOFF

pytestmark = pytest.mark.usefixtures("isa")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
SPECS = {
    "whole head": AttentionSpec(4, 4, 64, 0.125, 64),
    "grouped": AttentionSpec(6, 2, 80, 80**-0.5, 80),
    "wide": AttentionSpec(4, 2, 256, 0.0625, 256),
    "partial": AttentionSpec(4, 2, 64, 0.125, 32),
    "interleaved": AttentionSpec(4, 4, 64, 0.125, 48, interleaved=True),
    "normed": AttentionSpec(4, 2, 64, 0.125, 64, norm_eps=1e-6),
    "window": AttentionSpec(4, 2, 64, 0.125, 64, window=7),
    "softcap": AttentionSpec(4, 2, 64, 0.125, 64, softcap=5.0),
    "no rotation": AttentionSpec(4, 2, 64, 0.125),
}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@by_dtype
@pytest.mark.parametrize("width", [576, 264, 7])
def test_norms_agree_with_float64(dtype: torch.dtype, width: int) -> None:
    x, weight = normal(5, width, dtype=dtype) * 3, normal(width)
    y = fused.rms_norm(x, weight, 1e-5)
    assert y.dtype == dtype
    assert exact_ops.rms_norm(x, weight, 1e-5).excess(y) <= 1
    residual = normal(5, width, dtype=dtype, seed=1)
    expected = residual + x
    y = fused.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected)
    assert exact_ops.rms_norm(expected, weight, 1e-5).excess(y) <= 1
    assert exact_ops.rms_norm(expected, weight, 1e-5).excess(fused.rms_norm(expected, -weight, 1e-5)) > 1


@by_dtype
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("width", [512, 33])
def test_gated_activations_agree_with_float64(activation: str, dtype: torch.dtype, width: int) -> None:
    gate_up = normal(3, 2 * width, dtype=dtype) * 4
    gate_up[0, :4] = torch.tensor([0.0, 100.0, -100.0, -0.0]).to(dtype)
    exact = exact_ops.gated_activation(gate_up, activation)
    assert exact.excess(fused.gated_activation(gate_up, activation)) <= 1
    assert exact.excess(fused.gated_activation(gate_up.flip(1), activation)) > 1


@by_dtype
@pytest.mark.parametrize("name", SPECS)
def test_attention_agrees_with_float64(name: str, dtype: torch.dtype) -> None:
    for sharp in (1.0, 6.0):
        made = layer(SPECS[name], [37, 0, 3], 41, dtype, slopes=name == "no rotation", sharp=sharp)
        assert made.excess(fused.decode_attention(*made.arguments)) <= 1
        assert made.excess(fused.decode_attention(*made.arguments).flip(0)) > 1


@pytest.mark.parametrize("name", SPECS)
def test_a_prefill_places_what_steps_place(name: str) -> None:
    spec = SPECS[name]
    made = layer(spec, [0, 0], 12, torch.float32)
    tokens = normal(2, 12, made.qkv.shape[1])
    stepwise = [cache.clone() for cache in (made.k_cache, made.v_cache)]
    for step in range(12):
        at = torch.full((2,), step, dtype=torch.int32)
        fused.decode_attention(tokens[:, step].contiguous(), at, *stepwise, spec, made.tensors)
    q = fused.rope_append(tokens, made.positions, made.k_cache, made.v_cache, spec, made.tensors)
    assert torch.equal(stepwise[0], made.k_cache)
    assert torch.equal(stepwise[1], made.v_cache)
    caches = (torch.empty_like(made.k_cache), torch.empty_like(made.v_cache))
    expected = ops.rope_append(tokens, made.positions, *caches, spec, made.tensors)
    torch.testing.assert_close(q, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(made.k_cache, caches[0], rtol=1e-6, atol=2e-6)


@by_dtype
def test_caches_may_be_the_leading_slots_of_longer_ones(dtype: torch.dtype) -> None:
    made = layer(SPECS["grouped"], [5, 9], 24, dtype)
    whole = layer(SPECS["grouped"], [5, 9], 24, dtype)
    part = replace(made, k_cache=made.k_cache[:, :, :10], v_cache=made.v_cache[:, :, :10])
    assert torch.equal(fused.decode_attention(*part.arguments), fused.decode_attention(*whole.arguments))
    assert torch.equal(made.k_cache, whole.k_cache) or made.k_cache.isnan().any()


@pytest.mark.parametrize("position", [-1, 24])
def test_a_position_outside_the_cache_is_an_error_that_writes_nothing(position: int) -> None:
    made = layer(SPECS["grouped"], [5, 9], 24, torch.float32)
    before = made.v_cache.clone()
    wrong = replace(made, positions=torch.tensor([5, position], dtype=torch.int32))
    with pytest.raises(IndexError, match=f"{position} of row 1 do not lie in the 24"):
        fused.decode_attention(*wrong.arguments)
    assert torch.equal(made.v_cache.nan_to_num(), before.nan_to_num())


def test_threads_change_no_bit(threads: int) -> None:
    made = layer(SPECS["grouped"], [200, 150], 208, torch.float32)
    x = normal(70, 576)
    found = [fused.decode_attention(*made.arguments), fused.rms_norm(x, normal(576), 1e-5)]
    found += [fused.gated_activation(x, "silu"), fused.dense_linear(x[:2], normal(3000, 576))]
    torch.set_num_threads(1)
    expected = [fused.decode_attention(*made.arguments), fused.rms_norm(x, normal(576), 1e-5)]
    expected += [fused.gated_activation(x, "silu"), fused.dense_linear(x[:2], normal(3000, 576))]
    assert all(map(torch.equal, found, expected))


@by_dtype
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(576, 1000), (100, 3), (7, 33)], ids=str)
def test_a_dense_weight_is_used_as_it_is(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, int]) -> None:
    k, n = shape
    for m in (1, 3):
        x, weight, bias = normal(m, k, dtype=dtype), normal(n, k, dtype=weight_dtype, seed=1), normal(n, seed=2)
        y = fused.dense_linear(x, weight, bias)
        assert (y.shape, y.dtype) == ((m, n), dtype)
        exact = x.double() @ weight.double().T + bias
        # Unrounded products, summed in float32 in a random walk; then one rounding.
        sums = 6 * 2.0**-24 * (k**0.5 + 1) * (x.double().abs() @ weight.double().abs().T + bias.abs())
        limit = UNIT_ROUNDOFF[dtype] * exact.abs() + sums
        assert bool(((y.double() - exact).abs() <= limit).all())
        wrong = fused.dense_linear(x, weight.flip(1).contiguous(), bias)
        assert bool(((wrong.double() - exact).abs() > limit).any())


def test_what_is_not_served_goes_to_the_definitions() -> None:
    x, weight, chosen = normal(4, 64), normal(64), Ops(backend)
    assert fused.rms_norm(x.double(), weight, 1e-5) is NotImplemented
    assert fused.rms_norm(x.T, normal(4), 1e-5) is NotImplemented
    assert fused.rms_norm(x, weight.half(), 1e-5) is NotImplemented
    assert fused.gated_activation(x, "swish") is NotImplemented
    assert fused.dense_linear(normal(fused.DENSE_ROWS + 1, 64), normal(3, 64)) is NotImplemented
    assert torch.equal(chosen.rms_norm(x.T, normal(4), 1e-5), ops.rms_norm(x.T, normal(4), 1e-5))
    odd = layer(AttentionSpec(2, 1, 24, 0.2, 24), [3], 8, torch.float32)  # no head of whole strips
    assert fused.decode_attention(*odd.arguments) is NotImplemented
    assert odd.excess(chosen.decode_attention(*odd.arguments)) <= 1


@by_dtype
@pytest.mark.parametrize("width", [4, 16, 49, 1000])
def test_the_largest_logit_is_the_first_of_equal_ones_and_nan_is_larger(dtype: torch.dtype, width: int) -> None:
    logits = normal(4, width, dtype=dtype).clamp(-2, 2)
    logits[0, [1, width - 1]] = 5
    logits[1] = -torch.inf
    logits[2, 0], logits[2, width - 2 :] = torch.inf, torch.nan
    logits[3, [2, 3]] = 3
    assert fused.argmax(logits).tolist() == ops.argmax(logits).tolist() == [1, 0, width - 2, 2]
    assert fused.argmax(logits.double()) is NotImplemented
    assert fused.argmax(logits.t()) is NotImplemented
