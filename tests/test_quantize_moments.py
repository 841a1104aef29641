"""What is observed of a linear's inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from awq_rt.errors import NonFiniteActivations
from awq_rt.quantization.moments import Moments, observe, token_weights
from awq_rt.quantization.streaming import Call


class Branches(nn.Module):
    """Two linears with the same input and one that gets some of the tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.routed = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden * 2
        self.left(x), self.right(x)
        return hidden + self.routed(x[:, ::2]).repeat_interleave(2, 1)


def hidden_states(seed: int = 0) -> Tensor:
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed))


def twice(hidden: Tensor) -> Tensor:
    """A text whose halves are the same: nothing of it is chance, so nothing is shrunk."""
    return torch.cat([hidden, hidden])


def test_second_moments_are_those_of_the_weighted_tokens() -> None:
    hidden, block = hidden_states(), Branches()
    found = observe(block, Call((), {}), twice(hidden), {"left": ("left",), "routed": ("routed",)}, "block")
    x, weights = 2 * hidden.flatten(0, 1), token_weights(hidden).flatten()
    expected = (x * weights[:, None]).T @ x / len(x)
    assert torch.allclose(found["left"].second, expected, rtol=36 * 2**-22, atol=36 * 2**-22)
    assert torch.allclose(found["left"].mean_abs, x.abs().mean(0), rtol=36 * 2**-24)
    assert found["left"].tokens == 36
    routed = 2 * hidden[:, ::2].flatten(0, 1)  # nothing tells which tokens these are: they count alike
    assert torch.allclose(found["routed"].second, routed.T @ routed / 9, rtol=36 * 2**-22, atol=36 * 2**-22)


def test_a_token_of_huge_size_does_not_outweigh_all_others() -> None:
    hidden = hidden_states()
    plain = observe(Branches(), Call((), {}), twice(hidden), {"left": ("left",)}, "block")["left"].second
    hidden[0, 0] *= 1000
    found = observe(Branches(), Call((), {}), twice(hidden), {"left": ("left",)}, "block")["left"].second
    assert float((found - plain).norm() / plain.norm()) < 0.2
    x = 2 * hidden.flatten(0, 1)
    assert float((x.T @ x / len(x) - plain).norm() / plain.norm()) > 1e4  # what an unweighted sum would show


def test_tokens_count_alike_behind_a_norm() -> None:
    hidden, sites = hidden_states(), {"left": ("left",)}
    found = observe(Branches(), Call((), {}), twice(hidden), sites, "block", normed={"left"})["left"].second
    x = 2 * hidden.flatten(0, 1)
    assert torch.allclose(found, x.T @ x / len(x), rtol=36 * 2**-22, atol=36 * 2**-22)


def correlated(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """(hidden states [samples, 16, 8] whose channels are correlated, the truth about them [8, 8])."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(8) + 0.15 * torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
    states = torch.randn(samples, 16, 8, generator=generator) @ mixing.T
    return states, 4 * mixing @ mixing.T


def at_left(hidden: Tensor) -> Moments:
    return observe(Branches(), Call((), {}), hidden, {"left": ("left",)}, "block", normed={"left"})["left"]


def test_what_the_halves_of_a_text_do_not_share_is_noise() -> None:
    noise = [at_left(correlated(samples, seed=1)[0]).noise for samples in (2, 8, 64, 512)]
    assert noise == sorted(noise, reverse=True)
    assert 0.0 <= noise[-1] < 0.02
    white = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(3))
    assert at_left(white).noise > 0.7


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_shrinking_brings_the_moments_of_a_short_text_nearer_to_the_truth(samples: int) -> None:
    """One sample is cut in two, three make halves of two sizes."""
    shrunk = plain = 0.0
    for seed in range(20):
        hidden, truth = correlated(samples, seed)
        found, x = at_left(hidden), 2 * hidden.flatten(0, 1)
        assert torch.allclose(found.second.diagonal(), x.square().mean(0), rtol=48 * 2**-22)
        shrunk += float((found.second - truth).square().sum())
        plain += float((x.T @ x / len(x) - truth).square().sum())
    assert shrunk < plain


def test_an_input_that_half_of_the_text_does_not_reach_keeps_no_correlations() -> None:
    class Half(Branches):
        def forward(self, hidden: Tensor) -> Tensor:
            return self.left(hidden) if bool(hidden[0, 0, 0] > 0) else hidden

    hidden = hidden_states()[:2]
    hidden[0, 0, 0], hidden[1, 0, 0] = 1, -1
    found = observe(Half(), Call((), {}), hidden, {"left": ("left",)}, "block")["left"]
    assert found.noise == 1
    assert torch.equal(found.second, torch.diag(found.second.diagonal()))


def test_weights_are_one_in_the_mean_and_finite_for_an_empty_stream() -> None:
    hidden = hidden_states()
    hidden[1, 2] = 0
    weights = token_weights(hidden)
    assert bool(weights.isfinite().all())
    assert float(weights.mean()) == pytest.approx(1, rel=1e-6)


def test_inputs_of_linears_that_share_a_site_are_counted_together() -> None:
    found = observe(Branches(), Call((), {}), hidden_states(), {"left": ("left", "right")}, "block")
    assert found["left"].tokens == 36


def test_activations_that_are_not_finite_name_the_layer() -> None:
    hidden = hidden_states()
    hidden[2, 3, 1] = torch.inf
    with pytest.raises(NonFiniteActivations, match=r"model.layers.7.left"):
        observe(Branches(), Call((), {}), hidden, {"left": ("left",)}, "model.layers.7")
