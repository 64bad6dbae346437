"""The densities, bounds and likelihoods: against torch.distributions, their definitions, samples, and exact answers."""

import math
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import pytest
import torch
from models import LinearGaussian, TinyVAE
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence

LEVELS = torch.arange(256, dtype=torch.float64) / 255
SCALES = (-8.0, -5.0, -2.0, 0.0, 4.0)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return LinearGaussian().exact().sample((40,)).view(-1, 1, 4, 4)


@pytest.fixture
def photos():
    data = vh.load_data("photos")
    return replace(data, train=data.train[::4][:256], test=data.test[::16][:8])


# ------------------------------------------------------------------------------------------------- KL, ELBO, log p(x)


def test_gaussian_kl_equals_torch_distributions():
    mean, log_var = torch.randn(50, 7).double(), torch.randn(50, 7).double()
    q_z = Independent(Normal(mean, (log_var / 2).exp()), 1)
    p_z = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 1)
    torch.testing.assert_close(vh.gaussian_kl(mean, log_var), kl_divergence(q_z, p_z), rtol=1e-10, atol=1e-10)


def test_gaussian_kl_equals_the_mean_of_samples():
    torch.manual_seed(0)
    mean, log_var = torch.tensor([[1.0, -2.0, 0.5]]).double(), torch.tensor([[0.3, -1.0, 0.0]]).double()
    q_z, p_z = Normal(mean, (log_var / 2).exp()), Normal(0.0, 1.0)
    z = q_z.sample((200_000,))
    draws = (q_z.log_prob(z) - p_z.log_prob(z)).sum(-1)
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - vh.gaussian_kl(mean, log_var)) < 4 * error


def test_elbo_with_the_true_posterior_is_log_p_of_x(x):
    model = LinearGaussian()
    recon, kl = vh.elbo(model, x)
    torch.testing.assert_close(recon - kl, model.exact().log_prob(x.flatten(1)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spoil", [0.2, -1.0])
def test_elbo_falls_short_of_log_p_of_x_by_the_kl_to_the_posterior(x, spoil):
    torch.manual_seed(0)
    model = LinearGaussian(spoil)
    one = x[:1].repeat(200_000, 1, 1, 1)
    recon, kl = vh.elbo(model, one)
    q_z, posterior = model.encode(x[:1]).base_dist, LinearGaussian().encode(x[:1])
    gap = kl_divergence(torch.distributions.MultivariateNormal(q_z.mean, q_z.variance.diag_embed()), posterior)
    draws = recon - kl + gap - model.exact().log_prob(x[:1].flatten(1))
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))


def test_log_likelihood_with_the_true_posterior_is_exact(x):
    model = LinearGaussian()
    estimate = vh.log_likelihood(model, x, num_samples=7, chunk=9)
    torch.testing.assert_close(estimate, model.exact().log_prob(x.flatten(1)), rtol=1e-5, atol=1e-4)


def test_log_likelihood_rises_with_samples_and_stays_below_the_exact_value(x):
    torch.manual_seed(0)
    model = LinearGaussian(spoil=0.1)
    exact = model.exact().log_prob(x.flatten(1)).mean()
    repeats = torch.stack([torch.stack([vh.log_likelihood(model, x, num_samples=k).mean() for _ in range(30)])
                           for k in (1, 10, 100, 1000)])
    means, errors = repeats.mean(1), repeats.std(1) / math.sqrt(30)
    assert (means.diff() > 0).all()
    assert (means < exact + 4 * errors).all()
    assert exact - means[-1] < 0.1 * (exact - means[0])


def test_log_likelihood_does_not_depend_on_the_chunk(x):
    model = LinearGaussian(spoil=0.1)
    torch.manual_seed(0)
    big = vh.log_likelihood(model, x[:20], num_samples=2000)
    torch.manual_seed(1)
    small = vh.log_likelihood(model, x[:20], num_samples=2000, chunk=17)
    torch.testing.assert_close(big, small, rtol=0, atol=0.3)


class OwnTerms(nn.Module):
    """Both terms known: with a constant kl, log p(x) is recon - kl."""

    def elbo_terms(self, x, y=None):
        return x.flatten(1).sum(1), torch.ones(len(x), dtype=x.dtype)


