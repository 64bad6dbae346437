"""Small models that several tests train or that have an exact answer."""

import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, MultivariateNormal, Normal


class TinyVAE(nn.Module):
    """A reader's own network: no num_classes, no prior, nothing but encode and decode."""

    def __init__(self, latent_dim=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 2 * latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim, 784), nn.Unflatten(1, (1, 28, 28)))

    def encode(self, x, y=None):
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    def decode(self, z, y=None):
        return Independent(Bernoulli(logits=self.decoder(z)), 3)


class LinearGaussian(nn.Module):
    """x = W z + b + noise (Tipping and Bishop 1999): log p(x) and p(z|x) are known. ``spoil`` moves q(z|x) off p(z|x)."""

    def __init__(self, spoil=0.0, latent_dim=3, noise=0.5):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.randn(16, latent_dim, generator=generator, dtype=torch.float64)
        self.bias = torch.randn(16, generator=generator, dtype=torch.float64)
        self.noise, self.spoil = noise, spoil

    def exact(self):
        """p(x), a density over [16]."""
        return MultivariateNormal(self.bias, self.weight @ self.weight.T + self.noise**2 * torch.eye(16).double())

    def encode(self, x, y=None):
        precision = torch.eye(self.weight.shape[1]).double() + self.weight.T @ self.weight / self.noise**2
        covariance = precision.inverse()
        mean = (x.flatten(1) - self.bias) @ self.weight @ covariance / self.noise**2
        if self.spoil:
            return Independent(Normal(mean + self.spoil, covariance.diagonal().sqrt().expand_as(mean)), 1)
        return MultivariateNormal(mean, covariance)

    def decode(self, z, y=None):
        mean = (z @ self.weight.T + self.bias).unflatten(1, (1, 4, 4))
        return Independent(Normal(mean, self.noise), 3)
