"""The quantised linear as torch sees it: operators, compilation, gradients, and a module among modules."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from awq_rt import registry
from awq_rt.backend import LinearSpec
from awq_rt.devices import Device
from awq_rt.errors import InvalidInput, NoBackend, UnknownBackend, UnknownKernel
from awq_rt.linear import AwqLinear, linear_grad_op, linear_op
from awq_rt.testing import excess, hurtful_weight
from awq_rt.weights import AwqWeight

IN, OUT, GROUP = 96, 40, 32
BACKEND = "reference"


@pytest.fixture
def weight() -> AwqWeight:
    return hurtful_weight("random", IN, OUT, GROUP, bias=True)


@pytest.fixture
def linear(weight: AwqWeight) -> AwqLinear:
    return _bound(weight)


def _bound(weight: AwqWeight, dtype: torch.dtype = torch.float32) -> AwqLinear:
    linear = AwqLinear(weight.in_features, weight.out_features, weight.group_size)
    linear.bind(weight, dtype, "cpu", backend=BACKEND)
    return linear


def _x(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(0)).to(dtype)


# --- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_forward_operator_passes_torchs_own_checks(
    weight: AwqWeight, dtype: torch.dtype, requires_grad: bool
) -> None:
    packed = _bound(weight, dtype).packed
    x = _x(2, 3, dtype=dtype).requires_grad_(requires_grad)
    torch.library.opcheck(linear_op, (x, list(packed.tensors), BACKEND, packed.layout, OUT))


def test_the_gradient_operator_passes_torchs_own_checks(linear: AwqLinear) -> None:
    grad = torch.randn(2, OUT, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(linear_grad_op, (grad, list(linear.packed.tensors), BACKEND, linear.packed.layout, IN))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 0, 3)])
def test_fake_tensors_get_the_real_shape_and_dtype(linear: AwqLinear, shape: tuple[int, ...]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = _x(*shape)
    real = linear(x)
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(tensor) for tensor in linear.packed.tensors]
        fake = linear_op(mode.from_tensor(x), tensors, BACKEND, linear.layout, OUT)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert real.shape == (*shape, OUT)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compilation_meets_no_graph_break(linear: AwqLinear, weight: AwqWeight, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(linear, fullgraph=True, backend=backend)
    for rows in (1, 5):
        x = _x(rows)
        assert excess(compiled(x), x, weight) <= 1


def test_a_compiled_layer_has_the_same_gradient(linear: AwqLinear) -> None:
    torch.compiler.reset()
    eager, compiled = _x(3).requires_grad_(), _x(3).requires_grad_()
    linear(eager).square().sum().backward()
    torch.compile(linear, fullgraph=True, backend="aot_eager")(compiled).square().sum().backward()
    assert eager.grad is not None
    assert compiled.grad is not None
    torch.testing.assert_close(compiled.grad, eager.grad)


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_the_gradient_is_that_of_the_dense_weight(linear: AwqLinear, weight: AwqWeight, rows: int) -> None:
    x = _x(rows).requires_grad_()
    linear(x).square().sum().backward()
    dense = _x(rows).double().requires_grad_()
    assert weight.bias is not None
    (dense @ weight.dequantize(torch.float64) + weight.bias.double()).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), dense.grad, rtol=1e-5, atol=1e-5)


def test_one_wrong_zero_point_fails_the_gradients_tolerance(linear: AwqLinear, weight: AwqWeight) -> None:
    x = _x(3).requires_grad_()
    linear(x).sum().backward()
    zeros = weight.zeros.clone()
    zeros[1, 7] ^= 1
    wrong = AwqWeight(weight.codes, zeros, weight.scales, weight.bias)
    expected = wrong.dequantize(torch.float64).sum(1).expand(3, -1)
    assert x.grad is not None
    assert not torch.allclose(x.grad.double(), expected, rtol=1e-5, atol=1e-5)


# --- the module ------------------------------------------------------------------------------------------------------


def test_the_packed_weight_reads_back_bit_for_bit(linear: AwqLinear, weight: AwqWeight) -> None:
    assert linear.weight_canonical().equal(weight)


def test_an_unfilled_layer_is_as_large_as_its_packed_weight() -> None:
    linear = AwqLinear(4096, 11008, 128)
    (placeholder,) = linear.buffers()
    assert placeholder.device.type == "meta"
    assert placeholder.nbytes == 4096 * 11008 // 2 + 3 * (4096 // 128) * 11008


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_layer_follows_its_model_to_another_dtype_without_casting_codes(
    linear: AwqLinear, weight: AwqWeight, dtype: torch.dtype
) -> None:
    model = nn.Sequential(linear, nn.LayerNorm(OUT)).to(dtype)
    x = _x(3, dtype=dtype)
    assert model(x).dtype == dtype
    assert linear.weight_canonical().equal(weight)
    assert excess(linear(x), x, weight) <= 1


def test_the_layer_keeps_its_pinned_backend_and_kernel_when_it_moves(
    weight: AwqWeight, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = AwqLinear(IN, OUT, GROUP)
    linear.bind(weight, torch.float32, "cpu", backend=BACKEND, kernel="torch")
    asked = []
    select = registry.select

    def recorded(spec: LinearSpec, device: Device, backend: str | None = None) -> registry.Choice:
        asked.append((spec.kernel, backend))
        return select(spec, device, backend)

    monkeypatch.setattr(registry, "select", recorded)
    linear.to(torch.bfloat16)
    assert asked == [("torch", BACKEND)]


def test_a_dtype_that_no_backend_serves_leaves_the_layer_as_it_was(linear: AwqLinear, weight: AwqWeight) -> None:
    with pytest.raises(NoBackend):
        linear.to(torch.float64)
    assert excess(linear(_x(2)), _x(2), weight) <= 1


def test_moving_to_the_same_place_packs_nothing_anew(linear: AwqLinear) -> None:
    before = linear.packed.tensors
    linear.to(torch.float32).to("cpu").eval().requires_grad_(False)
    assert all(a is b for a, b in zip(before, linear.packed.tensors, strict=True))


def test_the_state_dict_holds_no_packed_tensor(linear: AwqLinear) -> None:
    assert linear.state_dict() == {}
    assert linear.load_state_dict({}).missing_keys == []
    assert list(linear.parameters()) == []


def test_a_deep_copy_shares_nothing(weight: AwqWeight) -> None:
    linear = _bound(copy.deepcopy(weight))  # a backend may keep a weight's tensors as they are
    twin = copy.deepcopy(linear)
    for tensor in linear.packed.tensors:
        tensor.zero_()
    assert twin.weight_canonical().equal(weight)
    assert excess(twin(_x(2)), _x(2), weight) <= 1


def test_a_second_weight_replaces_the_first(linear: AwqLinear) -> None:
    other = hurtful_weight("symmetric", IN, OUT, IN, seed=5)  # no bias: one tensor fewer, and one group a column
    linear.bind(other, torch.float32, "cpu", backend=BACKEND)
    assert linear.weight_canonical().equal(other)
    assert excess(linear(_x(2)), _x(2), other) <= 1
    assert len(list(linear.buffers())) == len(linear.packed.tensors)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, IN + 1), (3, 1), (0,), ()])
def test_an_input_of_the_wrong_width_is_refused_with_both_shapes(linear: AwqLinear, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"has shape {list(shape)}; [..., {IN}] is expected")):
        linear(torch.zeros(shape))


def test_an_input_of_another_dtype_is_refused_with_both_dtypes(linear: AwqLinear) -> None:
    with pytest.raises(InvalidInput, match=re.escape("torch.float16; torch.float32 is expected")):
        linear(_x(2, dtype=torch.float16))


def test_an_input_on_another_device_is_refused_with_both_devices(linear: AwqLinear) -> None:
    with pytest.raises(InvalidInput, match="the input is on meta, the weight on cpu"):
        linear(_x(2).to("meta"))


def test_a_layer_without_a_weight_says_so() -> None:
    with pytest.raises(InvalidInput, match="holds no weight yet"):
        AwqLinear(IN, OUT, GROUP)(_x(1))


def test_binding_to_what_does_not_exist_is_refused_and_changes_nothing(linear: AwqLinear, weight: AwqWeight) -> None:
    with pytest.raises(UnknownBackend):
        linear.bind(weight, torch.float32, "cpu", backend="nonesuch")
    with pytest.raises(UnknownKernel):
        linear.bind(weight, torch.float32, "cpu", kernel="nonesuch")
    assert linear.weight_canonical().equal(weight)


def test_the_layer_describes_itself(linear: AwqLinear) -> None:
    assert repr(linear) == f"AwqLinear(in_features={IN}, out_features={OUT}, group_size={GROUP}, {BACKEND})"
    assert "not loaded" in repr(AwqLinear(IN, OUT, GROUP))