def test_a_model_with_its_own_terms_or_prior_is_asked_for_them(x):
    class Shifted(LinearGaussian):
        prior = Independent(Normal(torch.full((3,), 1.0).double(), torch.ones(3).double()), 1)

    plain, shifted = LinearGaussian(0.1), Shifted(0.1)
    q_z = shifted.encode(x)
    torch.testing.assert_close(vh.elbo(shifted, x)[1], kl_divergence(q_z, Shifted.prior.expand(q_z.batch_shape)))
    assert not torch.allclose(vh.elbo(shifted, x)[1], vh.elbo(plain, x)[1])
    recon, kl = vh.elbo(OwnTerms(), x)
    for estimate in (vh.log_likelihood(OwnTerms(), x, num_samples=5), vh.log_likelihood(OwnTerms(), x, None, 5, 7)):
        torch.testing.assert_close(estimate, recon - kl, check_dtype=False)


def test_a_prior_that_is_a_module_is_trained_with_the_rest(few):
    class Moved(nn.Module):
        """A prior without a closed form for the KL: the sample of q(z|x) estimates it."""

        def __init__(self):
            super().__init__()
            self.mean = nn.Parameter(torch.ones(4))

        def log_prob(self, z):
            return Independent(Normal(self.mean, 1.0), 1).log_prob(z)

    model = TinyVAE()
    model.prior = Moved()
    x = few.test[:5].batch()[0]
    with vh.seeded(0):
        recon, kl = vh.elbo(model, x)
    with vh.seeded(0):
        q_z = model.encode(x)
        z = q_z.rsample()
        torch.testing.assert_close(kl, q_z.log_prob(z) - model.prior.log_prob(z))
    (kl - recon).sum().backward()
    assert model.prior.mean.grad.abs().min() > 0
    with vh.seeded(0):
        weights = vh.log_weights(model, x)[0]
    with vh.seeded(0):
        z = q_z.rsample((1,))[0]
    torch.testing.assert_close(weights, model.decode(z).log_prob(x) + model.prior.log_prob(z) - q_z.log_prob(z))


def test_log_likelihood_runs_in_eval_mode_and_leaves_the_mode(few):
    model = vh.ConvVAE(channels=(4, 8), hidden=16, latent_dim=2).train()
    model.down.eval()
    before, modes = [b.clone() for b in model.buffers()], [module.training for module in model.modules()]
    vh.log_likelihood(model, few.test[:10].batch()[0], num_samples=3)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_log_likelihood_of_5000_samples_stays_under_1_gb():
    code = ("import vae_helpers as vh, torch, resource\n"
            "model, x = vh.ConvVAE(), torch.rand(8, 1, 28, 28).round()\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            "vh.log_likelihood(model, x, num_samples=5000)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)")
    out = subprocess.run([sys.executable, "-c", code], cwd=vh.ROOT, capture_output=True, text=True, check=True).stdout
    kilobytes = int(out) / (1024 if sys.platform == "darwin" else 1)
    assert kilobytes < 1e6


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_bound_of_log_weights_has_the_gradient_of_the_formula(few, num_classes):
    torch.manual_seed(0)
    model = vh.ConvVAE(num_classes=num_classes, channels=(4, 8), hidden=16, latent_dim=2).train()
    x, y = few.test[:10].batch()
    y, gradients = y if num_classes else None, []
    torch.manual_seed(1)
    bound = vh.log_weights(model, x, y, num_samples=3).logsumexp(0).sum()
    gradients.append(torch.autograd.grad(bound, [*model.parameters()]))
    torch.manual_seed(1)
    q_z = model.encode(x, y)
    z = q_z.rsample((3,))
    p_x = model.decode(z.view(30, 2), None if y is None else torch.cat([y] * 3))
    recon = p_x.log_prob(torch.cat([x] * 3)).view(3, 10)
    log_p_z = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
    gradients.append(torch.autograd.grad((recon + log_p_z - q_z.log_prob(z)).logsumexp(0).sum(), [*model.parameters()]))
    for by_helper, by_hand in zip(*gradients, strict=True):
        torch.testing.assert_close(by_helper, by_hand, rtol=1e-3, atol=1e-3)


