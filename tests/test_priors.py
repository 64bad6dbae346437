"""The flow and the flow matching of notebook 08, taken from its cells."""

import numpy as np
import pytest
import torch
from cells import defined_in
from sklearn.mixture import GaussianMixture

import vae_helpers as vh


@pytest.fixture(scope="module")
def cells():
    return defined_in("08", "Coupling", "Flow", "fit_to_codes", "Velocity", "carry", here=torch.device("cpu"))


def disturbed(flow):
    torch.manual_seed(0)
    for coupling in flow.couplings:
        torch.nn.init.normal_(coupling.net[-1].weight, std=0.1)
    return flow


def test_the_density_of_a_flow_integrates_to_one_and_is_that_of_its_samples(cells):
    flow, side = disturbed(cells["Flow"](2, layers=4, hidden=16)), torch.linspace(-9, 9, 601)
    with torch.no_grad():
        density = flow.log_prob(torch.cartesian_prod(side, side)).exp()
    assert float(density.sum()) * 0.03**2 == pytest.approx(1, abs=1e-3)
    z, grid = flow.sample((200_000,)), torch.cartesian_prod(side, side)
    mean = (density[:, None] * grid).sum(0) * 0.03**2
    assert torch.allclose(z.mean(0), mean, atol=0.02)


def test_a_new_flow_is_the_standard_normal_and_takes_any_batch_shape(cells):
    flow, z = cells["Flow"](5, layers=3, hidden=8), torch.randn(4, 3, 5)
    assert torch.allclose(flow.log_prob(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1), atol=1e-5)
    assert flow.sample((7, 2)).shape == (7, 2, 5)


def test_vae_helpers_takes_a_flow_as_the_prior(cells):
    torch.manual_seed(0)
    model, x = vh.ConvVAE((1, 8, 8), 4, channels=(2, 2), hidden=8).eval(), torch.bernoulli(torch.rand(6, 1, 8, 8))
    with vh.seeded(1):
        plain = vh.log_likelihood(model, x, num_samples=20)
    model.prior = cells["Flow"](4, layers=2, hidden=8)
    with vh.seeded(1):
        assert torch.allclose(vh.log_likelihood(model, x, num_samples=20), plain, atol=1e-4), "a new flow is N(0, I)"
    assert vh.elbo(model, x)[1].requires_grad and model.sample(3).shape == (3, 1, 8, 8)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_flow_needs_two_latents(cells, dim):
    with pytest.raises(ValueError, match="dim"):
        cells["Flow"](dim)


@pytest.mark.parametrize("codes, message", [(np.zeros((5, 2)), "n_components"), (np.full((50, 2), np.nan), "NaN")])
def test_a_mixture_says_what_does_not_fit(codes, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(10).fit(codes)


def test_the_velocity_takes_a_label_or_none(cells):
    torch.manual_seed(0)
    velocity = cells["Velocity"](3, num_classes=2, hidden=8, blocks=1)
    z, t, y = torch.randn(4, 3), torch.rand(4), torch.tensor([0, 1, 2, 2])
    assert velocity(z, t, y).shape == (4, 3)
    assert not torch.equal(velocity(z, t, y), velocity(z, t, y * 0))


def test_the_midpoint_rule_is_of_second_order(cells):
    """dz/dt = z carries 1 to e."""
    def error(steps, midpoint):
        return abs(float(cells["carry"](lambda z, t: z, torch.ones(1, dtype=torch.float64), steps, midpoint)) - np.e)
    assert error(20, False) / error(40, False) == pytest.approx(2, rel=0.1)
    assert error(20, True) / error(40, True) == pytest.approx(4, rel=0.1)
