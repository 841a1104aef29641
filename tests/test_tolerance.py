"""The bound: the specification stays well inside it, and every fault worth finding is outside."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from awq_rt.testing import HURTFUL_SHAPES, Case, bound, excess, hurtful_cases, hurtful_weight, reference
from awq_rt.testing.tolerance import STANDARD_DEVIATIONS
from awq_rt.weights import AwqWeight
from awq_rt_reference import specification

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEEDS = range(5)
ROWS = [shape for shape in HURTFUL_SHAPES if shape[-1] >= 4]
"""With a single row of activations a fault may meet an activation near 0."""

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_shape = pytest.mark.parametrize("shape", ROWS, ids=lambda shape: "K{} N{} G{} M{}".format(*shape))
by_seed = pytest.mark.parametrize("seed", SEEDS)


def case(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int, *, bias: bool = False) -> Case:
    *sizes, rows = shape
    scale_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    weight = hurtful_weight("random", *sizes, scale_dtype=scale_dtype, bias=bias, seed=seed)
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(seed))
    return Case("random", x.to(dtype), weight)


def fault(wrong: AwqWeight, sample: Case) -> float:
    """How far the specification of `wrong` is outside the bound of the right weight."""
    assert excess(specification.linear(sample.x, sample.weight), sample.x, sample.weight) <= 1
    return excess(specification.linear(sample.x, wrong), sample.x, sample.weight)


def largest_group(weight: AwqWeight, column: int) -> int:
    """Where a fault weighs most: under a scale 20 times smaller it is less than what bfloat16 rounds off the others."""
    return int(weight.scales[:, column].argmax())


@by_dtype
@pytest.mark.parametrize("factor", [None, 9.0])
@pytest.mark.parametrize("kind", ["random", "subnormal scales"])
def test_the_bound_is_made_of_its_three_sources(dtype: torch.dtype, factor: float | None, kind: str) -> None:
    """Element by element, as the module's docstring derives it."""
    k_size, n_size, group_size, groups = 24, 3, 8, 3
    weight = hurtful_weight(kind, k_size, n_size, group_size, bias=True)
    x = torch.randn(2, k_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact, limit = reference(x, weight), bound(x, weight) if factor is None else bound(x, weight, factor)
    u = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    tiny = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}[dtype]  # half the smallest
    for m in range(2):
        for n in range(n_size):
            w = [float(value) for value in weight.dequantize(torch.float64)[:, n]]
            v = [float(value) for value in x[m]]
            rounding = math.sqrt(sum((v[k] * (u * abs(w[k]) + tiny)) ** 2 for k in range(k_size)))
            one_sum = math.sqrt(k_size) * sum(abs(v[k] * w[k]) for k in range(k_size))
            partial = 0.0
            for g in range(groups):
                inputs = sum(abs(value) for value in v[g * group_size : (g + 1) * group_size])
                partial += (15 * float(weight.scales[g, n]) * inputs) ** 2
            apart = (math.sqrt(group_size) + math.sqrt(groups)) * math.sqrt(partial)
            deviation = rounding + 2.0**-24 * (one_sum + apart)
            allowed = u * abs(float(exact[m, n])) + tiny + (factor or 6.0) * deviation
            assert float(limit[m, n]) == pytest.approx(allowed, rel=1e-9)
            y = exact.clone()
            y[m, n] += 2 * allowed
            assert excess(y, x, weight, factor or 6.0) == pytest.approx(2, rel=1e-6)


@by_dtype
def test_the_specification_passes_with_half_of_the_deviations(dtype: torch.dtype) -> None:
    for sample in hurtful_cases(dtype):
        y = specification.linear(sample.x, sample.weight)
        assert excess(y, sample.x, sample.weight, STANDARD_DEVIATIONS / 2) <= 1, sample.name


@by_dtype
def test_codes_and_zero_points_summed_apart_in_float32_pass(dtype: torch.dtype) -> None:
    """What fast kernels do: `scale * (x @ codes - zero * sum(x))`, group by group."""
    for sample in hurtful_cases(dtype):
        weight, x = sample.weight, sample.x.float()
        groups, size = weight.scales.shape[0], weight.group_size
        y = torch.zeros(len(x), weight.out_features)
        for g in range(groups):
            part = x[:, g * size : (g + 1) * size]
            codes = weight.codes[g * size : (g + 1) * size].float()
            apart = part @ codes - part.sum(-1, keepdim=True) * weight.zeros[g].float()
            y += apart * weight.scales[g].float()
        y = y if weight.bias is None else y + weight.bias.float()
        assert excess(y.to(dtype), sample.x, weight) <= 1, sample.name


@by_dtype
def test_one_accumulator_in_the_order_of_k_passes(dtype: torch.dtype) -> None:
    for sample in hurtful_cases(dtype, kinds=("random", "cancelling", "wide scales")):
        if sample.weight.in_features <= 1408:
            y = accumulated(sample, torch.float32)
            assert excess(y, sample.x, sample.weight) <= 1, sample.name


@by_dtype
@by_shape
@by_seed
def test_one_wrong_zero_point_fails(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int) -> None:
    sample = case(shape, dtype, seed)
    zeros = sample.weight.zeros.clone()
    column = (7 * seed) % zeros.shape[1]
    group = largest_group(sample.weight, column)
    zeros[group, column] += -1 if zeros[group, column] else 1
    assert fault(replace(sample.weight, zeros=zeros), sample) > 1