def test_log_weights_draws_anew(x):
    first, second = (vh.log_weights(LinearGaussian(spoil=0.3), x, num_samples=count) for count in (2, 5))
    assert first.shape == (2, 40) and second.shape == (5, 40)
    assert not torch.allclose(first, second[:2])


@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_log_likelihood_counts_each_sample_once_whatever_the_chunk(x, chunk):
    exact = [vh.log_likelihood(LinearGaussian(), x, num_samples=count, chunk=chunk) for count in (1, 50)]
    torch.testing.assert_close(*exact)  # with the true posterior one sample gives what 50 give


def test_log_likelihood_refuses_what_does_not_fit(x):
    with pytest.raises(ValueError, match=r"\by\b"):
        vh.log_likelihood(LinearGaussian(), x, torch.zeros(41, dtype=torch.int64), num_samples=1)
    for name in ("num_samples", "chunk"):
        with pytest.raises(ValueError, match=name):
            vh.log_likelihood(LinearGaussian(), x, **{name: 0})
    with pytest.raises(ValueError, match=r"\bx\b"):
        vh.log_likelihood(LinearGaussian(), x[:0])


@pytest.mark.parametrize("bound", [vh.elbo, vh.log_weights, vh.log_likelihood])
@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_distribution_that_is_not_one_event_an_image_is_refused(few, bound, method):
    model = TinyVAE()
    whole = getattr(model, method)
    setattr(model, method, lambda *arguments: whole(*arguments).base_dist)  # without its Independent
    with pytest.raises(ValueError, match="Independent"):
        bound(model, few.test[:4].batch()[0])


def test_grey_pixels_are_no_value_of_a_bernoulli(digits):
    x = digits.train[:3].batch()[0]
    for bound in (vh.elbo, vh.log_likelihood):
        with pytest.raises(ValueError, match="Bernoulli"):
            bound(TinyVAE(), x)


def test_grey_pixels_are_refused_by_python_with_optimization_and_with_validation_off(digits, monkeypatch):
    optimized = types.ModuleType("optimized")  # what python -O makes of the module: no assertion, __debug__ is False
    optimized.__file__ = vh.__file__
    monkeypatch.setitem(sys.modules, "optimized", optimized)
    exec(compile(Path(vh.__file__).read_text(), vh.__file__, "exec", optimize=1), vars(optimized))
    before = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)  # as torch does under -O, and readers by themselves
        for module in (vh, optimized):
            with pytest.raises(ValueError, match="Bernoulli"):
                module.elbo(TinyVAE(), digits.train[:3].batch()[0])
            with pytest.raises(ValueError, match="Bernoulli"):
                module.fit(TinyVAE(), digits, epochs=1, progress=False)
    finally:
        Distribution.set_default_validate_args(before)


def test_a_distribution_without_a_support_of_its_own_is_taken_at_its_word():
    class Counting(Distribution):
        arg_constraints = {}

        def log_prob(self, value):
            return value.flatten(1).sum(1)

    class Model(TinyVAE):
        def decode(self, z, y=None):
            return Counting(z.shape[:1])

    x = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(vh.elbo(Model(), x)[0], x.flatten(1).sum(1))


@pytest.mark.parametrize("call", [vh.elbo, vh.log_likelihood])
def test_a_prior_and_a_likelihood_that_are_not_one_event_are_refused(call):
    class Flat(TinyVAE):
        def decode(self, z, y=None):
            return Independent(Bernoulli(logits=self.decoder(z)[:, 0]), 2)

    x, loose = torch.bernoulli(torch.rand(3, 1, 28, 28)), TinyVAE()
    loose.prior = Normal(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"p\(z\)"):
        call(loose, x)
    with pytest.raises(ValueError, match=r"p\(x\|z\)"):
        call(Flat(), x)


def test_bits_per_dim_of_known_sources():
    levels = Categorical(torch.tensor([0.5, 0.25, 0.125, 0.125]).double())
    assert vh.bits_per_dim(12 * math.log(1 / 256), 12) == pytest.approx(8)
    assert vh.bits_per_dim(-levels.entropy(), 1) == pytest.approx(1.75)
    # a density that is uniform over [0, 1]^12, dequantised: log P = log p - 12 log 256 is the uniform source again
    assert vh.bits_per_dim(0.0 - 12 * math.log(256), 12) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_dims"):
        vh.bits_per_dim(-1.0, 0)


