"""The CPU backend's linear: every instruction set of this machine and both families against float64."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from awq_rt_cpu import backend, strips
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.errors import InvalidInput
from awq_rt.testing import bound, excess, hurtful_cases, hurtful_weight, reference
from awq_rt.weights import AwqWeight

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((128, 65, 64), (192, 40, 192), (64, 1, 16), (72, 7, 24), (20, 33, 5), (30, 17, 1), (1100, 50, 550))
"""(K, N, G): N odd, one group a column, groups that end inside a word, one weight a group, K deeper than a tile."""

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "K{} N{} G{}".format(*shape))
by_kernel = pytest.mark.parametrize("kernel", ["auto", "gemv", "gemm"])


def rows_of(m: int, weight: AwqWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, weight.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)


def packed(weight: AwqWeight, dtype: torch.dtype = torch.float32, kernel: str = "auto") -> Packed:
    return backend.pack(weight, LinearSpec.of(weight, dtype, kernel), CPU)


@by_dtype
def test_hurtful_linears_are_within_the_bound(dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Of every instruction set, so that the expensive side, float64, is computed once."""
    from awq_rt_cpu import _native

    before, _ = _native.chosen()
    request.addfinalizer(lambda: _native.choose(before))
    for case in hurtful_cases(dtype):
        exact, limit = reference(case.x, case.weight), bound(case.x, case.weight)
        for isa, _ in _native.offered():
            _native.choose(isa)
            for kernel in ("gemv", "gemm"):
                y = backend.linear(case.x, packed(case.weight, dtype, kernel))
                assert bool(((y.double() - exact).abs() <= limit).all()), (isa, kernel, case.name)


@by_dtype
@by_shape
def test_odd_shapes_and_any_number_of_rows(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    for bias in (False, True):
        weight = hurtful_weight("random", *shape, bias=bias)
        for kernel in ("auto", "gemv", "gemm"):
            held = packed(weight, dtype, kernel)
            assert backend.unpack(held).equal(weight)
            for m in (0, 1, 2, 3, 5, 8, 13, 70):
                x = rows_of(m, weight, dtype)
                y = backend.linear(x, held)
                assert (y.shape, y.dtype) == ((m, weight.out_features), dtype)
                assert excess(y, x, weight) <= 1, (kernel, m, bias)


@by_kernel
def test_one_wrong_zero_point_leaves_the_bound(isa: str, kernel: str) -> None:
    weight = hurtful_weight("random", 256, 64, 128)
    wrong = AwqWeight(weight.codes, weight.zeros.clone(), weight.scales)
    wrong.zeros[1, 17] ^= 1
    x = rows_of(3, weight) + 1.0
    assert excess(backend.linear(x, packed(wrong, kernel=kernel)), x, weight) > 1


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_scales_and_biases_of_any_dtype(isa: str, scales: torch.dtype, bias: torch.dtype) -> None:
    made = hurtful_weight("wide scales", 128, 37, 64, scale_dtype=scales, bias=True)
    assert made.bias is not None
    weight = AwqWeight(made.codes, made.zeros, made.scales, made.bias.to(bias))
    held = packed(weight)
    assert backend.unpack(held).equal(weight)
    for m in (1, 20):
        x = rows_of(m, weight)
        assert excess(backend.linear(x, held), x, weight) <= 1


@by_kernel
def test_results_are_the_same_bits_for_any_number_of_threads(isa: str, kernel: str) -> None:
    weight = hurtful_weight("random", 512, 520, 64, bias=True)
    held, before = packed(weight, kernel=kernel), torch.get_num_threads()
    try:
        for m in (1, 4, 37):
            x = rows_of(m, weight)
            torch.set_num_threads(1)
            first = backend.linear(x, held)
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                for _ in range(5):
                    assert torch.equal(backend.linear(x, held), first), (m, count)
    finally:
        torch.set_num_threads(before)


def test_packing_is_the_same_for_any_number_of_threads(threads: int) -> None:
    weight = hurtful_weight("random", 256, 1000, 64)
    held = packed(weight)
    assert backend.unpack(held).equal(weight)
    torch.set_num_threads(1)
    assert torch.equal(packed(weight).tensors[0], held.tensors[0])


def test_an_input_may_begin_anywhere(isa: str) -> None:
    weight = hurtful_weight("random", 136, 72, 8)
    for dtype in DTYPES:
        held = packed(weight, dtype)
        for m in (1, 40):
            storage = torch.zeros(m * 136 + 1, dtype=dtype)
            storage[1:] = rows_of(m, weight, dtype).flatten()
            x = storage[1:].view(m, 136)
            assert x.data_ptr() % 16
            assert torch.equal(backend.linear(x, held), backend.linear(x.clone(), held))


def test_a_weight_may_begin_anywhere(isa: str) -> None:
    weight = hurtful_weight("random", 128, 72, 64, scale_dtype=torch.float32)
    held, x = packed(weight), rows_of(3, weight)
    moved = torch.empty(len(held.tensors[0]) + 1, dtype=torch.uint8)[1:].copy_(held.tensors[0])
    assert torch.equal(backend.linear(x, Packed(held.layout, (moved,))), backend.linear(x, held))


def test_many_callers_at_once(isa: str) -> None:
    weight = hurtful_weight("random", 512, 512, 64)
    held = packed(weight)
    inputs = [rows_of(m, weight) for m in (1, 2, 8, 40)]
    expected = [backend.linear(x, held) for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(30):
            if not torch.equal(backend.linear(inputs[index], held), expected[index]):
                wrong.append(index)

    callers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 127), torch.zeros(2, 128, dtype=torch.float64), torch.zeros(2, 128, dtype=torch.float16)]
)
def test_another_input_than_the_weight_was_packed_for_is_refused(x: Tensor) -> None:
    held = packed(hurtful_weight("random", 128, 64, 64))
    with pytest.raises(InvalidInput, match=r"torch\.float32 \[\.\.\., 128\] on the CPU"):
        backend.linear(x, held)


