"""Lossless files of binary images by a VAE: bits-back coding with asymmetric numeral systems (Townsend et al. 2019, arXiv
1901.04866). Notebook 09 explains ``push`` and ``pop``; ``write`` and ``read`` put them into a file that is refused when it
is damaged or of another model.

A file is MAGIC, the number of images and their shape, a fingerprint of the model, the words of the stack, and a SHA-256
of all that. The stack starts with words drawn from a fixed seed, which ``read`` finds again when every bit was right.
"""

import hashlib
import struct
from pathlib import Path

import constriction
import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal

import vae_helpers as vh

QuantizedGaussian, Bernoulli = constriction.stream.model.QuantizedGaussian, constriction.stream.model.Bernoulli
AnsCoder = constriction.stream.stack.AnsCoder  # compiled modules, which "from ... import" does not find

MAGIC, HEADER = b"VAEBITS1", struct.Struct("<8s4I16s")
STEPS = 64  # grid points for each unit of z
LATENTS, PIXELS = QuantizedGaussian(-8 * STEPS, 8 * STEPS), Bernoulli(perfect=True)  # False costs 3 % more here


class Exact(vh.ConvVAE):
    """A ConvVAE of float64 from end to end; float32 depends on the width of the processor's vectors."""

    def encode(self, x: Tensor) -> Distribution:
        mean, log_var = self.to_q(self.down(x)).chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var.clamp(-14, 14)).exp()), 1)

    def decode(self, z: Tensor) -> Distribution:
        return self.likelihood(self.up(self.from_z(z)))


def exact(model: vh.ConvVAE) -> Exact:
    """A copy on the CPU in float64: both ends must compute the same numbers."""
    if model.num_classes or model.config["likelihood"] != "bernoulli":
        raise ValueError(f"model is {model.config}; it must be a ConvVAE of binary images ('bernoulli') without classes")
    network = Exact(**model.config)
    network.load_state_dict(model.state_dict())
    return network.double().eval()


@torch.no_grad()
def posterior(model: vh.ConvVAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of q(z|x) in steps of the grid, rounded to hundredths, [latent_dim] each; ``x`` holds 0
    and 1, int32 [C * H * W]."""
    q_z = model.encode(torch.from_numpy(x).double().view(1, *model.image_shape))
    mean, stddev = (np.round(STEPS * value[0].numpy(), 2) for value in (q_z.mean, q_z.stddev))
    return mean.clip(-7.9 * STEPS, 7.9 * STEPS), stddev.clip(0.1)


@torch.no_grad()
def pixels(model: vh.ConvVAE, z: np.ndarray) -> np.ndarray:
    """Probability of a 1 in each pixel [C * H * W] at the grid point ``z``, int32 [latent_dim], rounded to 1e-5."""
    p_x = model.decode(torch.from_numpy(z / STEPS).view(1, -1))
    return np.round(p_x.mean.numpy().ravel(), 5).clip(1e-5, 1 - 1e-5)


def prior(model: vh.ConvVAE) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of p(z) in steps of the grid, [latent_dim] each."""
    return np.zeros(model.latent_dim), np.full(model.latent_dim, float(STEPS))


def push(stack: AnsCoder, model: vh.ConvVAE, x: np.ndarray) -> None:
    z = stack.decode(LATENTS, *posterior(model, x))
    stack.encode_reverse(x, PIXELS, pixels(model, z))
    stack.encode_reverse(z, LATENTS, *prior(model))


def pop(stack: AnsCoder, model: vh.ConvVAE) -> np.ndarray:
    z = stack.decode(LATENTS, *prior(model))
    x = stack.decode(PIXELS, pixels(model, z))
    stack.encode_reverse(z, LATENTS, *posterior(model, x))
    return x


def first_words(model: vh.ConvVAE) -> np.ndarray:
    """What the stack holds before the first image: a word of 32 bits for each latent."""
    return np.random.default_rng(0).integers(2**32, size=model.latent_dim, dtype=np.uint32)


def fingerprint(model: vh.ConvVAE) -> bytes:
    """16 bytes that tell models apart, of configuration and weights."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()[:16]


def write(path: str | Path, model: vh.ConvVAE, images: Tensor) -> list[int]:
    """Writes uint8 ``images`` [N, C, H, W] of levels 0 and 255; returns the bits of the stack before and after each.
    Raises ValueError for other images and models, OSError when the file cannot be written."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != model.image_shape or not len(images):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; this model takes uint8 [N, *{model.image_shape}]")
    if not ((images == 0) | (images == 255)).all():
        raise ValueError("images hold levels between 0 and 255; they must be binary: use data.binarize_test()")
    network, stack = exact(model), AnsCoder(first_words(model), seal=True)
    bits = [stack.num_bits()]
    for x in (images.cpu().flatten(1) // 255).to(torch.int32).numpy():
        push(stack, network, x)
        bits.append(stack.num_bits())
    content = HEADER.pack(MAGIC, len(images), *model.image_shape, fingerprint(model)) + stack.get_compressed().tobytes()
    with vh._writing(Path(path)) as beside:
        beside.write_bytes(content + hashlib.sha256(content).digest())
    return bits


def read(path: str | Path, model: vh.ConvVAE) -> Tensor:
    """The images of a file of ``write``. Raises ValueError for a damaged file and for that of another model."""
    content, digest = (whole := Path(path).read_bytes())[:-32], whole[-32:]
    if not content.startswith(MAGIC) or len(content) < HEADER.size:
        raise ValueError(f"path is {path}, which is no file of bits_back.write")
    if hashlib.sha256(content).digest() != digest:
        raise ValueError(f"path is {path}, which is damaged: its checksum does not fit. Copy it again.")
    _, count, *shape, maker = HEADER.unpack(content[:HEADER.size])
    if maker != fingerprint(model):
        raise ValueError(f"model is not the one that wrote {path}: other weights or another configuration")
    network, stack = exact(model), AnsCoder(np.frombuffer(content[HEADER.size:], dtype=np.uint32).copy())
    images = np.stack([pop(stack, network) for _ in range(count)][::-1])
    try:
        same = np.array_equal(stack.get_compressed(unseal=True), first_words(model))
    except AssertionError:  # no whole number of words is left
        same = False
    if not same:
        raise ValueError(f"{path} is whole, but this machine computes other probabilities than the one that wrote it")
    return torch.from_numpy(images).to(torch.uint8).mul(255).view(count, *shape)
