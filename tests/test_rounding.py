"""Rounding to nearest: within half a step of every weight, whatever the group holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from awq_rt.errors import InvalidWeight
from awq_rt.formats import WRITABLE
from awq_rt.rounding import SMALLEST_RANGE, round_to_nearest


def weight(out_features: int = 16, in_features: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed)) * 0.05


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([1, 8, 16, 64]),
    shift=st.sampled_from([-1.0, -0.05, 0.0, 0.05, 1.0]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_every_weight_is_within_a_step_of_itself(
    seed: int, groups: int, group_size: int, shift: float, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    dense = weight(8, groups * group_size, seed) + shift
    rounded = round_to_nearest(dense, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    rounded.check_values()
    assert (rounded.in_features, rounded.out_features, rounded.group_size) == (*dense.T.shape, group_size)
    assert rounded.scales.dtype == scale_dtype
    steps = rounded.scales.float().repeat_interleave(group_size, 0)
    # Half a step; at the ends of the range half a step more, for the rounding of the zero point, and that of the scale.
    slack = 1.0 + 16 * torch.finfo(scale_dtype).eps
    assert bool(((rounded.dequantize() - dense.T).abs() <= slack * steps).all())
    if symmetric:
        assert rounded.symmetric


def test_a_weight_that_is_on_the_grid_comes_back_exactly() -> None:
    first = round_to_nearest(weight(), 32, scale_dtype=torch.float32)
    codes = first.codes.clone()
    codes[0::32], codes[1::32] = 0, 15  # every group reaches both ends, so it has the same range
    on_grid = (codes.float() - first.zeros.repeat_interleave(32, 0)) * first.scales.repeat_interleave(32, 0)
    again = round_to_nearest(on_grid.T, 32, scale_dtype=torch.float32)
    assert torch.equal(again.codes, codes)
    assert torch.equal(again.zeros, first.zeros)
    assert torch.allclose(again.scales, first.scales, rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_has_a_scale_and_stays_zero(scale_dtype: torch.dtype, symmetric: bool) -> None:
    rounded = round_to_nearest(torch.zeros(4, 32), 16, symmetric=symmetric, scale_dtype=scale_dtype)
    assert bool((rounded.scales > 0).all())
    assert not rounded.dequantize().any()
    for layout in WRITABLE.values():  # scales of 0 would not read back from every layout
        with_n = round_to_nearest(torch.zeros(8, 64), 64, symmetric=symmetric, scale_dtype=scale_dtype)
        assert layout.write(with_n)


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-9, -3e4])
def test_a_group_of_equal_weights_keeps_them(value: float) -> None:
    rounded = round_to_nearest(torch.full((2, 16), value), 16)
    assert torch.allclose(rounded.dequantize(), torch.tensor(value), rtol=1e-3, atol=SMALLEST_RANGE)


@pytest.mark.parametrize(("sign", "zero"), [(1, 0), (-1, 15)])
def test_groups_of_one_sign_put_their_zero_point_at_an_end(sign: int, zero: int) -> None:
    rounded = round_to_nearest(sign * (weight().abs() + 0.01), 64)
    assert bool((rounded.zeros == zero).all())
    assert bool((rounded.dequantize() * sign >= 0).all())


def test_a_group_size_of_minus_one_is_the_whole_row() -> None:
    assert round_to_nearest(weight(), -1).equal(round_to_nearest(weight(), 128))


def test_a_weight_in_any_order_of_memory_gives_the_same() -> None:
    dense = weight(48, 64)
    plain = round_to_nearest(dense, 16)
    assert round_to_nearest(dense.T.contiguous().T, 16).equal(plain)
    assert round_to_nearest(torch.stack((dense, dense), -1)[..., 0], 16).equal(plain)
    assert all(tensor.is_contiguous() for tensor in (plain.codes, plain.zeros, plain.scales))


def test_half_precision_weights_round_as_their_float32_values() -> None:
    dense = weight().bfloat16()
    assert round_to_nearest(dense, 32).equal(round_to_nearest(dense.float(), 32))


def test_the_bias_comes_along() -> None:
    bias = torch.randn(16)
    assert round_to_nearest(weight(), 32, bias=bias).bias is bias


@pytest.mark.parametrize("group_size", [0, -2, 3, 48, 256])
def test_a_group_size_that_does_not_divide_is_refused(group_size: int) -> None:
    with pytest.raises(InvalidWeight, match=f"group size {group_size} does not divide in_features 128"):
        round_to_nearest(weight(), group_size)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused(value: float) -> None:
    dense = weight()
    dense[3, 5] = value
    with pytest.raises(InvalidWeight, match="the weight holds NaN or infinity"):
        round_to_nearest(dense, 32)


@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_beyond_their_dtype_are_refused(symmetric: bool) -> None:
    dense = torch.full((8, 64), 2e6)
    with pytest.raises(InvalidWeight, match=r"float16.*bfloat16 or float32"):
        round_to_nearest(dense, 64, symmetric=symmetric)
    round_to_nearest(dense, 64, symmetric=symmetric, scale_dtype=torch.bfloat16).check_values()