def test_tensors_are_read_alike_with_and_without_the_exchange_table() -> None:
    from awq_rt_cpu import _native

    weight = hurtful_weight("random", 128, 64, 64, bias=True)
    for dtype in DTYPES:
        held, x = packed(weight, dtype), rows_of(3, weight, dtype)
        inputs = (x, x[None], x[0], x.T.contiguous().T, x[:0])
        expected = [backend.linear(one, held) for one in inputs]
        try:
            _native.set_exchange(None)
            found = [backend.linear(one, held) for one in inputs]
        finally:
            _native.set_exchange(torch.Tensor.__dlpack_c_exchange_api__)  # type: ignore[attr-defined]
        assert all(map(torch.equal, found, expected))


def test_joined_weights_are_one_and_still_themselves() -> None:
    sizes = (576, 192, 200)
    parts = [hurtful_weight("random", 128, n, 64, bias=True, seed=n) for n in sizes]
    held = [packed(part) for part in parts]
    joined = strips.join(held)
    assert joined is not None
    whole, views = joined
    assert backend.unpack(whole).equal(AwqWeight.concatenate(parts))
    x = rows_of(2, parts[0])
    assert torch.equal(backend.linear(x, whole), torch.cat([backend.linear(x, one) for one in held], dim=1))
    for part, view in zip(parts, views, strict=True):
        assert backend.unpack(view).equal(part)
        assert view.tensors[0].untyped_storage().data_ptr() == whole.tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    "other",
    [
        {"out_features": 40},  # not the last, and no whole strips
        {"bias": True},
        {"group_size": 32},
        {"scale_dtype": torch.float32},
        {"in_features": 256},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_weights_that_differ_in_more_than_columns_are_not_joined(other: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"in_features": 128, "out_features": 64, "group_size": 64}
    parts = [packed(hurtful_weight("random", **(usual | other))), packed(hurtful_weight("random", **usual))]
    assert strips.join(parts) is None