# --------------------------------------------------------------------------------------------------------- 256 levels


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
    assert abs(p_x.mean - (LEVELS * plain(loc, log_scale)).sum()) < 0.5 / 255


@pytest.mark.parametrize("log_scale", SCALES)
def test_value_and_gradient_are_finite_at_the_extremes(log_scale):
    loc = torch.tensor([-50.0, -1.0, 0.0, 0.5, 1.0, 2.0, 50.0]).requires_grad_()
    scale = torch.full_like(loc, log_scale).requires_grad_()
    p_x = vh.DiscretizedLogistic(loc, scale)
    values = p_x.log_prob(torch.tensor([0.0, 128 / 255, 1.0]).view(-1, 1))
    (values.sum() + p_x.mean.sum()).backward()
    assert values.isfinite().all() and loc.grad.isfinite().all() and scale.grad.isfinite().all()


def test_far_from_the_mean_the_logarithm_is_exact_where_the_difference_of_two_sigmoids_is_0():
    loc, log_scale = torch.tensor(0.0), torch.tensor(-6.0)
    value = vh.DiscretizedLogistic(loc, log_scale).log_prob(torch.tensor(200 / 255))
    a, b = (200.5 / 255) * math.exp(6), (199.5 / 255) * math.exp(6)  # log(e^-b - e^-a) up to terms of e^-300
    assert abs(value - (-b + math.log(1 - math.exp(b - a)))) < 1e-3


def near(loc):
    """Levels, each a few from its mean."""
    return ((loc + 0.02 * torch.randn_like(loc)).clamp(0, 1) * 255).round() / 255


