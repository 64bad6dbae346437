"""The ladder of notebooks 05, 06 and 08: a VAE for 32 x 32 colour images whose latents are grids of several sizes.

Latents z_1, ..., z_L go from the coarsest grid to the finest. Both directions run from the top down (Sønderby et al. 2016,
arXiv 1602.02282): p(z) is the product of p(z_l | z_1, ..., z_{l-1}), q(z|x) that of q(z_l | z_1, ..., z_{l-1}, x).
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

import vae_helpers as vh

WIDTHS = {16: 32, 8: 64, 4: 96, 1: 128}  # channels of the features at each grid size
FREE = {1: 25, 4: 60}  # nats that free_bits gives the levels of these sizes


def normed(convolution: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(convolution.in_channels), nn.ReLU(), convolution)


def layer(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return normed(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2))


def residual(wide: int) -> nn.Module:
    return vh.Residual(*layer(wide, wide // 2, 1), *layer(wide // 2, wide))


def gaussian(output: Tensor) -> Independent:
    """Mean and standard deviation of a grid of latents; the latter stays between exp(-2) and exp(2)."""
    mean, log_std = output.float().chunk(2, dim=1)
    return Independent(Normal(mean, (2 * torch.tanh(log_std / 2)).exp()), 3)


class Level(nn.Module):
    """A grid of latents between the features above it and those below it."""

    def __init__(self, wide: int, latents: int):
        super().__init__()
        self.to_p = layer(wide, 2 * latents, 1)
        nn.init.zeros_(self.to_p[-1].weight)  # so that every prior starts near N(0, I)
        self.to_q = nn.Sequential(layer(2 * wide, wide, 1), layer(wide, 2 * latents))
        self.from_z = nn.Conv2d(latents, wide, 1)
        self.after = residual(wide)

    def prior(self, features: Tensor) -> Distribution:
        """p(z_l | z_1, ..., z_{l-1}), from the features above."""
        return gaussian(self.to_p(features))

    def posterior(self, p_z: Distribution, features: Tensor, seen: Tensor) -> Distribution:
        """q(z_l | z_1, ..., z_{l-1}, x): a change of the prior, in its units (Vahdat and Kautz 2020, arXiv 2007.03898)."""
        change = gaussian(self.to_q(torch.cat([features, seen], 1)))
        return Independent(Normal(p_z.mean + p_z.stddev * change.mean, p_z.stddev * change.stddev), 3)

    def forward(self, features: Tensor, z: Tensor) -> Tensor:
        return self.after(features + self.from_z(z))


class Ladder(nn.Module):
    """``grids``: size -> latents at each of its places, from the top down. ``num_classes`` > 0: the label chooses the
    features at the top, from which the prior of every level and p(x|z, y) follow. Raises ValueError for sizes other than 1,
    4, 8 and 16, and for labels that do not fit."""

    def __init__(self, grids: dict[int, int], num_classes: int = 0):
        super().__init__()
        if list(grids) != sorted(grids) or not grids or not set(grids) <= WIDTHS.keys():
            raise ValueError(f"grids is {grids}; its sizes must be some of 1, 4, 8, 16, in this order")
        self.grids, self.num_classes, w = dict(grids), num_classes, WIDTHS
        top = next(iter(grids))
        down = {16: nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, w[16], 3, padding=1), residual(w[16])),
                8: nn.Sequential(nn.MaxPool2d(2), layer(w[16], w[8]), residual(w[8])),
                4: nn.Sequential(nn.MaxPool2d(2), layer(w[8], w[4]), residual(w[4])),
                1: normed(nn.Conv2d(w[4], w[1], 4))}
        self.down = nn.ModuleDict({str(size): step for size, step in down.items() if size >= top})
        self.start = nn.Parameter(torch.zeros(max(1, num_classes), w[top], top, top))
        self.levels = nn.ModuleList([Level(w[size], latents) for size, latents in grids.items()])
        up = {4: normed(nn.ConvTranspose2d(w[1], w[4], 4)),
              8: normed(nn.ConvTranspose2d(w[4], w[8], 4, stride=2, padding=1)),
              16: normed(nn.ConvTranspose2d(w[8], w[16], 4, stride=2, padding=1))}
        self.up = nn.ModuleDict({str(size): step for size, step in up.items() if size > top})
        self.out = nn.Sequential(residual(w[16]), *normed(nn.ConvTranspose2d(w[16], 24, 4, stride=2, padding=1)),
                                 layer(24, 9, 1))
        self.to(memory_format=torch.channels_last)

    def grow(self, features: Tensor, size: int) -> Tensor:
        """The features brought to ``size`` x ``size``."""
        for larger, step in self.up.items():
            if features.shape[-1] < int(larger) <= size:
                features = step(features)
        return features

    def descend(self, features: Tensor, choose) -> Distribution:
        """p(x|z), after choose(i, features) has given z at each level i, from the top down."""
        for i, (level, size) in enumerate(zip(self.levels, self.grids, strict=True)):
            features = self.grow(features, size)
            features = level(features, choose(i, features))
        return vh.DiscretizedLogistic.of_output(self.out(self.grow(features, 16)).float())

    def terms(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """log p(x|z) at one posterior sample, nats [B], and the KL of each level, nats [B]."""
        seen, kl = self.look(x), []

        def choose(i, features):
            p_z = self.levels[i].prior(features)
            q_z = self.levels[i].posterior(p_z, features, seen[i])
            z = q_z.rsample()
            kl.append(kl_divergence(q_z, p_z) if self.training else q_z.log_prob(z) - p_z.log_prob(z))
            return z
        return self.descend(self.top(len(x), y), choose).log_prob(x), kl

    def elbo_terms(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """recon and kl, nats [B] each. In train mode kl is the closed form, so importance weights need eval mode."""
        recon, kl = self.terms(x, y)
        return recon, sum(kl)

    def look(self, x: Tensor) -> list[Tensor]:
        """What the encoder sees at the size of each level."""
        seen = {}
        for size, step in self.down.items():
            x = seen[size] = step(x)
        return [seen[str(size)] for size in self.grids]

    def top(self, count: int, y: Tensor | None) -> Tensor:
        """The features above the first level: learned, of each class its own."""
        vh._check_labels(y, count, self.num_classes)
        return self.start.expand(count, -1, -1, -1) if y is None else self.start[y]

    def from_prior(self, i: int, features: Tensor, given: Sequence[Tensor] = ()) -> Tensor:
        """A draw of z from the prior of level i, where it is not ``given``: the ``choose`` of a sample."""
        return given[i] if i < len(given) else self.levels[i].prior(features).sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None, keep: int | None = None) -> Tensor:
        """Mean images [B, 3, 32, 32], in eval mode. The first ``keep`` levels (None: all) hold the mean of q(z|x); the rest
        is drawn from the prior."""
        def choose(i, features):
            if keep is None or i < keep:
                return self.levels[i].posterior(self.levels[i].prior(features), features, seen[i]).mean
            return self.from_prior(i, features)

        with vh._eval_mode(self):
            seen = self.look(x)
            return self.descend(self.top(len(x), y), choose).mean

    @torch.no_grad()
    def draw(self, x: Tensor, y: Tensor | None = None) -> list[tuple[Tensor, Distribution]]:
        """A draw of q(z_l|z_1, ..., z_{l-1}, x) at each level, with the prior p(z_l|z_1, ..., z_{l-1}), in eval mode."""
        drawn = []

        def choose(i, features):
            p_z = self.levels[i].prior(features)
            drawn.append((self.levels[i].posterior(p_z, features, seen[i]).sample(), p_z))
            return drawn[-1][0]

        with vh._eval_mode(self):
            seen = self.look(x)
            self.descend(self.top(len(x), y), choose)
        return drawn

    @torch.no_grad()
    def sample(self, num_images: int, y: Tensor | None = None, given: Sequence[Tensor] = ()) -> Tensor:
        """Mean images [num_images, 3, 32, 32] at draws z of the prior, in eval mode. The first levels may be ``given``."""
        with vh._eval_mode(self):
            return self.descend(self.top(num_images, y), partial(self.from_prior, given=given)).mean

    @torch.no_grad()
    def for_samples(self, given: Callable = lambda count: (), num_batches: int = 20, batch_size: int = 200) -> "Ladder":
        """A copy for ``sample`` alone: its BatchNorm layers have the statistics of samples, in place of those of
        reconstructions that training left (Vahdat and Kautz 2020, arXiv 2007.03898). ``given(count)``: draws of the first
        levels, where they do not come from their priors."""
        other = copy.deepcopy(self)
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None  # the mean over all batches
        y = torch.arange(batch_size, device=self.start.device) % self.num_classes if self.num_classes else None
        other.train()
        for _ in range(num_batches):
            other.descend(other.top(batch_size, y), partial(other.from_prior, given=given(batch_size)))
        return other.eval()


def free_bits(model: Ladder, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """A loss for vh.fit: in training a level pays for its KL only where the mean over the batch exceeds FREE (Kingma et al.
    2016, arXiv 1606.04934, appendix C8)."""
    recon, kl = model.terms(x, y if model.num_classes else None)
    paid = kl
    if model.training:
        paid = [level.mean().clamp(min=FREE.get(size, 0)) for size, level in zip(model.grids, kl, strict=True)]
    return {"loss": sum(paid) - recon, "recon": recon, "kl": sum(kl)}


def draw_ladder(grids: dict[int, int]) -> plt.Figure:
    """Figure of the encoder, going up on the left, of the decoder, coming down on the right, and of the latents."""
    figure, axes = plt.subplots(figsize=(7.2, 0.9 * len(grids) + 1.6))

    def box(x, y, text, colour="white", edge="black"):
        axes.text(x, y, text, ha="center", va="center", bbox={"boxstyle": "round,pad=0.4", "fc": colour, "ec": edge})

    def arrow(start, end, colour="black", bend=0.0):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4,
                                                  "connectionstyle": f"arc3,rad={bend}"})

    for i, (size, latents) in enumerate(grids.items(), 1):
        y = len(grids) - i + 1
        for x in (0, 4):
            box(x, y, f"features {size} x {size}")
        box(2, y, f"$z_{i}$: {latents} x {size} x {size}", "#fff3df", vh.COLOURS[1])
        arrow((0, y - 0.75), (0, y - 0.25))
        arrow((4, y + 0.75), (4, y + 0.25))
        arrow((0.7, y), (1.35, y), vh.COLOURS[0])
        arrow((3.35, y + 0.12), (2.65, y + 0.12), vh.COLOURS[0], 0.15)
        arrow((2.65, y - 0.12), (3.35, y - 0.12), "black", 0.15)
    arrow((4, 0.75), (4, 0.25))
    box(0, 0, "image $x$", "#e8f1fa")
    box(4, 0, "$p(x|z)$", "#e8f1fa")
    box(4, len(grids) + 1, "learned start", "#e8f1fa")
    axes.text(2, len(grids) + 1, "blue: $p(z_l|z_{<l})$ needs the right side,\n$q(z_l|z_{<l}, x)$ both sides", ha="center",
              va="center", fontsize="small")
    axes.set(xlim=(-0.8, 4.8), ylim=(-0.4, len(grids) + 1.4))
    axes.axis("off")
    plt.close(figure)
    return figure
