"""The 8-bit mode: as exact as its rounded activations, no more; never without being asked for; and it says so."""

from __future__ import annotations

import pytest
import torch
from awq_rt_cpu import _native, _say_int8, backend
from torch import Tensor

from awq_rt.backend import LinearSpec, Packed
from awq_rt.testing import bound, excess, hurtful_cases, hurtful_weight, reference
from awq_rt.weights import AwqWeight

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _int8(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWQ_RT_CPU_INT8", "1")
    _say_int8.cache_clear()


@pytest.fixture
def has_int8(isa: str) -> None:
    if not _native.has_int8():
        pytest.skip(f"{isa} has no kernels for 8-bit activations")


def packed(weight: AwqWeight, dtype: torch.dtype) -> Packed:
    _say_int8.cache_clear()
    with pytest.warns(RuntimeWarning, match="rounded to 8 bits"):
        return backend.pack(weight, LinearSpec.of(weight, dtype), CPU)


def limit(x: Tensor, weight: AwqWeight) -> Tensor:
    """Each activation moves by half a step of its group at most, a step being 1/127 of the group's largest one.

    The scale of a group is rounded too, by 2 units of float32 at up to 127 steps: far below 1/1000 of a step.
    """
    groups = weight.scales.shape[0]
    steps = x.double().view(len(x), groups, weight.group_size).abs().amax(-1) / 127
    weights = weight.dequantize(torch.float64).abs().view(groups, -1, weight.out_features).sum(1)
    return 0.501 * steps @ weights + bound(x, weight)


@pytest.mark.usefixtures("has_int8")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_those_of_activations_rounded_to_8_bits(dtype: torch.dtype) -> None:
    left_the_exact_bound = 0
    for case in hurtful_cases(dtype, ("random", "extreme zeros", "wide scales")):
        held = packed(case.weight, dtype)
        y = backend.linear(case.x, held)
        error = (y.double() - reference(case.x, case.weight)).abs()
        assert bool((error <= limit(case.x, case.weight)).all()), case.name
        left_the_exact_bound += excess(y, case.x, case.weight) > 1
        assert backend.unpack(held).equal(case.weight)
    assert left_the_exact_bound or dtype == torch.bfloat16


@pytest.mark.usefixtures("has_int8")
@pytest.mark.parametrize("shape", [(128, 65, 64), (72, 7, 24), (20, 33, 5), (30, 17, 1)], ids=str)
def test_odd_shapes(shape: tuple[int, int, int]) -> None:
    weight = hurtful_weight("random", *shape, bias=True)
    held = packed(weight, torch.float32)
    for m in (0, 1, 2, 3, 8, 11, 70):
        x = torch.randn(m, shape[0], generator=torch.Generator().manual_seed(m))
        error = (backend.linear(x, held).double() - reference(x, weight)).abs()
        assert bool((error <= limit(x, weight)).all()), m


@pytest.mark.usefixtures("has_int8")
def test_one_wrong_code_in_every_column_leaves_the_bound() -> None:
    weight = hurtful_weight("random", 64, 16, 64)
    wrong = AwqWeight(weight.codes.clone(), weight.zeros, weight.scales)
    wrong.codes[5] ^= 15
    x = torch.zeros(1, 64)
    x[0, 5] = 1.0
    error = (backend.linear(x, packed(wrong, torch.float32)).double() - reference(x, weight)).abs()
    assert bool((error > limit(x, weight)).any())


def test_an_instruction_set_without_kernels_for_it_refuses(isa: str) -> None:
    refusal = backend.supports(LinearSpec(64, 64, 64, torch.float32), backend_device())
    if _native.has_int8():
        assert refusal is None
        assert "8 bits" in backend.probe().devices[0].driver
    else:
        assert refusal is not None
        assert refusal.code == "AWQ-CPU-002"
        assert isa in refusal.reason


def test_a_family_named_outright_is_exact() -> None:
    if not _native.has_int8():
        pytest.skip("refused already")
    weight = hurtful_weight("random", 128, 64, 64)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    held = backend.pack(weight, LinearSpec.of(weight, torch.float32, "gemv"), CPU)
    assert excess(backend.linear(x, held), x, weight) <= 1


def backend_device():  # type: ignore[no-untyped-def]
    from awq_rt import devices

    return devices.cpu().devices[0]