def linked(batch=2, side=2, colours=3):
    torch.manual_seed(0)
    shape = (batch, colours, side, side)
    return vh.DiscretizedLogistic(torch.rand(shape).double(), torch.rand(shape).double() - 4,
                                  torch.randn(batch, colours * (colours - 1) // 2, side, side).double() / 2)


def test_with_links_each_colour_is_what_its_definition_says():
    p_x = linked()
    x = near(p_x.loc)
    given = p_x.log_prob(x)
    assert given.shape == x.shape == p_x.batch_shape
    for b in range(2):
        for row in range(2):
            for column in range(2):
                at = (b, slice(None), row, column)
                loc, share, left = p_x.loc[at], p_x.links[at], x[at] - p_x.loc[at]
                means = (loc[0], loc[1] + share[0] * left[0], loc[2] + share[1] * left[0] + share[2] * left[1])
                for c, mean in enumerate(means):
                    expected = plain(float(mean), float(p_x.log_scale[at][c]))[(x[at][c] * 255).round().long()].log()
                    torch.testing.assert_close(given[at][c], expected, rtol=1e-6, atol=1e-6)


def test_links_of_zero_change_nothing():
    p_x = linked()
    alone = vh.DiscretizedLogistic(p_x.loc, p_x.log_scale)
    tied = vh.DiscretizedLogistic(p_x.loc, p_x.log_scale, torch.zeros_like(p_x.links))
    x = near(p_x.loc)
    torch.testing.assert_close(tied.log_prob(x), alone.log_prob(x))
    torch.testing.assert_close(tied.mean, alone.mean)


def test_with_links_the_probabilities_of_a_pixel_sum_to_1():
    """Over a grid of all levels of one colour the others are summed out in turn, the last first."""
    loc, log_scale = torch.tensor([0.3, 0.9]).view(2, 1, 1), torch.tensor([-4.0, -3.0]).view(2, 1, 1)
    p_x = vh.DiscretizedLogistic(loc.double(), log_scale.double(), torch.full((1, 1, 1), 0.7).double())
    first, second = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    every = torch.stack([first, second], -1).view(-1, 2, 1, 1)
    assert abs(p_x.log_prob(every).sum((1, 2, 3)).exp().sum() - 1) < 1e-6


def test_with_links_the_mean_of_a_colour_follows_the_means_before_it():
    p_x = linked()
    means = []
    for c, first in enumerate((0, 0, 1)):  # the link of colour c to the first of those before it
        moves = [p_x.links[:, first + d] * (means[d] - p_x.loc[:, d]) for d in range(c)]
        means.append(vh.DiscretizedLogistic(p_x.loc[:, c] + sum(moves), p_x.log_scale[:, c]).mean)
    torch.testing.assert_close(p_x.mean, torch.stack(means, 1))


@pytest.mark.parametrize("likelihood", ["logistic", "linked"])
@pytest.mark.parametrize("spoil", [lambda x: x * 2 - 1, lambda x: x + 0.3 / 255, lambda x: x * 255],
                         ids=["normalized", "with noise", "0 to 255"])
def test_what_is_no_level_is_refused_before_training(photos, likelihood, spoil):
    model = vh.ConvVAE((3, 32, 32), 4, channels=(4, 8), hidden=16, likelihood=likelihood)
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"\bx\b.*1/255"):
        vh.fit(model, photos, epochs=1, transform=spoil, progress=False)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("likelihood", ["logistic", "linked"])
def test_convvae_takes_them(likelihood, image_shape):
    model = vh.ConvVAE(image_shape, 4, channels=(4, 8), hidden=16, likelihood=likelihood).eval()
    x = torch.randint(0, 256, (5, *image_shape)) / 255
    p_x = model.decode(torch.randn(5, 4))
    assert p_x.batch_shape == (5,) and p_x.event_shape == image_shape
    assert p_x.mean.shape == x.shape
    assert p_x.mean.min() >= 0 and p_x.mean.max() <= 1
    recon, kl = vh.elbo(model, x)
    (kl - recon).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_likelihood_of_ones_own_with_a_weight_is_trained(photos):
    class LearnedScale(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(()))

        def forward(self, output):
            return Independent(Normal(output, self.log_scale.exp()), 3)

    model = vh.ConvVAE((3, 32, 32), 4, channels=(4, 8), hidden=16, likelihood=(LearnedScale(), lambda colours: colours))
    vh.fit(model, photos, epochs=1, progress=False)
    assert model.likelihood.log_scale < 0, "photographs vary by less than the whole range"
    pair = (lambda output: Independent(Bernoulli(logits=output), 3), lambda colours: colours)
    other = vh.ConvVAE((3, 32, 32), 4, likelihood=pair)
    assert isinstance(other.decode(torch.randn(2, 4)).base_dist, Bernoulli)


def test_a_small_linked_model_learns_the_levels_better_than_counting_them():
    data = vh.load_data("photos")
    data = replace(data, train=data.train[::6], test=data.test[::16])
    torch.manual_seed(0)
    model = vh.ConvVAE((3, 32, 32), 16, channels=(8, 16), hidden=64, likelihood="linked")
    history = vh.fit(model, data, epochs=2, batch_size=32, progress=False)
    shares = torch.bincount(data.train.images.flatten().long(), minlength=256).float().add(1)
    shares /= shares.sum()
    counting = shares.log()[data.test.images.long()].sum((1, 2, 3)).mean()
    assert vh.bits_per_dim(-history.test["loss"][-1], 3072) < vh.bits_per_dim(counting, 3072) < 8


def test_frechet_of_gaussians_with_a_known_distance():
    torch.manual_seed(0)
    a = torch.randn(200_000, 3)
    assert vh.frechet(a, 2 * torch.randn(200_000, 3) + 1) == pytest.approx(6, abs=0.1)  # 3 times (0 - 1)² + (1 - 2)²
    turned = torch.linalg.qr(torch.randn(3, 3))[0]
    wide = torch.tensor([1.0, 2.0, 3.0])
    assert vh.frechet(a * wide @ turned, torch.randn(200_000, 3) @ turned) == pytest.approx(0 + 1 + 4, abs=0.1)
    assert vh.frechet(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("b", [torch.zeros(1, 3), torch.zeros(5, 4), torch.zeros(5), torch.full((5, 3), torch.nan)])
def test_frechet_refuses_what_has_no_gaussian(b):
    with pytest.raises(ValueError, match="^b "):
        vh.frechet(torch.randn(10, 3), b)