@by_dtype
@by_shape
@by_seed
def test_one_pair_of_swapped_nibbles_fails(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int) -> None:
    sample = case(shape, dtype, seed)
    codes = sample.weight.codes.clone()
    differ = (codes[:, 0::2].int() - codes[:, 1::2].int()).abs() >= 8
    row, pair = differ.nonzero()[seed].tolist()
    codes[row, 2 * pair : 2 * pair + 2] = codes[row, 2 * pair : 2 * pair + 2].flip(0)
    assert fault(replace(sample.weight, codes=codes), sample) > 1


@by_dtype
@by_shape
@by_seed
def test_one_wrong_scale_fails(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int) -> None:
    sample = case(shape, dtype, seed)
    # bfloat16 rounds every weight by up to 0.4 %: over 11 groups that hides a few percent of one.
    factor = 1.3 if dtype == torch.bfloat16 else 1.03
    scales = sample.weight.scales.clone()
    column = (5 * seed) % scales.shape[1]
    scales[largest_group(sample.weight, column), column] *= factor
    assert fault(replace(sample.weight, scales=scales), sample) > 1


@by_dtype
@by_shape
@by_seed
def test_a_dropped_bias_fails(dtype: torch.dtype, shape: tuple[int, int, int, int], seed: int) -> None:
    sample = case(shape, dtype, seed, bias=True)
    assert fault(replace(sample.weight, bias=None), sample) > 1


@by_dtype
@by_shape
def test_two_swapped_columns_fail(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    sample = case(shape, dtype, 0)
    codes = sample.weight.codes.clone()
    codes[:, :2] = codes[:, :2].flip(1)
    assert fault(replace(sample.weight, codes=codes), sample) > 1


@by_dtype
@by_shape
def test_zero_points_of_the_neighbouring_group_fail(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    sample = case(shape, dtype, 0)
    if len(sample.weight.zeros) > 1:
        assert fault(replace(sample.weight, zeros=sample.weight.zeros.roll(1, 0)), sample) > 1


def accumulated(sample: Case, dtype: torch.dtype, every: int | None = None) -> Tensor:
    """`x @ w + b` with one accumulator of `dtype`, emptied into a float32 one after `every` products."""
    x, w = sample.x.to(dtype), sample.weight.dequantize().to(sample.x.dtype).to(dtype)
    partial = torch.zeros(len(x), w.shape[1], dtype=dtype)
    total = torch.zeros(len(x), w.shape[1])
    for k in range(len(w)):
        partial += x[:, k, None] * w[k]
        if every is not None and (k + 1) % every == 0:
            total += partial.float()
            partial.zero_()
    total += partial.float()
    bias = sample.weight.bias
    return (total if bias is None else total + bias.float()).to(sample.x.dtype)


@pytest.mark.parametrize("every", [None, 128], ids=["throughout", "within a group"])
@pytest.mark.parametrize("shape", [shape for shape in ROWS if shape[0] >= 576], ids=str)
@by_seed
def test_float16_accumulation_fails_where_sums_are_long(
    shape: tuple[int, int, int, int], seed: int, every: int | None
) -> None:
    sample = case(shape, torch.float16, seed)
    sample = replace(sample, x=(sample.x + 1).half())  # activations of mean 1: sums grow, and cancel at the end
    assert excess(accumulated(sample, torch.float32, every), sample.x, sample.weight) <= 1
    assert excess(accumulated(sample, torch.float16, every), sample.x, sample.weight) > 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_infinitely_wrong(value: float) -> None:
    sample = case((64, 8, 16, 5), torch.float32, 0)
    y = specification.linear(sample.x, sample.weight)
    y[2, 3] = value
    assert excess(y, sample.x, sample.weight) == float("inf")


def test_no_rows_are_right() -> None:
    sample = case((64, 8, 16, 5), torch.float32, 0)
    assert excess(torch.empty(0, 8), sample.x[:0], sample.weight) == 0.0


def test_where_nothing_comes_in_exactly_nothing_may_come_out() -> None:
    weight = hurtful_weight("random", 64, 8, 64)
    x = torch.zeros(3, 64)
    assert excess(torch.zeros(3, 8), x, weight) == 0.0
    assert excess(torch.full((3, 8), 1e-30), x, weight) > 1


@by_dtype
def test_the_bound_of_one_linear_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype) -> None:
    sample = case((192, 40, 192, 17), dtype, 0)
    whole = bound(sample.x, sample.weight)
    assert torch.allclose(whole[3:5], bound(sample.x[3:5], sample.weight), rtol=1e-12)
    assert torch.allclose(whole.view(17, 1, 40), bound(sample.x[:, None], sample.weight), rtol=1e-12)


def test_the_reference_is_the_definition() -> None:
    sample = case((64, 8, 16, 5), torch.float32, 0, bias=True)
    weight = sample.weight
    assert weight.bias is not None
    for m, n in ((0, 0), (4, 7)):
        exact = sum(
            float(sample.x[m, k])
            * (int(weight.codes[k, n]) - int(weight.zeros[k // 16, n]))
            * float(weight.scales[k // 16, n])
            for k in range(64)
        )
        assert float(reference(sample.x, weight)[m, n]) == pytest.approx(exact + float(weight.bias[n]), rel=1e-12)
