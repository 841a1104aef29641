"""The reference backend itself: every path of it against the specification, whatever torch carries."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from awq_rt.testing import bound, excess, hurtful_weight
from awq_rt.testing.conformance import spec_of
from awq_rt.weights import AwqWeight
from awq_rt_reference import DTYPES, backend, bag, packing, specification

CPU = torch.device("cpu")
SHAPES = ((128, 65, 64), (192, 40, 192), (64, 1, 16), (72, 7, 24), (320, 200, 64))
"""(K, N, G): N odd, one group a column, one column, sizes that are multiples of nothing usual."""

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "K{} N{} G{}".format(*shape))


def rows_of(m: int, weight: AwqWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, weight.in_features, generator=torch.Generator().manual_seed(m)).to(dtype)


@by_dtype
@by_shape
@pytest.mark.parametrize("m", [0, 1, bag.MAX_ROWS, bag.MAX_ROWS + 1, 33])
def test_few_rows_and_many_agree_with_the_specification(
    shape: tuple[int, int, int], dtype: torch.dtype, m: int
) -> None:
    assert bag.available()
    for bias in (False, True):
        weight = hurtful_weight("random", *shape, bias=bias)
        packed = backend.pack(weight, spec_of(weight, dtype), CPU)
        x = rows_of(m, weight, dtype)
        y = backend.linear(x, packed)
        assert (y.shape, y.dtype) == ((m, weight.out_features), dtype)
        assert excess(y, x, weight) <= 1
        specified = specification.linear(x, weight)
        assert bool(((y.double() - specified.double()).abs() <= 2 * bound(x, weight)).all())
        assert backend.unpack(packed).equal(weight)


@by_dtype
@by_shape
def test_more_rows_than_bags_are_made_for_give_what_fewer_do(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = hurtful_weight("extreme zeros", *shape, bias=True)
    packed = backend.pack(weight, spec_of(weight, dtype), CPU)
    x = rows_of(3 * bag.MAX_ROWS, weight, dtype)
    many = backend.linear(x, packed)
    few = torch.cat([backend.linear(part, packed) for part in x.split(bag.MAX_ROWS)])
    assert excess(many, x, weight) <= 1
    assert excess(few, x, weight) <= 1
    assert bool(((many.double() - few.double()).abs() <= 2 * bound(x, weight)).all())


@pytest.mark.parametrize("tile", [1, 200 * 64, 1 << 20])
def test_the_size_of_a_tile_does_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = hurtful_weight("random", 320, 200, 64, bias=True)
    packed = backend.pack(weight, spec_of(weight, torch.float32), CPU)
    x = rows_of(33, weight, torch.float32)
    monkeypatch.setattr(bag, "TILE_WEIGHTS", tile)
    assert excess(backend.linear(x, packed), x, weight) <= 1


@by_dtype
@pytest.mark.parametrize("m", [1, 33])
def test_a_torch_without_the_operators_computes_the_specification(
    dtype: torch.dtype, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: object) -> None:
        raise AssertionError("the operators are not there")

    monkeypatch.setattr(bag, "available", lambda: False)
    monkeypatch.setattr(bag, "linear", missing)
    weight = hurtful_weight("random", 128, 65, 64, bias=True)
    packed = backend.pack(weight, spec_of(weight, dtype), CPU)
    x = rows_of(m, weight, dtype)
    assert torch.equal(backend.linear(x, packed), specification.linear(x, weight))


def test_operators_that_are_missing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        embedding_bag_4bit_rowwise_offsets = None

    assert bag.available()
    monkeypatch.setattr(torch.ops, "quantized", Older())
    assert not bag.available()


def test_a_default_device_that_is_no_cpu_leaves_no_trace() -> None:
    """As when a model is built under `torch.device("meta")`: what is remembered must lie where it is used."""
    weight = hurtful_weight("random", 128, 64, 64, bias=True)
    packed = backend.pack(weight, spec_of(weight, torch.float32), CPU)
    inputs = [rows_of(m, weight, torch.float32) for m in (1, 4, 33)]
    bag._bag_indices.cache_clear()
    for surrounding in (torch.device("meta"), torch.device("cpu")):
        with surrounding:
            for x in inputs:
                assert excess(backend.linear(x, packed), x, weight) <= 1
    bag._bag_indices.cache_clear()


def test_packing_under_another_default_device_is_the_same() -> None:
    weight = hurtful_weight("random", 128, 65, 64)
    with torch.device("meta"):
        under = backend.pack(weight, spec_of(weight, torch.float32), CPU)
    assert all(map(torch.equal, under.tensors, backend.pack(weight, spec_of(weight, torch.float32), CPU).tensors))


@pytest.mark.parametrize("columns", [1, 2, 7, 8])
def test_a_row_holds_two_codes_a_byte_the_first_one_low(columns: int) -> None:
    codes = (torch.arange(3 * columns) % 16).to(torch.uint8).view(3, columns)
    rows = packing.pack_rows(codes)
    assert torch.equal(packing.unpack_rows(rows, columns), codes)
    assert rows.shape == (3, (columns + 1) // 2 + 4)
    assert bytes(rows[0, -4:].tolist()) == b"\x00\x3c\x00\x00"  # float16 1.0 and 0.0, little-endian
    if columns == 8:
        assert bytes(rows[0, :4].tolist()) == b"\x10\x32\x54\x76"


def test_other_activations_are_refused() -> None:
    (device,) = backend.probe().devices
    weight = hurtful_weight("random", 128, 64, 64)
    for dtype in DTYPES:
        assert backend.supports(spec_of(weight, dtype), device) is None
    refusal = backend.supports(replace(spec_of(weight, torch.float32), dtype=torch.float64), device)
    assert refusal is not None
    assert refusal.code == "AWQ-REFERENCE-001"
