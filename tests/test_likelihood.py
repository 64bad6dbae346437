"""The densities and bounds, against torch.distributions, against sampling, and against a model whose answer is known."""

import math
import subprocess
import sys

import pytest
import torch
from models import LinearGaussian, TinyVAE
from torch import nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence

import vae_helpers as vh


@pytest.fixture
def x():
    torch.manual_seed(0)
    return LinearGaussian().exact().sample((40,)).view(-1, 1, 4, 4)


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
    big = vh.log_likelihood(model, x, num_samples=4000)
    torch.manual_seed(1)
    small = vh.log_likelihood(model, x, num_samples=4000, chunk=17)
    torch.testing.assert_close(big, small, rtol=0, atol=0.2)


def test_a_model_with_its_own_terms_or_prior_is_asked_for_them(x):
    class Shifted(LinearGaussian):
        prior = Independent(Normal(torch.full((3,), 1.0).double(), torch.ones(3).double()), 1)

    class OwnTerms(nn.Module):
        def elbo_terms(self, x, y=None):
            return x.flatten(1).sum(1), torch.ones(len(x), dtype=x.dtype)

    plain, shifted = LinearGaussian(0.1), Shifted(0.1)
    q_z = shifted.encode(x)
    torch.testing.assert_close(vh.elbo(shifted, x)[1], kl_divergence(q_z, Shifted.prior.expand(q_z.batch_shape)))
    assert not torch.allclose(vh.elbo(shifted, x)[1], vh.elbo(plain, x)[1])
    recon, kl = vh.elbo(OwnTerms(), x)
    torch.testing.assert_close(vh.log_likelihood(OwnTerms(), x, num_samples=5), (recon - kl), check_dtype=False)


def test_log_likelihood_runs_in_eval_mode_and_leaves_the_mode(few):
    model = vh.ConvVAE(channels=(4, 8), hidden=16, latent_dim=2).train()
    before = [b.clone() for b in model.buffers()]
    vh.log_likelihood(model, few.test[:10].batch()[0], num_samples=3)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_log_likelihood_of_5000_samples_stays_under_1_gb():
    code = ("import torch, resource, vae_helpers as vh\n"
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
    gradients.append(torch.autograd.grad(vh.log_weights(model, x, y)(3).logsumexp(0).sum(), [*model.parameters()]))
    torch.manual_seed(1)
    q_z = model.encode(x, y)
    z = q_z.rsample((3,))
    p_x = model.decode(z.view(30, 2), None if y is None else torch.cat([y] * 3))
    recon = p_x.log_prob(torch.cat([x] * 3)).view(3, 10)
    log_p_z = -0.5 * (z**2).sum(-1) - math.log(2 * math.pi)
    gradients.append(torch.autograd.grad((recon + log_p_z - q_z.log_prob(z)).logsumexp(0).sum(), [*model.parameters()]))
    for by_helper, by_hand in zip(*gradients, strict=True):
        torch.testing.assert_close(by_helper, by_hand, rtol=1e-3, atol=1e-3)


def test_grey_pixels_are_no_value_of_a_bernoulli(digits):
    with pytest.raises(ValueError, match="takes only 0 and 1.*binarize_test"):
        vh.elbo(TinyVAE(), digits.train[:3].batch()[0])


def test_num_samples_must_be_positive(x):
    with pytest.raises(ValueError, match="y holds 41 labels for 40 images; it must hold one for each"):
        vh.log_likelihood(LinearGaussian(), x, torch.zeros(41, dtype=torch.int64), num_samples=1)
    with pytest.raises(ValueError, match="num_samples is 0; it must be a whole number, at least 1"):
        vh.log_likelihood(LinearGaussian(), x, num_samples=0)


def test_bits_per_dim_of_known_sources():
    levels = Categorical(torch.tensor([0.5, 0.25, 0.125, 0.125]).double())
    assert vh.bits_per_dim(12 * math.log(1 / 256), 12) == pytest.approx(8)
    assert vh.bits_per_dim(-levels.entropy(), 1) == pytest.approx(1.75)
    # a density that is uniform over [0, 1]^12, dequantised: log P = log p - 12 log 256 is the uniform source again
    assert vh.bits_per_dim(0.0 - 12 * math.log(256), 12) == pytest.approx(8)
    with pytest.raises(ValueError, match="num_dims is 0"):
        vh.bits_per_dim(-1.0, 0)
