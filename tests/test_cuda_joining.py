"""Joined weights: exactly the parts side by side, stored once."""

from __future__ import annotations

import pytest
import torch

from awq_rt.backend import LinearSpec, Packed
from awq_rt.weights import AwqWeight

tiled = pytest.importorskip("awq_rt_cuda.tiled")
joining = pytest.importorskip("awq_rt_cuda.joining")


def random_weight(n: int, *, k: int = 192, group_size: int = 64, bias: bool = False, seed: int = 0) -> AwqWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = k // group_size
    codes = torch.randint(16, (k, n), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(16, (groups, n), generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, n, generator=generator).half()
    return AwqWeight(codes, zeros, scales, torch.randn(n, generator=generator).half() if bias else None)


def packed(weight: AwqWeight, dtype: torch.dtype = torch.float16) -> Packed:
    return tiled.pack(weight, LinearSpec.of(weight, dtype))


def same(a: AwqWeight, b: AwqWeight) -> bool:
    pairs = [(a.codes, b.codes), (a.zeros, b.zeros), (a.scales, b.scales)]
    if a.bias is not None:
        pairs.append((a.bias, b.bias))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("bias", [False, True])
def test_a_joined_weight_is_its_parts_side_by_side(bias: bool) -> None:
    weights = [random_weight(n, bias=bias, seed=n) for n in (64, 16, 32)]
    whole, views = joining.join([packed(weight) for weight in weights])
    assert same(tiled.unpack(whole), AwqWeight.concatenate(weights))
    assert whole.layout == packed(AwqWeight.concatenate(weights)).layout
    for weight, view in zip(weights, views, strict=True):
        assert same(tiled.unpack(view), weight)
        for tensor, stored in zip(view.tensors, whole.tensors, strict=True):
            assert tensor.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
            assert tensor.is_contiguous()


@pytest.mark.parametrize(
    "other",
    [
        random_weight(24),
        random_weight(32, k=256),
        random_weight(32, group_size=96),
        random_weight(32, bias=True),
    ],
    ids=["a part of a strip", "another depth", "other groups", "a bias"],
)
def test_what_cannot_be_joined_is_refused(other: AwqWeight) -> None:
    assert joining.join([packed(other), packed(random_weight(32))]) is None


def test_activations_of_two_dtypes_are_not_joined() -> None:
    weight = random_weight(32)
    assert joining.join([packed(weight), packed(weight, torch.bfloat16)]) is None
