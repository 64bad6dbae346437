"""The likelihoods over 256 levels: against their definition in float64, at the edges, and against their own samples."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

import vae_helpers as vh

LEVELS = torch.arange(256, dtype=torch.float64) / 255
SCALES = (-8.0, -5.0, -2.0, 0.0, 4.0)


def plain(loc, log_scale):
    """Probabilities [256] by the definition, in float64: differences of the logistic distribution function."""
    ends = torch.sigmoid((torch.arange(1, 256, dtype=torch.float64) - 0.5 - 255 * loc) / (255 * math.exp(log_scale)))
    return torch.diff(torch.cat([torch.zeros(1).double(), ends, torch.ones(1).double()]))


@pytest.mark.parametrize("loc", [-0.5, 0.0, 0.3, 0.998, 1.7])
@pytest.mark.parametrize("log_scale", SCALES)
def test_probabilities_are_those_of_the_definition_and_sum_to_1(loc, log_scale):
    p_x = vh.DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale))
    probabilities = p_x.log_prob(LEVELS.float()).exp().double()
    assert abs(probabilities.sum() - 1) < 1e-5
    torch.testing.assert_close(probabilities, plain(loc, log_scale), rtol=1e-3, atol=2e-6)
    assert abs(p_x.mean - (LEVELS * plain(loc, log_scale)).sum()) < 1e-5


@pytest.mark.parametrize("log_scale", SCALES)
def test_value_and_gradient_are_finite_at_the_extremes(log_scale):
    loc = torch.tensor([-50.0, -1.0, 0.0, 0.5, 1.0, 2.0, 50.0]).requires_grad_()
    scale = torch.full_like(loc, log_scale).requires_grad_()
    values = vh.DiscretizedLogistic(loc, scale).log_prob(torch.tensor([0.0, 128 / 255, 1.0]).view(-1, 1))
    values.sum().backward()
    assert values.isfinite().all() and loc.grad.isfinite().all() and scale.grad.isfinite().all()


def test_far_from_the_mean_the_logarithm_is_exact_where_the_difference_of_two_sigmoids_is_0():
    loc, log_scale = torch.tensor(0.0), torch.tensor(-6.0)
    value = vh.DiscretizedLogistic(loc, log_scale).log_prob(torch.tensor(200 / 255))
    a, b = (200.5 / 255) * math.exp(6), (199.5 / 255) * math.exp(6)  # log(e^-b - e^-a) up to terms of e^-300
    assert abs(value - (-b + math.log(1 - math.exp(b - a)))) < 1e-3


def test_samples_follow_the_probabilities():
    torch.manual_seed(0)
    draws = vh.DiscretizedLogistic(torch.tensor(0.02), torch.tensor(-4.0)).sample((100_000,))
    shares = torch.bincount((draws * 255).round().long(), minlength=256) / len(draws)
    expected = plain(0.02, -4.0)
    assert ((shares - expected).abs() < 5 * (expected / len(draws)).sqrt() + 1e-5).all()


def mixture(colours=3, batch=2, components=2, side=2, dtype=torch.float64):
    torch.manual_seed(0)
    shape = (batch, components, colours, side, side)
    return vh.DiscretizedLogisticMixture(
        torch.randn(batch, components, side, side, dtype=dtype), torch.rand(shape, dtype=dtype),
        torch.rand(shape, dtype=dtype) - 4,
        torch.randn(batch, components, colours * (colours - 1) // 2, side, side, dtype=dtype) / 2)


def test_the_mixture_is_what_its_definition_says():
    p_x = mixture()
    x = p_x.sample()
    total = torch.zeros(2, dtype=torch.float64)
    for b in range(2):
        for row in range(2):
            for column in range(2):
                at = (b, slice(None), slice(None), row, column)
                loc, log_scale, share = p_x.loc[at], p_x.log_scale[at], p_x.coefficients[at]
                pixel, level = x[b, :, row, column], (x[b, :, row, column] * 255).round().long()
                weights, likelihood = p_x.logits[b, :, row, column].softmax(0), 0
                for k in range(2):
                    left = pixel - loc[k]
                    means = (loc[k, 0], loc[k, 1] + share[k, 0] * left[0],
                             loc[k, 2] + share[k, 1] * left[0] + share[k, 2] * left[1])
                    each = [plain(float(m), float(s))[n] for m, s, n in zip(means, log_scale[k], level, strict=True)]
                    likelihood += weights[k] * math.prod(each)
                total[b] += likelihood.log()
    torch.testing.assert_close(p_x.log_prob(x), total, rtol=1e-6, atol=1e-6)


def test_the_mixture_of_a_grey_pixel_sums_to_1():
    p_x = mixture(colours=1, batch=1, side=1)
    assert abs(p_x.log_prob(LEVELS.view(256, 1, 1, 1)).exp().sum() - 1) < 1e-5


def test_samples_of_the_mixture_have_its_mean_and_its_entropy():
    p_x = mixture(batch=1)
    draws = p_x.sample((20_000,))
    assert draws.shape == (20_000, 1, 3, 2, 2) and p_x.sample().shape == (1, 3, 2, 2)
    error = draws.std(0) / math.sqrt(len(draws))
    inside = (p_x.loc > 0.2) & (p_x.loc < 0.8)  # near the edges the mean is approximate
    sure = inside.all(1) & (p_x.log_scale < -2).all(1)
    assert sure.any() and ((draws.mean(0) - p_x.mean).abs() < 5 * error + 2e-3)[sure].all()
    assert (draws.mean(0) - p_x.mean).abs().max() < 0.05
    again, other = p_x.log_prob(draws[:10_000, 0]).mean(), p_x.log_prob(draws[10_000:, 0]).mean()
    wrong = p_x.log_prob(draws[:, 0].flip(1)).mean()  # colours in another order
    assert abs(again - other) < 0.3 and wrong < again - 1


@pytest.mark.parametrize("spoil, name", [
    (lambda x: x * 2 - 1, "normalized"), (lambda x: x + 0.3 / 255, "with noise"), (lambda x: x * 255, "0 to 255")])
@pytest.mark.parametrize("likelihood", ["logistic", "linked", "mixture"])
def test_what_is_no_level_is_refused_before_training(likelihood, spoil, name):
    model = vh.ConvVAE((3, 32, 32), 4, channels=(4, 8), hidden=16, likelihood=likelihood)
    data = vh.load_data("photos")
    data = replace(data, train=data.train[:64], test=data.test[:8])
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match="no possible value under.*1/255"):
        vh.fit(model, data, epochs=1, transform=spoil, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True)), name


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("likelihood", ["logistic", "linked", "mixture"])
def test_convvae_takes_them(tmp_path, likelihood, image_shape):
    model = vh.ConvVAE(image_shape, 4, channels=(4, 8), hidden=16, likelihood=likelihood).eval()
    x = torch.randint(0, 256, (5, *image_shape)) / 255
    p_x = model.decode(torch.randn(5, 4))
    assert p_x.batch_shape == (5,) and p_x.event_shape == image_shape
    assert p_x.sample().shape == p_x.mean.shape == x.shape
    p_x.log_prob(p_x.sample())  # its own samples are levels
    recon, kl = vh.elbo(model, x)
    (kl - recon).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    vh.save_weights(model, tmp_path / "model.pt")
    assert vh.load_weights(tmp_path / "model.pt")[0].config["likelihood"] == likelihood


def test_a_likelihood_of_ones_own_with_a_weight_is_trained():
    class LearnedScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, output):
            return Independent(Normal(output, self.log_scale.exp()), 3)

    data = vh.load_data("photos")
    data = replace(data, train=data.train[:256], test=data.test[:8])
    model = vh.ConvVAE((3, 32, 32), 4, channels=(4, 8), hidden=16, likelihood=(LearnedScale(), lambda colours: colours))
    vh.fit(model, data, epochs=1, progress=False)
    assert model.likelihood.log_scale < 0, "photographs vary by less than the whole range"
    pair = (lambda output: Independent(Bernoulli(logits=output), 3), lambda colours: colours)
    other = vh.ConvVAE((3, 32, 32), 4, likelihood=pair)
    assert isinstance(other.decode(torch.randn(2, 4)).base_dist, Bernoulli)


def test_a_small_mixture_learns_the_levels_better_than_counting_them():
    data = vh.load_data("photos")
    data = replace(data, train=data.train[::4], test=data.test[::16])
    torch.manual_seed(0)
    model = vh.ConvVAE((3, 32, 32), 16, channels=(8, 16), hidden=64, likelihood="mixture")
    history = vh.fit(model, data, epochs=2, batch_size=32, progress=False)
    shares = torch.bincount(data.train.images.flatten().long(), minlength=256).float().add(1)
    shares /= shares.sum()
    counting = shares.log()[data.test.images.long()].sum((1, 2, 3)).mean()
    assert vh.bits_per_dim(-history.test["loss"][-1], 3072) < vh.bits_per_dim(counting, 3072) < 8
