"""The search's parts on matrices: scales, ranges, feedback."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from awq_rt.quantization import feedback, scaling
from awq_rt.quantization.feedback import round_with_feedback
from awq_rt.quantization.grid import Grid, Scheme, extent, grid, grouped, to_weight
from awq_rt.quantization.ranges import search_ranges, whole_ranges
from awq_rt.quantization.scaling import Consumer, Search, exact_loss, quadratic, search_scales
from awq_rt.rounding import round_to_nearest

GROUP = 32
SCHEME = Scheme(GROUP)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 400, size: int = 128, seed: int = 0) -> Tensor:
    """Correlated activations of which some channels are large."""
    x = random(tokens, size, seed=seed) @ (torch.eye(size) + 0.3 * random(size, size, seed=seed + 1) / size**0.5)
    return x * random(size, seed=seed + 2).mul(1.2).exp()


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def loss_of(rounded: Tensor, weight: Tensor, x: Tensor) -> float:
    """The loss as a forward pass has it, in float64."""
    return float(((rounded - weight).double() @ x.double().T).square().sum() / len(x))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 128])
def test_the_grid_is_that_of_round_to_nearest(symmetric: bool, group_size: int) -> None:
    scheme, weight = Scheme(group_size, symmetric), random(24, 128)
    chosen = grid(*extent(grouped(weight, group_size)), scheme)
    ours = to_weight(chosen.codes(grouped(weight, group_size)), chosen, scheme, None)
    assert ours.equal(round_to_nearest(weight, group_size, symmetric=symmetric))


def test_the_closed_form_is_the_loss_of_a_forward_pass() -> None:
    weight, x, scales = random(48, 128), inputs(), random(128).mul(0.5).exp()
    consumer = Consumer(weight, moments(x))
    rounded = round_to_nearest(weight * scales, GROUP).dequantize().T / scales
    expected = loss_of(rounded, weight, x)
    # Sums of 400 + 128 products in float32 lose at most that many half ulps each.
    assert exact_loss([consumer], scales, SCHEME) == pytest.approx(expected, rel=528 * 2**-24)
    off = loss_of(rounded.roll(1, 1), weight, x)
    assert exact_loss([consumer], scales, SCHEME) != pytest.approx(off, rel=0.1)


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_never_worse_than_no_scales(seed: int) -> None:
    x = inputs(seed=seed)
    consumers = [Consumer(random(32, 128, seed=seed), moments(x)), Consumer(random(8, 128, seed=9), moments(x), 0.5)]
    found = search_scales(consumers, x.abs().mean(0), None, SCHEME, Search())
    assert found.loss <= found.loss_before
    assert found.loss == pytest.approx(exact_loss(consumers, found.values, SCHEME))
    assert found.loss_before == pytest.approx(exact_loss(consumers, torch.ones(128), SCHEME))
    assert found.loss < 0.9 * found.loss_before  # large channels are there to be helped


def test_weights_on_the_grid_are_not_scaled() -> None:
    weight = round_to_nearest(random(32, 128), GROUP).dequantize().T.contiguous()
    x = inputs()
    found = search_scales([Consumer(weight, moments(x))], x.abs().mean(0), None, SCHEME, Search())
    assert found.choice == "identity"
    assert torch.equal(found.values, torch.ones(128))


def test_both_published_grids_are_among_the_candidates() -> None:
    weight, x = random(16, 128), inputs()
    mean = x.abs().mean(0)
    tied = scaling._Tying(None, 128)
    found = dict(scaling._grid([Consumer(weight, moments(x))], mean, tied, SCHEME, Search()))
    assert len(found) == 40
    groups = weight.view(16, -1, GROUP).abs()
    relative = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).mean(0).flatten()
    for name, expected in (
        ("x^0.5", mean**0.5),
        ("x^1", mean),
        ("x^0/w^1", 1 / (relative + 1e-4)),
        ("x^0.25/w^0.75", mean**0.25 / (relative**0.75 + 1e-4)),
    ):
        expected = expected / (expected.max() * expected.min()).sqrt()
        # The mean over 16 rows is taken in another order; the powers round once each.
        assert torch.allclose(found[name], expected, rtol=32 * 2**-24, atol=0)
    assert len(dict(scaling._grid([Consumer(weight, moments(x))], mean, tied, SCHEME, Search(autoawq=False)))) == 20


def test_tied_channels_share_a_scale() -> None:
    channels = torch.arange(32).repeat(4)
    x = inputs()
    found = search_scales([Consumer(random(16, 128), moments(x))], x.abs().mean(0), channels, SCHEME, Search())
    assert found.values.shape == (32,)
    assert found.loss == pytest.approx(
        exact_loss([Consumer(random(16, 128), moments(x))], found.values[channels], SCHEME)
    )


def test_a_channel_that_is_never_active_does_no_harm() -> None:
    x = inputs()
    x[:, 7] = 0
    found = search_scales([Consumer(random(16, 128), moments(x))], x.abs().mean(0), None, SCHEME, Search())
    assert bool(found.values.isfinite().all())
    assert bool((found.values > 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_groups_range_is_worse_than_the_whole_one(symmetric: bool) -> None:
    weight, scheme = random(40, 128), Scheme(GROUP, symmetric)
    second = moments(inputs())

    def group_losses(chosen: Grid) -> Tensor:
        error = chosen.rounded(grouped(weight, GROUP)) - grouped(weight, GROUP)
        blocks = torch.stack([second[k : k + GROUP, k : k + GROUP] for k in range(0, 128, GROUP)])
        return torch.einsum("ngi,gij,ngj->ng", error.double(), blocks.double(), error.double())

    found = search_ranges(weight, second, scheme)
    whole, chosen = group_losses(whole_ranges(weight, scheme).grid), group_losses(found.grid)
    assert bool((chosen <= whole * (1 + 1e-4)).all())
    assert float(chosen.sum()) < 0.9 * float(whole.sum())
    if symmetric:
        assert bool((found.grid.zeros == 8).all())


def test_an_outlier_whose_input_is_silent_is_clipped() -> None:
    weight, second = torch.rand(4, GROUP, generator=torch.Generator().manual_seed(0)), torch.eye(GROUP)
    weight[:, 3], second[3, 3] = 2.0, 1e-6
    found = search_ranges(weight, second, SCHEME)
    assert bool(found.clipped.all())
    whole = whole_ranges(weight, SCHEME).grid.scales
    assert bool((found.grid.scales < 0.8 * whole).all())  # from [0, 2] to about [0, 1]
    second[3, 3] = 1.0
    assert bool((search_ranges(weight, second, SCHEME).grid.scales > 0.8 * whole).all())


def test_feedback_does_nothing_where_inputs_are_independent() -> None:
    weight = random(24, 128)
    chosen = whole_ranges(weight, SCHEME).grid
    diagonal = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(0)) + 0.5)
    codes = round_with_feedback(weight, diagonal, chosen, damping=0.01)
    assert torch.equal(codes, chosen.codes(grouped(weight, GROUP)))


@pytest.mark.parametrize("block", [16, 64, 128])
def test_feedback_loses_less_than_rounding_to_nearest(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feedback, "BLOCK", block)
    weight, x = random(24, 128), inputs()
    chosen = whole_ranges(weight, SCHEME).grid
    codes = round_with_feedback(weight, moments(x), chosen, damping=0.0)
    assert float(codes.min()) >= 0
    assert float(codes.max()) <= 15
    assert torch.equal(codes, codes.round())
    reached = loss_of(((codes - chosen.zeros) * chosen.scales).flatten(1), weight, x)
    nearest = loss_of(chosen.rounded(grouped(weight, GROUP)).flatten(1), weight, x)
    assert reached < 0.7 * nearest


def test_feedback_is_the_textbook_recursion() -> None:
    """One column after another with the inverse of what is left, in float64: the same codes but for ties."""
    weight, x = random(6, 64), inputs(size=64)
    chosen = whole_ranges(weight, SCHEME).grid
    second = moments(x).double()
    order = moments(x).diagonal().argsort(descending=True, stable=True)
    left, inverse = weight.double()[:, order].clone(), torch.linalg.inv(second[order][:, order])
    scales = chosen.scales.expand(-1, -1, GROUP).flatten(1)[:, order].double()
    zeros = chosen.zeros.expand(-1, -1, GROUP).flatten(1)[:, order].double()
    expected = torch.empty_like(left)
    for k in range(64):
        expected[:, k] = ((left[:, k] / scales[:, k]).round() + zeros[:, k]).clamp(0, 15)
        error = (left[:, k] - (expected[:, k] - zeros[:, k]) * scales[:, k]) / inverse[k, k]
        left -= error[:, None] * inverse[k]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
        inverse[k, k] = 1.0  # rounded; never read again
    codes = round_with_feedback(weight, moments(x), chosen, damping=0.0).flatten(1)[:, order]
    # float32 decides a tie otherwise now and then, and what follows in that row then differs too.
    assert float((codes == expected).double().mean()) > 0.9


def test_feedback_survives_moments_of_too_few_tokens() -> None:
    weight, x = random(8, 128), inputs(tokens=5)
    chosen = whole_ranges(weight, SCHEME).grid
    codes = round_with_feedback(weight, moments(x), chosen, damping=0.0)
    assert bool(codes.isfinite().all())
    assert quadratic(((codes - chosen.zeros) * chosen.scales).flatten(1) - weight, moments(x)) >= -1e-3
