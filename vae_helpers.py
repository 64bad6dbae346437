"""Shared code of the VAE tutorial notebooks: ``import vae_helpers as vh``.

Sections: settings, data, likelihood terms, the convolutional VAE, training, pictures, explorer.

A *model* is any ``nn.Module`` whose ``encode(x, y=None)`` and ``decode(z, y=None)`` return ``torch.distributions``
objects of batch shape [B]: q(z|x) and p(x|z). ``x`` is float in [0, 1] of shape [B, C, H, W]; ``y`` holds int64
labels [B]. The prior is N(0, I) unless the model has its own distribution ``prior``; a model with a method
``elbo_terms(x, y)`` is asked for both terms instead. With a ``loss`` of its own, ``fit`` trains any module at all.
Log-likelihoods are in nats (natural logarithms; 1 nat = 1.44 bits).
"""

from __future__ import annotations

import base64
import copy
import difflib
import hashlib
import html
import io
import math
import numbers
import os
import re
import socket
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import display
from PIL import Image, ImageDraw, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical, constraints, kl_divergence
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- settings

ROOT = Path(__file__).resolve().parent
STYLE = ["tableau-colorblind10", {"figure.dpi": 80, "figure.constrained_layout.use": True, "image.cmap": "gray",
                                  "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": "medium"}]


def budget(quick, standard, full):
    """The one of the three values that the environment variable VAE_BUDGET names; ``standard`` when it is unset.

    Raises ValueError when VAE_BUDGET is none of quick, standard, full.
    """
    name, values = os.environ.get("VAE_BUDGET") or "standard", {"quick": quick, "standard": standard, "full": full}
    if name not in values:
        raise ValueError(f"VAE_BUDGET is {name!r}; it must be one of {', '.join(values)}")
    return values[name]


def device() -> torch.device:
    """The current accelerator (CUDA, MPS, ...) where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def output_dir(name: str) -> Path:
    """The folder "checkpoints", "images" or "notebooks/weights" of the project, to write to; made where missing.

    Pictures and weights of a shorter run than ``full`` go under runs/ instead, so that only ``full`` replaces those that
    are shipped. The environment variable VAE_OUT puts everything under another folder. Raises OSError where that cannot
    be made.
    """
    root = Path(os.environ.get("VAE_OUT") or ROOT)
    folder = root / name if name == "checkpoints" or budget(False, False, True) else root / "runs" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {folder}: {error}. Set VAE_OUT to a folder that can be written to.") from error
    return folder


@contextmanager
def seeded(seed: int):
    """Random numbers inside the block follow ``seed``; after it they go on, on CPU and CUDA, as if none was drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """Images, uint8 [N, C, H, W], and their labels, int64 [N]. An index or slice gives a smaller Split.

    Raises ValueError for other types and shapes.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images are {_kind(self.images)}; they must be uint8 levels [N, C, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels are {_kind(self.labels)}; they must be int64 [{len(self.images)}]")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> Split:
        if isinstance(index, numbers.Integral):
            index = [int(index)]
        return Split(self.images[index], self.labels[index])

    def batch(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """``x`` float in [0, 1] of shape [N, C, H, W] and ``y`` int64 [N], on ``device``."""
        return self.images.to(device).float() / 255, self.labels.to(device)


@dataclass(frozen=True)
class ImageData:
    """``train`` and ``test`` Splits, the names of the ``classes``, the ``name`` and where it came from (``source``)."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    name: str
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return tuple(self.train.images.shape[1:])

    def binarize_test(self, seed: int = 0) -> ImageData:
        """The same data with each test pixel Bernoulli-sampled once to 0 or 255: every model is scored on equal bits.

        Training images stay grey: ``fit(..., transform=torch.bernoulli)`` samples them afresh in every batch
        (dynamic binarization; Burda et al. 2016, arXiv 1509.00519, section 5).
        """
        generator = torch.Generator().manual_seed(seed)
        bits = torch.bernoulli(self.test.images.float() / 255, generator=generator).mul(255).to(torch.uint8)
        return replace(self, test=Split(bits, self.test.labels))


_OFFICIAL = {  # name -> title, torchvision's class, its folder, the MD5 of each file there, the stand-in
    "mnist": ("MNIST", datasets.MNIST, "MNIST/raw", {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}, "digits"),
    "cifar10": ("CIFAR-10", datasets.CIFAR10, "cifar-10-batches-py",
                dict(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list), "photos"),
}


def load_data(name: str | Path, root: str | Path | None = None, *, image_size: int = 32,
              channels: int = 3) -> ImageData:
    """Reads a whole data set as uint8.

    ``name``: "mnist", "cifar10", "digits" (scikit-learn's 1,797 handwritten digits at 28x28), "photos" (32x32
    patches of scikit-learn's two photographs), or the path of a folder of pictures: ``train/<class>/*`` and
    ``test/<class>/*`` in it, or ``<class>/*`` (then every tenth is for testing). Pictures are brought to ``channels``
    (1 or 3), resized and cropped to squares of ``image_size`` once; the result is kept under ``root``/cache and
    memory-mapped.

    ``root``: where data sets lie; else the environment variable VAE_DATA, else data/ beside this file. MNIST and
    CIFAR-10 are looked for there (CIFAR-10 also as a folder ``root``/cifar10 of pictures), then downloaded by
    torchvision, then replaced by "digits" and "photos" with a warning. ``ImageData.source`` says which it was.

    Raises ValueError for an unknown name, a folder without readable pictures or with other classes in train/ than in
    test/, and image_size or channels out of range; RuntimeError for a damaged file, OSError when the cache cannot be
    written.
    """
    root = Path(root or os.environ.get("VAE_DATA") or ROOT / "data")
    plain = str(name).lower().replace("-", "")
    if plain in _OFFICIAL:
        return _load_official(plain, root)
    if plain == "digits":
        return _load_digits()
    if plain == "photos":
        return _load_photos()
    if str(name) and Path(str(name)).is_dir():
        return _load_folder(Path(name).resolve(), root, image_size, channels)
    known = [*_OFFICIAL, "digits", "photos"]
    near = difflib.get_close_matches(plain, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the data sets are {', '.join(known)}"
    raise ValueError(f"name is {str(name)!r}, but there is neither such a data set nor such a folder; {hint}")


def _load_official(name: str, root: Path) -> ImageData:
    title, dataset, folder, checksums, stand_in = _OFFICIAL[name]
    files = {root / folder / file: md5 for file, md5 in checksums.items()}
    if not all(file.is_file() for file in files):
        if name == "cifar10" and (root / name).is_dir():
            data = _load_folder(root / name, root, image_size=32, channels=3)
            lossy = any((root / name).glob("train/*/*.jp*g"))
            return replace(data, name=name, source="CIFAR-10, JPEG copy" if lossy else "CIFAR-10, as pictures")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(5)
        try:
            dataset(root, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            warnings.warn(f"{title} is not under {root} and could not be downloaded ({' '.join(str(error).split())}). "
                          f"Going on with the stand-in {stand_in!r}. For the real set, connect to the network or put "
                          f"the files of {folder}/ there, and run this again.", stacklevel=3)
            data = load_data(stand_in)
            return replace(data, source=f"{data.source}, in place of {title}")
        finally:
            socket.setdefaulttimeout(timeout)
    for file, md5 in files.items():
        if not check_integrity(file, md5):
            raise RuntimeError(f"{file} is damaged: its MD5 checksum is not {md5}. Delete it and run this again.")
    splits, sets = [], [dataset(root, train=train) for train in (True, False)]
    for part in sets:
        images = torch.as_tensor(part.data)
        images = images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else images.unsqueeze(1)
        splits.append(Split(images, torch.as_tensor(part.targets)))
    return ImageData(*splits, tuple(sets[0].classes), name, title)


def _load_digits() -> ImageData:
    """8x8 digits enlarged to 20x20 and moved so that the centre of mass is the centre of 28x28, as MNIST was made."""
    bunch = load_digits()
    ink = v2.functional.resize(torch.as_tensor(bunch.images).unsqueeze(1) / 16, [20, 20], antialias=True)
    ink = F.pad(ink.clamp(0, 1), (4, 4, 4, 4))
    grid = torch.arange(28.0, dtype=ink.dtype)
    mass = ink.sum((1, 2, 3))
    down = (13.5 - (ink.sum((1, 3)) * grid).sum(1) / mass).round().long()
    right = (13.5 - (ink.sum((1, 2)) * grid).sum(1) / mass).round().long()
    ink = torch.stack([image.roll((int(d), int(r)), (1, 2)) for image, d, r in zip(ink, down, right, strict=True)])
    everything = Split(ink.mul(255).round().to(torch.uint8), torch.as_tensor(bunch.target, dtype=torch.int64))
    train, test = train_test_split(np.arange(len(ink)), test_size=297, stratify=bunch.target, random_state=0)
    return ImageData(everything[train], everything[test], tuple("0123456789"), "digits", "scikit-learn digits")


def _load_photos() -> ImageData:
    """Overlapping 32x32 patches; the rightmost fifth of each photograph is only for testing."""
    sample = load_sample_images()
    splits = []
    for columns, step in ((slice(0, 512), 8), (slice(512, None), 16)):
        parts = [torch.as_tensor(photo[:, columns].copy()) for photo in sample.images]
        patches = [part.unfold(0, 32, step).unfold(1, 32, step).flatten(0, 1) for part in parts]
        labels = torch.repeat_interleave(torch.arange(len(patches)), torch.tensor([len(p) for p in patches]))
        splits.append(Split(torch.cat(patches).contiguous(), labels))
    classes = tuple(Path(name).stem for name in sample.filenames)
    return ImageData(*splits, classes, "photos", "patches of scikit-learn's two photographs")


def _load_folder(folder: Path, root: Path, image_size: int, channels: int) -> ImageData:
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour)")
    if image_size < 4 or image_size % 4:
        raise ValueError(f"image_size is {image_size}; it must be a positive multiple of 4")
    halves = [folder / "train", folder / "test"]
    there = [half.is_dir() for half in halves]
    if any(there) and not all(there):
        raise ValueError(f"{folder} has only one of train/ and test/; add the other, or put the classes directly in it")
    split_here = not any(there)
    try:
        sets = [datasets.ImageFolder(part) for part in ([folder] if split_here else halves)]
    except FileNotFoundError as error:
        raise ValueError(f"{folder} must hold pictures as <class>/*.png (or .jpg, ...), or so under train/ and test/: "
                         f"{error}") from error
    if sets[0].classes != sets[-1].classes:
        raise ValueError(f"{folder}: train/ has the classes {sets[0].classes}, test/ has {sets[-1].classes}; "
                         "they must be the same")
    splits = [*map(partial(_decode, cache=root / "cache", image_size=image_size, channels=channels), sets)]
    if split_here:
        tenth = torch.arange(len(splits[0])) % 10 == 0
        if tenth.all():
            raise ValueError(f"{folder} holds one readable picture; at least two are needed, to train and to test")
        splits = [splits[0][~tenth], splits[0][tenth]]
    return ImageData(*splits, tuple(sets[0].classes), folder.name, f"folder {folder.name}")


def _decode(pictures: datasets.ImageFolder, cache: Path, image_size: int, channels: int) -> Split:
    """Decodes the pictures into one file of uint8, once while they stay as they are, and memory-maps it."""
    stats = [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path, _ in pictures.samples]
    key = hashlib.sha256(repr((stats, image_size, channels)).encode()).hexdigest()[:16]
    raw, index = cache / f"{key}.uint8", cache / f"{key}.labels.pt"
    pixels = channels * image_size**2
    try:
        kept = torch.load(index, weights_only=True)
        whole = raw.stat().st_size == len(kept["labels"]) * pixels
    except Exception:  # not there, or damaged: made anew from the pictures
        whole = False
    if not whole:
        kept = {"labels": [], "unreadable": []}
        prepare = v2.Compose([v2.PILToTensor(), v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)])

        def decode_all(file) -> None:
            for path, label in tqdm(pictures.samples, "decoding pictures", file=_progress_file(), leave=False):
                try:
                    with Image.open(path) as picture:
                        upright = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
                    image = prepare(upright)
                except Exception:  # a broken picture can make its decoder raise nearly anything
                    kept["unreadable"].append(Path(path).name)
                else:
                    file.write(image.numpy().tobytes())
                    kept["labels"].append(label)

        _write(raw, decode_all)
        kept["labels"] = torch.tensor(kept["labels"], dtype=torch.int64)
        _write(index, partial(torch.save, kept))
    labels, unreadable = kept["labels"], kept["unreadable"]
    if unreadable:
        warnings.warn(f"{len(unreadable)} unreadable pictures of {pictures.root} are left out: "
                      f"{', '.join(unreadable[:10])}{', ...' if len(unreadable) > 10 else ''}", stacklevel=4)
    if not len(labels):
        raise ValueError(f"{pictures.root} holds no readable picture")
    shape = (len(labels), channels, image_size, image_size)
    return Split(torch.from_file(str(raw), size=len(labels) * pixels, dtype=torch.uint8).view(shape), labels)


def _write(path: Path, write: Callable) -> None:
    """Calls ``write(file)`` on a file beside ``path``, then renames it: a kill or a full disk spares the old file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError | RuntimeError):
            raise OSError(f"cannot write {path}: {error}. Free some space or choose a folder that can be written to; "
                          "a file that was there before is unharmed.") from error
        raise


def _check_whole(least: int, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least}")


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {list(tensor.shape)}"


def slant(images: Tensor) -> Tensor:
    """Angle by which the ink of each image [N, 1, H, W] leans, degrees [N]: 0 is upright, positive is to the right.

    From second-order moments: the shear that makes the covariance of row and column vanish (Teague 1980).
    An image without ink has slant 0.
    """
    ink = images.float().mean(1)
    rows = torch.arange(ink.shape[1], device=ink.device).view(1, -1, 1)
    columns = torch.arange(ink.shape[2], device=ink.device).view(1, 1, -1)
    share = ink / ink.sum((1, 2), keepdim=True).clamp(min=1e-6)
    down = rows - (share * rows).sum((1, 2), keepdim=True)
    right = columns - (share * columns).sum((1, 2), keepdim=True)
    return torch.rad2deg(torch.atan2(-(share * down * right).sum((1, 2)), (share * down**2).sum((1, 2))))


def stroke_width(images: Tensor) -> Tensor:
    """Width in pixels [N] of the strokes of images [N, 1, H, W]: twice the ink over the sum of jumps between pixels.

    A stroke of width w and length L has area w L and, when it is long, an outline of 2 L.
    """
    ink = images.float().mean(1)
    jumps = torch.hypot(ink.diff(dim=1)[:, :, 1:], ink.diff(dim=2)[:, 1:]).sum((1, 2))
    return 2 * ink.sum((1, 2)) / jumps.clamp(min=1e-6)


# ----------------------------------------------------------------------------------------------------- likelihood terms


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_var))) || N(0, I)) in nats [B], of ``mean`` and ``log_var`` [B, latent_dim].

    Kingma and Welling 2014 (arXiv 1312.6114), appendix B.
    """
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)


def elbo(model: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two terms of the evidence lower bound, nats [B] each: recon, log p(x|z) at one posterior sample, and kl.

    ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)) (Kingma and Welling 2014, arXiv 1312.6114, equation 3). A model with
    its own ``elbo_terms(x, y)`` is asked for them. Raises ValueError when x is no possible value under p(x|z).
    """
    if hasattr(model, "elbo_terms"):
        return model.elbo_terms(x, y)
    q_z = model.encode(x, y)
    z = q_z.rsample()
    recon = _recon(model.decode(z, y), x)
    p_z = _prior(model, z)
    try:
        kl = kl_divergence(q_z, p_z)
    except NotImplementedError:  # no closed form for this pair: the same sample estimates it
        kl = q_z.log_prob(z) - p_z.log_prob(z)
    return recon, kl


def _recon(p_x: Distribution, x: Tensor) -> Tensor:
    try:
        return p_x.log_prob(x)
    except ValueError as error:
        reason = str(error).split(", but found")[0]
        raise ValueError(f"x is no possible value under p(x|z): {reason}. A Bernoulli likelihood "
                         "takes only 0 and 1: binarize training batches by fit(..., transform=torch.bernoulli), test "
                         "images by data.binarize_test(). A likelihood of levels takes only 0, 1/255, ..., 1: give it "
                         "images as they are, neither normalized nor with noise.") from error


def _prior(model: nn.Module, z: Tensor) -> Distribution:
    own = getattr(model, "prior", None)
    return own if own is not None else Independent(Normal(torch.zeros_like(z), torch.ones_like(z)), 1)


@torch.no_grad()
def log_likelihood(model: nn.Module, x: Tensor, y: Tensor | None = None, num_samples: int = 1000,
                   chunk: int = 1000) -> Tensor:
    """Estimate of log p(x), nats [B]: the log of the mean of p(x|z) p(z) / q(z|x) over draws z of q(z|x), in eval mode.

    A lower bound in expectation that rises to log p(x) with ``num_samples`` (Burda et al. 2016, arXiv 1509.00519,
    equation 8). At most ``chunk`` images are decoded at once, which bounds the memory. An ``elbo_terms`` of the
    model must give log q(z|x) - log p(z) of its sample as kl here. Raises ValueError when num_samples, chunk or the number
    of images is below 1, or y does not fit.
    """
    _check_whole(1, num_samples=num_samples, chunk=chunk, **{"len(x)": len(x)})
    if y is not None and len(y) != len(x):
        raise ValueError(f"y holds {len(y)} labels for {len(x)} images; it must hold one for each")
    here, result = _device_of(model), []
    with _eval_mode(model):
        for start in range(0, len(x), chunk):
            x_part = x[start:start + chunk].to(here)
            y_part = None if y is None else y[start:start + chunk].to(here)
            at_once = max(1, chunk // len(x_part))
            draw = log_weights(model, x_part, y_part)
            total = torch.full((len(x_part),), -math.inf, device=here)
            for done in range(0, num_samples, at_once):
                total = torch.logaddexp(total, draw(min(at_once, num_samples - done)).logsumexp(0))
            result.append(total - math.log(num_samples))
    return torch.cat(result).to(x.device)


def log_weights(model: nn.Module, x: Tensor, y: Tensor | None = None) -> Callable[[int], Tensor]:
    """A function of a count: log p(x|z) + log p(z) - log q(z|x) for that many samples z of each image, nats [count, B].

    The log of their mean exponential estimates log p(x) and can be trained on (Burda et al. 2016, arXiv 1509.00519,
    equation 8); each call draws anew. Raises ValueError when x is no possible value under p(x|z).
    """
    def repeated(count: int) -> tuple[Tensor, Tensor | None]:
        return x.repeat(count, 1, 1, 1), None if y is None else y.repeat(count)

    if hasattr(model, "elbo_terms"):
        def draw(count: int) -> Tensor:
            recon, kl = model.elbo_terms(*repeated(count))
            return (recon - kl).view(count, -1)
        return draw
    q_z = model.encode(x, y)  # once, not for every sample

    def draw(count: int) -> Tensor:
        x_all, y_all = repeated(count)
        z = q_z.rsample((count,))
        recon = _recon(model.decode(z.flatten(0, 1), y_all), x_all).view(count, -1)
        return recon + _prior(model, z).log_prob(z) - q_z.log_prob(z)
    return draw


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    """-nats / (num_dims log 2): the negative log-likelihood of an image in bits for each of its ``num_dims`` values.

    ``nats`` is log P(x) of the 256 discrete levels. A density p over [0, 1] gives such a probability through the
    volume of one level, 1/256 in each dimension: log P(x) = log p(x) - num_dims log 256, with uniform noise of
    width 1/256 on x (Theis et al. 2016, arXiv 1511.01844, section 3.1). Raises ValueError when num_dims < 1.
    """
    _check_whole(1, num_dims=num_dims)
    return -nats / (num_dims * math.log(2))


class _Levels(constraints.Constraint):
    """0, 1/255, ..., 1, up to rounding."""

    def check(self, value: Tensor) -> Tensor:
        return ((value * 255).round() / 255 - value).abs().lt(1e-5) & (value >= 0) & (value <= 1)


def log_mass(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Logarithm of what a logistic density has between x - 1/510 and x + 1/510: nats, one for each value of ``x``.

    The bins of 0 and 1 reach to infinity (Salimans et al. 2017, arXiv 1701.05517, equation 2).
    With a and b the ends of the bin less ``loc``, over the scale, sigmoid(a) - sigmoid(b) is the product of sigmoid(a),
    sigmoid(-b) and 1 - exp(b - a): its logarithm is exact where the difference of the two would be 0.
    """
    inverse = (-log_scale).exp()
    centre, half = (x - loc) * inverse, inverse / 510
    below, above = F.logsigmoid(centre + half), F.logsigmoid(half - centre)
    inside = below + above + torch.log(-torch.expm1(-2 * half))
    return torch.where(x < 1 / 510, below, torch.where(x > 1 - 1 / 510, above, inside))


def _nearest_level(loc: Tensor, log_scale: Tensor) -> Tensor:
    """The level nearest to a draw from the logistic density."""
    uniform = torch.rand_like(loc).clamp(1e-6, 1 - 1e-6)
    return ((loc + log_scale.exp() * uniform.logit()).clamp(0, 1) * 255).round() / 255


class DiscretizedLogistic(Distribution):
    """Probabilities of the levels 0, 1/255, ..., 1: what a logistic density of mean ``loc`` has in the bin of each.

    Bins are 1/255 wide; those of 0 and 1 take the tails (Kingma et al. 2016, arXiv 1606.04934, section 5.2; Salimans et
    al. 2017, arXiv 1701.05517, equation 2). ``loc`` and ``log_scale``, the logarithm of the scale of the density, have
    one shape, the batch shape; both are in units of the whole range. ``log_prob`` is in nats.
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}
    support = _Levels()

    def __init__(self, loc: Tensor, log_scale: Tensor, validate_args: bool | None = None):
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return log_mass(value, self.loc, self.log_scale)

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return _nearest_level(self.loc.expand(shape), self.log_scale.expand(shape))

    @property
    def mean(self) -> Tensor:
        """Exact: the sum over all levels above 0 of the probability to reach them, over 255."""
        inverse, total = (-self.log_scale).exp(), torch.zeros_like(self.loc)
        for level in range(255):
            total += torch.sigmoid((self.loc - (level + 0.5) / 255) * inverse)
        return total / 255


class DiscretizedLogisticMixture(Distribution):
    """A mixture of K discretized logistics for each pixel, whose colours depend on the colours before them.

    ``logits`` [B, K, H, W] weigh the components. In component k, colour c has mean loc[c] plus, for each colour d < c, a
    coefficient times x[d] - loc[d]: what is left of x by then (Salimans et al. 2017, arXiv 1701.05517, section 2.2).
    ``loc`` and ``log_scale`` [B, K, C, H, W]; ``coefficients`` [B, K, C (C - 1) / 2, H, W], for (c, d) = (1, 0), (2, 0),
    (2, 1), ... Batch shape [B], event shape [C, H, W]; ``log_prob`` is in nats.
    """

    arg_constraints = {"logits": constraints.real, "loc": constraints.real, "log_scale": constraints.real,
                       "coefficients": constraints.real}
    support = constraints.independent(_Levels(), 3)

    def __init__(self, logits: Tensor, loc: Tensor, log_scale: Tensor, coefficients: Tensor,
                 validate_args: bool | None = None):
        self.logits, self.loc, self.log_scale, self.coefficients = logits, loc, log_scale, coefficients
        super().__init__(loc.shape[:1], loc.shape[2:], validate_args=validate_args)

    @staticmethod
    def _given(x: Tensor, loc: Tensor, coefficients: Tensor) -> Tensor:
        """``loc`` of every colour, moved by the colours of ``x`` before it."""
        x, loc = torch.broadcast_tensors(x, loc)
        moved = [loc[..., 0, :, :]]
        for colour in range(1, loc.shape[-3]):
            first = colour * (colour - 1) // 2
            share = coefficients[..., first:first + colour, :, :] * (x - loc)[..., :colour, :, :]
            moved.append(loc[..., colour, :, :] + share.sum(-3))
        return torch.stack(moved, dim=-3)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value.unsqueeze(-4)
        mass = log_mass(value, self._given(value, self.loc, self.coefficients), self.log_scale).sum(-3)
        return (mass + self.logits.log_softmax(-3)).logsumexp(-3).sum((-2, -1))

    @torch.no_grad()
    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        weights = OneHotCategorical(logits=self.logits.movedim(-3, -1), validate_args=False)
        chosen = weights.sample(torch.Size(sample_shape)).movedim(-1, -3).unsqueeze(-3)
        loc, log_scale, coefficients = [
            (chosen * part).sum(-4) for part in (self.loc, self.log_scale, self.coefficients)]
        x = loc.clone()
        for colour in range(loc.shape[-3]):
            moved = self._given(x, loc, coefficients)[..., colour, :, :]
            x[..., colour, :, :] = _nearest_level(moved, log_scale[..., colour, :, :])
        return x

    @property
    def mean(self) -> Tensor:
        """Of the means of the components, each clipped to [0, 1]: exact but for what the edge levels cut off."""
        return (self.logits.softmax(-3).unsqueeze(-3) * self.loc.clamp(0, 1)).sum(-4)


# ---------------------------------------------------------------------------------------------------- convolutional VAE


def _bernoulli(logits: Tensor) -> Distribution:
    return Independent(Bernoulli(logits=logits), 3)


def _logistic(output: Tensor) -> Distribution:
    loc, log_scale = output.chunk(2, dim=1)
    return Independent(DiscretizedLogistic(*_logistic_start(loc, log_scale)), 3)


def _mixture(components: int) -> tuple[Callable, Callable]:
    def mixture(output: Tensor) -> Distribution:
        logits, rest = output[:, :components], output[:, components:].unflatten(1, (components, -1))
        colours = 1 if rest.shape[2] == 2 else 3
        loc, log_scale, coefficients = rest.split((colours, colours, rest.shape[2] - 2 * colours), dim=2)
        return DiscretizedLogisticMixture(logits, *_logistic_start(loc, log_scale), coefficients)
    return mixture, lambda colours: components * (1 + 2 * colours + colours * (colours - 1) // 2)


def _logistic_start(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs near 0, as at the start, mean a grey pixel give or take a tenth; no scale is far below one level."""
    return 0.5 + 0.25 * loc, (log_scale - 3).clamp(-8, 4)


LIKELIHOODS = {  # name -> (decoder output [B, k(C), H, W] to p(x|z), k)
    "bernoulli": (_bernoulli, lambda colours: colours),
    "logistic": (_logistic, lambda colours: 2 * colours),
    "linked": _mixture(1),  # logistics whose colours depend on the colours before them
    "mixture": _mixture(3)}


class Residual(nn.Sequential):
    """x + f(x), where f is the layers given (He et al. 2016, arXiv 1603.05027).

    The last layer, which must have a weight and a bias, starts at zero, so that a new block hands x on as it is.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        nn.init.zeros_(self[-1].weight)
        nn.init.zeros_(self[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvVAE(nn.Module):
    """Convolution, MaxPool and BatchNorm down to a Gaussian q(z|x); ConvTranspose and BatchNorm up to p(x|z).

    ``image_shape``: (C, H, W) with C of 1 or 3, H and W multiples of 4. ``num_classes`` > 0: encoder and decoder also
    take the label. ``channels``: filters at the first and the second halving. ``hidden``: width of the dense layers.
    ``blocks``: residual blocks of two convolutions at the smallest size, and as many of one dense layer, in encoder and
    decoder each. ``likelihood``: a name in LIKELIHOODS, or a pair like its values. The log-variance of q(z|x) is kept
    within -14 and 14.
    Raises ValueError for values out of range, and for x, y or z that do not fit.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), latent_dim: int = 32, num_classes: int = 0, *,
                 channels: tuple[int, int] = (16, 32), hidden: int = 512, blocks: int = 0,
                 likelihood: str | tuple[Callable, Callable] = "bernoulli"):
        super().__init__()
        image_shape = tuple(image_shape)
        if len(image_shape) != 3 or image_shape[0] not in (1, 3) or any(s < 4 or s % 4 for s in image_shape[1:]):
            raise ValueError(f"image_shape is {image_shape}; it must be (1 or 3, H, W) with H and W multiples of 4")
        _check_whole(1, latent_dim=latent_dim, hidden=hidden, **{f"channels[{i}]": n for i, n in enumerate(channels)})
        _check_whole(0, num_classes=num_classes, blocks=blocks)
        if isinstance(likelihood, str) and likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood is {likelihood!r}; it must be one of {', '.join(LIKELIHOODS)}")
        self.image_shape, self.latent_dim, self.num_classes = image_shape, latent_dim, num_classes
        self.config = {"image_shape": image_shape, "latent_dim": latent_dim, "num_classes": num_classes,
                       "channels": tuple(channels), "hidden": hidden, "blocks": blocks, "likelihood": likelihood}
        (colours, height, width), (few, many) = image_shape, channels
        bottom = (many, height // 4, width // 4)
        self.likelihood, outputs = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else likelihood

        def conv_blocks():
            return [Residual(nn.BatchNorm2d(many), nn.ReLU(), nn.Conv2d(many, many, 3, padding=1),
                             nn.BatchNorm2d(many), nn.ReLU(), nn.Conv2d(many, many, 3, padding=1)) for _ in range(blocks)]

        def dense_blocks():
            return [Residual(nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(blocks)]

        self.down = nn.Sequential(  # MaxPool before BatchNorm normalizes a quarter of the values
            nn.Conv2d(colours, few, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(few), nn.ReLU(),
            nn.Conv2d(few, many, 3, padding=1), nn.MaxPool2d(2), *conv_blocks(),
            nn.BatchNorm2d(many), nn.ReLU(), nn.Flatten())
        self.to_q = nn.Sequential(
            nn.Linear(math.prod(bottom) + num_classes, hidden), *dense_blocks(), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, 2 * latent_dim))
        self.from_z = nn.Sequential(
            nn.Linear(latent_dim + num_classes, hidden), *dense_blocks(), nn.BatchNorm1d(hidden), nn.ReLU(),
            nn.Linear(hidden, math.prod(bottom)), nn.Unflatten(1, bottom))
        self.up = nn.Sequential(
            *conv_blocks(), nn.BatchNorm2d(many), nn.ReLU(),
            nn.ConvTranspose2d(many, few, 4, stride=2, padding=1), nn.BatchNorm2d(few), nn.ReLU(),
            nn.ConvTranspose2d(few, outputs(colours), 4, stride=2, padding=1))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(z|x), or q(z|x, y) of a conditional model: batch shape [B], event shape [latent_dim]."""
        if x.shape[1:] != self.image_shape or not x.is_floating_point():
            raise ValueError(f"x is {_kind(x)}; this model takes float images in [0, 1] of shape "
                             f"[B, {', '.join(map(str, self.image_shape))}]")
        mean, log_var = self.to_q(self.with_label(self.down(x), y)).float().chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var.clamp(-14, 14)).exp()), 1)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x|z), or p(x|z, y) of a conditional model, of z [B, latent_dim]: batch shape [B], event shape [C, H, W]."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z has shape {list(z.shape)}; this model takes [B, {self.latent_dim}]")
        return self.likelihood(self.up(self.from_z(self.with_label(z, y))).float())

    def extra_repr(self) -> str:
        name = self.config["likelihood"]
        name = name if isinstance(name, str) else getattr(name[0], "__name__", type(name[0]).__name__)
        return f"{self.image_shape}, latent_dim={self.latent_dim}, likelihood={name}"

    def with_label(self, features: Tensor, y: Tensor | None) -> Tensor:
        """``features`` [B, n] with the one-hot label appended, [B, n + num_classes]; as they are without labels."""
        if not self.num_classes and y is None:
            return features
        if not self.num_classes:
            raise ValueError("y was given to a model without labels; leave it out or build the model with num_classes")
        if y is None:
            raise ValueError(f"y is missing: this model is conditional on labels 0 to {self.num_classes - 1}")
        _check_labels(y, len(features), self.num_classes)
        return torch.cat([features, F.one_hot(y, self.num_classes).to(features.dtype)], dim=1)

    @torch.no_grad()
    def sample(self, num_images: int, y: Tensor | None = None) -> Tensor:
        """Mean images [num_images, C, H, W] of p(x|z) at draws z of N(0, I), in eval mode."""
        z = torch.randn(num_images, self.latent_dim, device=_device_of(self))
        with _eval_mode(self):
            return self.decode(z, y).mean

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean images [B, C, H, W] of p(x|z) at the posterior mean z of each image, in eval mode."""
        with _eval_mode(self):
            return self.decode(self.encode(x, y).mean, y).mean


_WEIGHTS_FORMAT = "vae_helpers weights 1"


def save_weights(model: ConvVAE, path: str | Path, **info: str | float) -> None:
    """Writes the configuration and the weights of ``model`` as float16, with ``info`` about them, to ``path``.

    ``info``: such as source="MNIST" or the measured numbers. Raises ValueError when a weight has no finite float16 or
    ``model`` is not a plain ConvVAE whose likelihood is a name, OSError when the file cannot be written.
    """
    with torch.device("meta"):  # neither memory nor random numbers
        plain = ConvVAE(**model.config)
    if (type(model) is not ConvVAE or not isinstance(model.config["likelihood"], str)
            or model.state_dict().keys() != plain.state_dict().keys()):
        raise ValueError("model has a class, likelihood or weights of its own; only a plain ConvVAE, its likelihood a name "
                         "in LIKELIHOODS, can be stored: save its state_dict() with torch.save")
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds a weight beyond the range of float16, or NaN")
    _write(Path(path), partial(torch.save, {
        "format": _WEIGHTS_FORMAT, "config": model.config, "state": state, "info": info}))


def load_weights(path: str | Path) -> tuple[ConvVAE, dict]:
    """The ConvVAE of a file of ``save_weights``, in eval mode on ``device()``, and the ``info`` stored with it.

    Raises ValueError when ``path`` is not such a file.
    """
    kept = _read(Path(path), _WEIGHTS_FORMAT, "file of weights", "save_weights")
    model = ConvVAE(**kept["config"])
    model.load_state_dict(kept["state"])
    return model.eval().to(device()), kept["info"]


def _read(path: Path, file_format: str, kind: str, writer: str) -> dict:
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no whole {kind} ({type(error).__name__}). Give another path, or "
                         "delete the file to have it made anew.") from error
    if not isinstance(kept, dict) or kept.get("format") != file_format:
        raise ValueError(f"{path} was not written by {writer}. Give another path.")
    return kept


def _check_labels(y: Tensor, count: int, num_classes: int) -> None:
    """Raises ValueError unless ``y`` holds ``count`` int64 labels from 0 to num_classes - 1."""
    if y.dtype != torch.int64 or y.shape != (count,):
        raise ValueError(f"y is {_kind(y)}; it must be int64 of shape [{count}]")
    if count and (y.min() < 0 or y.max() >= num_classes):
        raise ValueError(f"y holds labels {int(y.min())} to {int(y.max())}; this model takes 0 to {num_classes - 1}")


def _labels_for(model: nn.Module, y: Tensor) -> Tensor | None:
    return None if getattr(model, "num_classes", None) == 0 else y


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@contextmanager
def _eval_mode(model: nn.Module):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------------------- training


def negative_elbo(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The default loss of ``fit``: kl - recon, nats [B], and both terms. A model whose num_classes is 0 gets no labels."""
    recon, kl = elbo(model, x, _labels_for(model, y))
    return {"loss": kl - recon, "recon": recon, "kl": kl}


@dataclass
class History:
    """What ``fit`` measured, under the names that the loss gives its values ("loss", "recon", "kl"), nats per image.

    ``train``: name -> mean over the batch, at every update. ``test``: name -> mean over the test split, after every
    epoch, and "update", the number of updates until then. ``seconds``: training time of each epoch. ``kept``: epoch ->
    what ``on_epoch`` returned.
    """

    train: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, *, loss: Callable = negative_elbo, seed: int = 0) -> dict[str, float]:
    """Mean of each of the loss's values over ``split``, in eval mode and float32; posterior samples follow ``seed``.

    Raises ValueError when the loss does not give one value for each image.
    """
    here, sums = _device_of(model), {}
    with _eval_mode(model), seeded(seed):
        for start in range(0, len(split), 1000):
            part = split[start:start + 1000]
            for name, value in _named(loss(model, *part.batch(here)), len(part)).items():
                sums[name] = sums.get(name, 0.0) + float(value.cpu().sum(dtype=torch.float64))
    return {name: total / len(split) for name, total in sums.items()}


def _named(values: Tensor | dict[str, Tensor], count: int) -> dict[str, Tensor]:
    values = values if isinstance(values, dict) else {"loss": values}
    if "loss" not in values:
        raise ValueError(f"the loss returned a dict of {', '.join(values)}; it must have an entry 'loss'")
    for name, value in values.items():
        if value.shape != (count,):
            raise ValueError(f"the loss gives {name!r} of shape {list(value.shape)} for {count} images; it must be one "
                             "value per image: sum over pixels and latents, do not average over the batch")
    return values


def fit(model: nn.Module, data: ImageData, *, epochs: int, batch_size: int = 128, lr: float = 3e-3,
        optimizer: Callable = partial(torch.optim.Adam, fused=True), loss: Callable = negative_elbo,  # noqa: B008
        transform: Callable | None = None, checkpoint: str | Path | None = None, seed: int = 0,
        bfloat16: bool | None = None, on_epoch: Callable | None = None, progress: bool = True) -> History:
    """Trains ``model`` in place, on ``device()``, with ``data.train``; measures it on ``data.test`` after every epoch.

    ``lr``: peak of a one-cycle schedule (Smith and Topin 2018, arXiv 1708.07120).
    ``loss(model, x, y)``: nats per image [B], or a dict of such tensors, "loss" among them, which the History keeps.
    ``transform(x)``: applied to each training batch on the device, such as torch.bernoulli (dynamic binarization) or
    an augmentation of torchvision.transforms.v2.
    ``bfloat16``: train in mixed precision; by default where the hardware is fast at it.
    ``on_epoch(model, epoch)``: called with 0 before the first epoch and after each; a Tensor it returns is kept.

    ``checkpoint``: a file written after every epoch. A finished run of the same configuration is loaded from it at
    once; a stopped one goes on and ends with the weights, bit for bit, of one never stopped; a run of other arguments
    (but for on_epoch), data or architecture is refused. The initial weights are those of the first call. The stop button
    (KeyboardInterrupt) ends training early and keeps the model and the History so far: it has fewer than ``epochs``
    ``seconds`` then. Equal ``seed`` and initial weights give equal weights on the CPU of one machine.

    Raises ValueError before any work for arguments, data or a checkpoint that do not fit, FloatingPointError when the
    loss is NaN or infinite, TypeError when on_epoch returns neither Tensor nor None, OSError when the checkpoint cannot
    be written.
    """
    _check_whole(0, epochs=epochs, seed=seed)
    _check_whole(1, batch_size=batch_size, **{"len(data.train)": len(data.train), "len(data.test)": len(data.test)})
    checkpoint = None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.is_dir():
        raise ValueError(f"checkpoint is the folder {checkpoint}; it must be a file")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be a positive number")
    if getattr(model, "num_classes", 0):
        for part in (data.train, data.test):
            _check_labels(part.labels, len(part), model.num_classes)
    epochs, batch_size, seed, lr = int(epochs), int(batch_size), int(seed), float(lr)  # of NumPy, a checkpoint takes none
    here = device()
    model.to(here)
    bfloat16 = _fast_bfloat16(here) if bfloat16 is None else bfloat16
    batches = math.ceil(len(data.train) / batch_size)
    with seeded(seed), torch.no_grad():  # what does not fit fails here, not after an epoch
        trial = copy.deepcopy(model).train()
        x, y = data.train[:len(data.train) // batches].batch(here)  # the smallest batch
        _named(loss(trial, x if transform is None else transform(x), y), len(x))
        evaluate(trial, data.test[:2], loss=loss)
    opt = optimizer(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=max(1, epochs * batches), cycle_momentum=False)
    shapes = (f"{name} {list(value.shape)}" for name, value in model.state_dict().items())
    config = {"model": "\n".join([str(model), *shapes]), "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
              "data": f"{data.name} ({data.source}), {_describe_split(data.train)} and {_describe_split(data.test)}",
              "bfloat16": bfloat16, "optimizer": _describe(optimizer), "loss": _describe(loss),
              "transform": _describe(transform)}
    history, done = History(), -1
    if checkpoint is not None and checkpoint.exists():
        state = _load_checkpoint(checkpoint, config)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        history, done = History(**state["history"]), state["epoch"]
        print(f"{checkpoint.name}: {'finished, loaded' if done == epochs else f'going on after epoch {done}'}")

    def end_epoch(epoch: int) -> None:
        kept = on_epoch(model, epoch) if on_epoch else None
        if isinstance(kept, Tensor):
            history.kept[epoch] = kept.detach().to("cpu", copy=True)
        elif kept is not None:
            raise TypeError(f"on_epoch returned a {type(kept).__name__}; it must return a Tensor or None")
        if checkpoint is not None:
            _write(checkpoint, partial(torch.save, {
                "format": _CHECKPOINT_FORMAT, "config": config, "epoch": epoch, "history": asdict(history),
                "model": model.state_dict(), "optimizer": opt.state_dict(), "schedule": schedule.state_dict()}))

    bar = tqdm(total=epochs * batches, initial=max(done, 0) * batches, file=_progress_file(), leave=False, ncols=100,
               mininterval=0.5, disable=not progress)
    try:
        with seeded(seed), _unvalidated(), bar:
            if done < 0:
                end_epoch(0)
                done = 0
            for epoch in range(done + 1, epochs + 1):
                torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))  # as after a resume
                model.train()
                start = time.perf_counter()
                for indices in torch.randperm(len(data.train)).tensor_split(batches):
                    x, y = data.train[indices].batch(here)
                    x = x if transform is None else transform(x)
                    with torch.autocast(here.type, torch.bfloat16, enabled=bfloat16):
                        means = {name: v.mean() for name, v in _named(loss(model, x, y), len(x)).items()}
                    values = dict(zip(means, torch.stack([*means.values()]).tolist(), strict=True))
                    if not math.isfinite(values["loss"]):
                        what = f"the loss is {values['loss']}" if x.isfinite().all() else (
                            "the batch after transform holds NaN or infinity")
                        kept = f"the checkpoint {checkpoint} of epoch {done} is whole" if checkpoint else (
                            "build the model anew, since its weights may be damaged")
                        raise FloatingPointError(f"{what} at update {schedule.last_epoch + 1}; {kept}. Look at the "
                                                 "transform and the loss, or lower lr.")
                    opt.zero_grad()
                    means["loss"].backward()
                    opt.step()
                    schedule.step()
                    for name, value in values.items():
                        history.train.setdefault(name, []).append(value)
                    bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{values['loss']:.2f}", refresh=False)
                    bar.update()
                seconds = time.perf_counter() - start
                for name, value in {"update": epoch * batches, **evaluate(model, data.test, loss=loss)}.items():
                    history.test.setdefault(name, []).append(value)
                history.seconds.append(seconds)
                end_epoch(epoch)
                done = epoch
    except KeyboardInterrupt:
        print(f"stopped in epoch {done + 1} of {epochs}; the model and the history so far are kept; the same call "
              + (f"goes on after epoch {max(done, 0)}" if checkpoint else "starts anew: it names no checkpoint"))
    return history


def _fast_bfloat16(here: torch.device) -> bool:
    if here.type == "cuda":
        return torch.cuda.get_device_capability(here) >= (8, 0)
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return here.type == "cpu" and any(getattr(torch.cpu, flag, bool)() for flag in flags)


def _describe(function: Callable | None) -> str:
    """The name of a function with a checksum of its code, defaults and closure, which tells two of one name apart."""
    without_addresses = partial(re.sub, r" at 0x[0-9a-f]+", "")
    if isinstance(function, partial):
        return f"{_describe(function.func)} with {without_addresses(repr((function.args, function.keywords)))}"
    name = without_addresses(getattr(function, "__qualname__", None) or repr(function))
    if code := getattr(function, "__code__", None):
        closure = [cell.cell_contents for cell in function.__closure__ or ()]
        parts = repr((_parts(code, function.__doc__), function.__defaults__, function.__kwdefaults__, closure))
        name += f" [{zlib.crc32(without_addresses(parts).encode()):08x}]"
    return name


def _parts(code, doc: str | None = None) -> tuple:
    """What ``code`` does, in the same order in every process, without its documentation."""
    constants = [_parts(value) if hasattr(value, "co_code") else sorted(value, key=repr) if isinstance(value, frozenset)
                 else value for value in code.co_consts if value != doc]
    return code.co_code, code.co_names, constants


def _describe_split(split: Split) -> str:
    sample = split.images[::max(1, len(split) // 1000)].numpy()
    return f"{len(split)} images of checksum {zlib.crc32(split.labels.numpy().tobytes(), zlib.crc32(sample.tobytes())):08x}"


@contextmanager
def _unvalidated():
    """torch.distributions without their checks of every value, which cost a tenth of the time of a small model."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


_CHECKPOINT_FORMAT = "vae_helpers checkpoint 1"


def _load_checkpoint(path: Path, config: dict) -> dict:
    state = _read(path, _CHECKPOINT_FORMAT, "checkpoint", "fit")
    for name, value in config.items():
        before = state["config"].get(name)
        if before == value:
            continue
        if name == "model":  # of two long descriptions, show the first line that differs
            lines = zip(before.splitlines(), value.splitlines(), strict=False)
            before, value = next(((a.strip(), b.strip()) for a, b in lines if a != b), (before, value))
        raise ValueError(f"{path} is of another run: its {name} is {before}, here it is {value}. Give another path, or "
                         "delete the file to train anew.")
    return state


def _progress_file():
    """What tqdm writes to: in a notebook one line, rewritten in place and empty at the end, so nothing is stored."""
    if not hasattr(get_ipython(), "kernel"):
        return sys.stderr
    line = display({"text/plain": ""}, raw=True, display_id=True)
    return SimpleNamespace(encoding="utf-8", write=lambda text: line.update({"text/plain": text.strip()}, raw=True))


# ------------------------------------------------------------------------------------------------------------- pictures


def show_images(images: Tensor, *, columns: int = 10, labels: list[str] | None = None,
                row_labels: list[str] | None = None, column_labels: list[str] | None = None, title: str = "",
                size: float = 0.7) -> plt.Figure:
    """Figure with ``images`` [N, C, H, W], float in [0, 1] or uint8, in rows of ``columns``, each ``size`` inches wide.

    ``labels``: a text under each image. ``row_labels``, ``column_labels``: a text left of each row, below each column.
    Raises ValueError without an image.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images are {_kind(images)}; they must be [N, C, H, W] with N of at least 1")
    images = images.detach().cpu()
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    (height, width), gap = images.shape[2:], 2
    below = height // 3 if labels else 0
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    down, right = height + below + gap, width + gap
    canvas = torch.ones(3, rows * down - gap, columns * right - gap)
    corners = [(i // columns * down, i % columns * right) for i in range(len(images))]
    for image, (top, left) in zip(images, corners, strict=True):
        canvas[:, top:top + height, left:left + width] = image
    figure, axes = plt.subplots(layout="constrained", figsize=(
        size * columns + 0.6 * bool(row_labels), size * rows * down / right + 0.35 * bool(title)))
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if row_labels:
        axes.set_yticks([row * down + height / 2 for row in range(rows)], row_labels)
    if column_labels:
        axes.set_xticks([column * right + width / 2 for column in range(columns)], column_labels, fontsize="small")
    axes.tick_params(length=0)
    axes.grid(False)
    for text, (top, left) in zip(labels or [], corners, strict=False):
        axes.text(left + width / 2, top + height + below / 2, text, ha="center", va="center", fontsize="x-small")
    plt.close(figure)
    return figure


def plot_history(history: History, title: str = "", ylabel: str = "nats per image") -> plt.Figure:
    """Figure with a panel for each of the loss's values: training batches by update, ``data.test`` by epoch.

    Raises ValueError for a history without an epoch.
    """
    names = {"loss": "-ELBO" if "kl" in history.train else "loss", "kl": "KL(q(z|x) || p(z))",
             "recon": "reconstruction log-likelihood"}
    panels = len(history.train)
    if not panels:
        raise ValueError("history is empty: train for at least one epoch")
    figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3), squeeze=False, layout="constrained")
    for panel, (name, values) in zip(axes[0], history.train.items(), strict=True):
        panel.plot(range(1, len(values) + 1), values, lw=0.5, alpha=0.6, label="training batches")
        panel.plot(history.test.get("update", []), history.test.get(name, []), "o-", ms=3, label="held out, by epoch")
        low, high = np.percentile(values[len(values) // 10:] + history.test.get(name, []), [0, 99])
        panel.set(title=names.get(name, name), xlabel="updates", ylabel=ylabel,
                  ylim=(low - 0.05 * (high - low), high + 0.1 * (high - low)))
        panel.legend(fontsize="small")
    figure.suptitle(title)
    plt.close(figure)
    return figure

COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",  # told apart by colour-blind readers as well: Petroff
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # 2021 (arXiv 2107.02270)


def plot_latents(points: Tensor, labels: Tensor, classes: tuple[str, ...], title: str = "") -> plt.Figure:
    """Figure with ``points`` [N, 2] in a plane, coloured by ``labels`` [N], with the names of ``classes`` in a legend.

    Raises ValueError for other shapes.
    """
    points, labels = torch.as_tensor(points), torch.as_tensor(labels)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) != len(labels):
        raise ValueError(f"points are {_kind(points)} for {len(labels)} labels; they must be [{len(labels)}, 2]")
    figure, axes = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
    for label in labels.unique().tolist():
        mine, colour = points[labels == label], COLOURS[label % len(COLOURS)]
        axes.scatter(*mine.T, s=5, linewidths=0, color=colour, label=classes[label])
    axes.set(title=title, xticks=[], yticks=[])
    axes.legend(markerscale=4, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    plt.close(figure)
    return figure


def plot_manifold(model: nn.Module, count: int = 20, title: str = "") -> plt.Figure:
    """Figure with the mean images of a model of two latents on a ``count`` x ``count`` grid of quantiles of the prior.

    Steps of the grid are equal in probability (Kingma and Welling 2014, arXiv 1312.6114, figure 4); z_1 grows to the
    right, z_2 upwards. Raises ValueError for another number of latents.
    """
    if getattr(model, "latent_dim", 2) != 2:
        raise ValueError(f"latent_dim is {model.latent_dim}; a manifold is drawn of a model of 2 latents")
    steps = Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    images = _mean_images(model, torch.cartesian_prod(steps.flip(0), steps).flip(1), None)
    figure = show_images(images, columns=count, title=title, size=0.3)
    figure.axes[0].set(xlabel="quantile of $z_1$", ylabel="quantile of $z_2$")
    return figure


# ------------------------------------------------------------------------------------------------------------- explorer

@torch.no_grad()
def encode_all(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z|x) of every image of ``split``, [N, latent_dim] each, on the CPU, in eval mode.

    Raises ValueError for an empty split and where q(z|x) is not over vectors.
    """
    if not len(split):
        raise ValueError("split is empty; it must hold at least one image")
    parts = []
    with _eval_mode(model):
        for start in range(0, len(split), 1000):
            x, y = split[start:start + 1000].batch(_device_of(model))
            q_z = model.encode(x, _labels_for(model, y))
            if len(q_z.event_shape) != 1:
                raise ValueError(f"q(z|x) has event shape {list(q_z.event_shape)}; it must be [latent_dim]")
            parts.append((q_z.mean.cpu(), q_z.stddev.cpu()))
    means, stddevs = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stddevs)


def kl_per_dim(model: nn.Module, split: Split) -> Tensor:
    """KL(q(z_i|x) || N(0, 1)) of each latent i, averaged over the images of ``split``: nats [latent_dim], on the CPU.

    Raises ValueError as encode_all does.
    """
    return _kl_per_dim(*encode_all(model, split))


def _kl_per_dim(mean: Tensor, stddev: Tensor) -> Tensor:
    return kl_divergence(Normal(mean, stddev), Normal(0.0, 1.0)).mean(0)


@torch.no_grad()
def _mean_images(model: nn.Module, z: Tensor, label: int | None) -> Tensor:
    """Mean images of p(x|z) at each row of ``z``, float in [0, 1] of shape [B, C, H, W], on the CPU, in eval mode."""
    here = _device_of(model)
    y = None if label is None else torch.full((len(z),), label, device=here)
    with _eval_mode(model):
        return model.decode(z.to(here), y).mean.float().clamp(0, 1).cpu()


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at ``t`` of 0 to 1 on the arc from ``a`` to ``b`` [latent_dim] around 0; the line where there is no arc.

    Draws of N(0, I) lie at lengths near sqrt(latent_dim); the middle of a line between two is far shorter, a code that
    the decoder has hardly seen (White 2016, arXiv 1609.04468).
    """
    angle = torch.acos(F.cosine_similarity(a, b, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-3:
        return torch.lerp(a, b, t)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()


def plot_traversals(model: nn.Module, kl: Tensor, *, dims: list[int] | None = None, z: Tensor | None = None,
                    label: int | None = None, values: Tensor | None = None, title: str = "") -> plt.Figure:
    """Figure with the mean images of p(x|z) where one latent a row takes ``values`` (-3 to 3) and the others stay.

    ``kl``: nats [latent_dim], of kl_per_dim. ``dims``: the latents, by default the 8 of largest ``kl``. ``z``: where the
    others stay, [latent_dim], by default 0.
    """
    dims = kl.argsort(descending=True)[:8].tolist() if dims is None else dims
    values = torch.linspace(-3, 3, 9) if values is None else values
    points = (torch.zeros_like(kl) if z is None else z).repeat(len(dims), len(values), 1)
    for row, dim in zip(points, dims, strict=True):
        row[:, dim] = values
    images = _mean_images(model, points.flatten(0, 1), label)
    figure = show_images(images, columns=len(values), title=title,
                         row_labels=[f"$z_{{{dim}}}$, {kl[dim]:.2f} nats" for dim in dims],
                         column_labels=[f"{value:g}" for value in values.tolist()])
    figure.axes[0].set_xlabel("value of the latent of each row")
    return figure


def _png(image: Image.Image, side: int) -> bytes:
    """PNG of ``image`` with its pixels enlarged by the whole number that brings it to at most ``side``, if at all."""
    scale, file = max(1, side // max(image.size)), io.BytesIO()
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().to(torch.uint8).permute(1, 2, 0).squeeze(2).numpy())


class LatentExplorer(widgets.VBox):
    """Panel that moves z by hand and shows the mean image of p(x|z); for any model whose q(z|x) is over vectors.

    Sliders for the ``num_sliders`` latents of largest KL, measured on at most 2,000 images of ``data.test``; the others
    are folded away. The map is the plane of largest variance of the means of q(z|x), the ring on it the current z.
    A model with ``num_classes`` above 0 has a label to choose. ``seed``: of the draws. ``folder``: where "save" writes,
    by default explorer/ in output_dir("images").

    A program reads and sets ``z`` (finite, [latent_dim]; sliders show it rounded to 1/16), ``label`` (an index or a name
    in data.classes) and the widgets: ``sliders``, ``index``, ``walk``, ``buttons[name].click()``, ``image.value`` (PNG
    bytes). ``kept`` holds A and B. Raises ValueError for a value, model or data that do not fit.
    """

    SIDE, FOLDED, FRAMES = 252, 24, 50  # pixels of a picture, sliders folded at a time, frames of a walk
    STEP = 1 / 16  # of a slider; a value off its binary grid would be rounded by the front end and sent back as a move

    def __init__(self, model: nn.Module, data: ImageData, *, num_sliders: int = 8, seed: int = 0,
                 folder: str | Path | None = None):
        _check_whole(1, num_sliders=num_sliders)
        num_classes = getattr(model, "num_classes", 0)
        if num_classes > len(data.classes):
            raise ValueError(f"the model takes labels 0 to {num_classes - 1}, but data has {len(data.classes)} classes")
        part = data.test[torch.linspace(0, len(data.test) - 1, min(len(data.test), 2000)).long()]
        means, stddevs = encode_all(model, part)
        super().__init__(_dom_classes=["explorer"])
        self.model, self.data, self.folder, self.kept = model, data, folder, {}
        self._rng, self._moving, self._dtype = np.random.default_rng(seed), False, means.dtype
        means = means.double()  # as a slider's value: what it sends comes back unrounded
        self._z, self._kl = torch.zeros_like(means[0]), _kl_per_dim(means, stddevs)
        self._order = self._kl.argsort(descending=True).tolist()
        self._draw_map(means, part.labels)
        self._build(num_sliders, num_classes)
        self._turn()
        self.encode(0)

    def _draw_map(self, means: Tensor, labels: Tensor) -> None:
        flat = min(means.shape) <= 2  # one or two latents are shown as they are
        plane = torch.eye(means.shape[1], 2) if flat else torch.linalg.eigh(means.T.cov()).eigenvectors[:, [-1, -2]]
        self._plane = plane.to(means) * torch.tensor([1, -1]).to(means)  # pixels count downwards
        reach = torch.cat([means @ self._plane, torch.tensor([[-2.5, -2.5], [2.5, 2.5]]).to(means)])  # the prior's, too
        self._low, self._span = reach.amin(0), reach.amax(0) - reach.amin(0)
        figure = plt.figure(figsize=(3.6, 3.6), dpi=self.SIDE / 3.6, layout="none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, self.SIDE), ylim=(self.SIDE, 0))
        axes.set_axis_off()
        points = self._on_map(means)
        for label in labels.unique().tolist():
            mine, colour = points[labels == label], COLOURS[label % len(COLOURS)]
            axes.scatter(*mine.T, s=8, color=colour, alpha=0.6, linewidths=0)
            axes.text(*mine.median(0).values, self.data.classes[label], ha="center", va="center", fontsize="small",
                      bbox={"fc": "white", "ec": colour, "boxstyle": "round,pad=0.15"})
        file = io.BytesIO()
        figure.savefig(file, dpi=figure.dpi)
        plt.close(figure)
        self._map = Image.open(file).convert("RGB")
        ImageDraw.Draw(self._map).rectangle((0, 0, self.SIDE - 1, self.SIDE - 1), outline="silver")

    def _on_map(self, z: Tensor) -> Tensor:
        """Pixels [..., 2] of ``z`` on the map; what lies outside is put on its edge."""
        place = (z @ self._plane - self._low) / self._span
        return (self.SIDE * (0.05 + 0.9 * place)).clamp(10, self.SIDE - 10)

    def _build(self, num_sliders: int, num_classes: int) -> None:
        wide, row = widgets.Layout(width="320px"), widgets.Layout(flex_flow="row wrap", align_items="center")
        named = widgets.SliderStyle(description_width="110px")
        sliders = [widgets.FloatSlider(min=-4, max=4, step=self.STEP, layout=wide, style=named)
                   for _ in self._order[:num_sliders + self.FOLDED]]
        self.sliders, self.folded = sliders[:num_sliders], sliders[num_sliders:]
        for position, slider in enumerate(sliders):
            slider.observe(partial(self._slide, position), "value")
        pages = range(num_sliders, len(self._order), self.FOLDED)
        self.page = widgets.Dropdown(description="by KL, from", layout=wide, style=named, options=[
            (f"{start + 1} to {min(start + self.FOLDED, len(self._order))}", start) for start in pages])
        self.page.observe(self._turn, "value")
        self._others = widgets.VBox()
        others = self._kl[self._order[num_sliders:]]
        self.rest = widgets.Accordion([self._others], titles=[f"{len(others)} more, {others.sum():.2f} nats together"])
        names = [(name, label) for label, name in enumerate(self.data.classes[:num_classes])]
        self.labels = widgets.Dropdown(options=names, description="label", layout=wide, style=named)
        self.labels.observe(lambda change: self._moving or self._render(), "value")
        self.index = widgets.BoundedIntText(max=len(self.data.test) - 1, layout={"width": "76px"})
        self.play = widgets.Play(max=self.FRAMES, interval=80, disabled=True, show_repeat=False)
        self.walk = widgets.IntSlider(max=self.FRAMES, readout=False, disabled=True, layout={"width": "220px"})
        widgets.link((self.play, "value"), (self.walk, "value"))
        self.walk.observe(self._step, "value")
        self.status, self.buttons = widgets.HTML(), {}
        for name, action in {"prior sample": self._sample, "reset": lambda: self._move(torch.zeros_like(self._z)),
                             "encode": lambda: self.encode(self.index.value),
                             "random image": lambda: self.encode(int(self._rng.integers(len(self.data.test)))),
                             "keep A": partial(self._keep, "A"), "keep B": partial(self._keep, "B"),
                             "save": self._save}.items():
            self.buttons[name] = widgets.Button(description=name, layout={"width": "auto"})
            self.buttons[name].on_click(partial(self._press, action))
        sample, reset, encode, random, keep_a, keep_b, save = self.buttons.values()
        self.image, self.map, self.test_image, self.reconstruction = pictures = [
            widgets.Image().add_class(f"explorer-{name}") for name in ("image", "map", "test", "reconstruction")]
        live, plane, test, again = [
            widgets.VBox([picture, widgets.Label(text)], layout={"align_items": "center"}) for picture, text in zip(
                pictures, ("mean of p(x|z)", "map of the test images", "test image", "reconstruction"), strict=True)]
        self.children = [
            widgets.HBox([widgets.VBox([*[self.labels][:num_classes], *self.sliders, *[self.rest][:len(self.folded)]]),
                          live, widgets.VBox([test, again]), plane], layout={"flex_flow": "row wrap", "grid_gap": "8px"}),
            widgets.HBox([sample, reset, widgets.Label("test image"), self.index, encode, random, save], layout=row),
            widgets.HBox([keep_a, keep_b, self.play, self.walk, widgets.Label("from A to B")], layout=row), self.status]

    @property
    def z(self) -> Tensor:
        return self._z.to(self._dtype, copy=True)

    @z.setter
    def z(self, z: Tensor) -> None:
        self._move(torch.as_tensor(z).detach())

    @property
    def label(self) -> int | None:
        return self.labels.value

    @label.setter
    def label(self, label: int | str) -> None:
        names = [name for name, _ in self.labels.options]
        if label not in (*names, *range(len(names))):
            raise ValueError(f"label is {label!r}; this model takes " + (
                f"0 to {len(names) - 1} or one of {', '.join(names)}" if names else "none"))
        self.labels.value = names.index(label) if isinstance(label, str) else int(label)

    def encode(self, index: int) -> None:
        """Goes to the mean of q(z|x) of the test image ``index``, shown beside its reconstruction, and to its label."""
        if index not in range(len(self.data.test)):
            raise ValueError(f"index is {index!r}; it must be a whole number from 0 to {len(self.data.test) - 1}")
        part = self.data.test[int(index)]
        self.index.value = int(index)
        self._move(encode_all(self.model, part)[0][0], int(part.labels[0]))
        self.test_image.value = _png(_picture(part.images[0] / 255), self.SIDE // 2)
        self.reconstruction.value = _png(self._shown, self.SIDE // 2)

    def _sample(self) -> None:
        with seeded(int(self._rng.integers(2**31))):
            self._move(_prior(self.model, self.z.to(_device_of(self.model))).sample().flatten())

    def _keep(self, name: str) -> None:
        self.kept = dict(sorted({**self.kept, name: self._z}.items()))
        self.play.disabled = self.walk.disabled = len(self.kept) < 2
        self._render()

    def _save(self) -> None:
        folder = Path(self.folder or output_dir("images") / "explorer")
        number = next(i for i in range(1, 10**6) if not (folder / f"{i:03}.pt").exists())
        _write(folder / f"{number:03}.png", lambda file: file.write(self.image.value))
        _write(folder / f"{number:03}.pt", partial(torch.save, {"z": self.z, "label": self.label}))
        self.status.value = f"saved {html.escape(str(folder))}/{number:03}.png and its z, {number:03}.pt"

    def _press(self, action: Callable, button: widgets.Button) -> None:
        self.status.value = ""
        try:
            action()
        except Exception as error:  # a button's traceback would go to a log that nobody has open
            self.status.value = html.escape(f"{button.description}: {error}")

    def _slide(self, position: int, change) -> None:
        """Draws at once: meanwhile the front end holds back all but the newest value, so no stale frames queue up."""
        if not self._moving:
            z = self._z.clone()
            z[self._dims[position]] = change.new
            try:
                self._move(z)
            except ValueError:
                self._move(self._z)  # takes the slider back
                raise

    def _step(self, change) -> None:
        if len(self.kept) < 2:
            raise ValueError("the walk needs two kept points: keep A and keep B first")
        self._move(slerp(*self.kept.values(), change.new / self.FRAMES))

    def _turn(self, change=None) -> None:
        """Names the sliders, the folded ones after the latents of the chosen page."""
        count = len(self.sliders)
        self._dims = self._order[:count] + self._order[self.page.value or count:][:self.FOLDED]
        for slider, dim in zip([*self.sliders, *self.folded], self._dims, strict=False):
            slider.description = f"z[{dim}], {self._kl[dim]:.2f} nats"
        shown = self.folded[:len(self._dims) - count]
        self._others.children = [self.page, *shown] if len(self.page.options) > 1 else shown
        self._move(self._z)

    def _move(self, z: Tensor, label: int | None = None) -> None:
        """Goes to ``z`` and ``label``: decodes once, and takes every slider there."""
        z = z.to(self._z, copy=True)
        if z.shape != self._z.shape:
            raise ValueError(f"z has shape {list(z.shape)}; this model takes {list(self._z.shape)}")
        if not z.isfinite().all():
            raise ValueError(f"z is {z[~z.isfinite()][0]} at {int((~z.isfinite()).nonzero()[0])}; it must be finite")
        self._z, self._moving = z, True
        try:
            if label is not None and self.labels.options:
                self.labels.value = label
            self._render()
            for slider, value in zip([*self.sliders, *self.folded], z[self._dims].tolist(), strict=False):
                limit = 2**max(2, math.ceil(math.log2(abs(value) + 1e-9)))
                with slider.hold_sync():
                    slider.min, slider.max, slider.value = -limit, limit, round(value / self.STEP) * self.STEP
        finally:
            self._moving = False

    def _render(self) -> None:
        if self.comm is None:  # closed
            return
        try:
            self._shown = _picture(_mean_images(self.model, self.z.unsqueeze(0), self.label)[0])
        except Exception as error:
            self.status.value = html.escape(f"no image: {error}")
            raise
        self.image.value = _png(self._shown, self.SIDE)
        marked = self._map.copy()
        pen = ImageDraw.Draw(marked)
        for name, z in self.kept.items():
            x, y = self._on_map(z).tolist()
            pen.ellipse((x - 6, y - 6, x + 6, y + 6), fill="white", outline="black")
            pen.text((x, y), name, fill="black", anchor="mm")
        x, y = self._on_map(self._z).tolist()
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), outline="black", width=3)
        self.map.value = _png(marked, self.SIDE)

    def close(self) -> None:
        """Stops the walk and closes the panel with every widget in it; nothing of it runs on."""
        parts = list(self.children)
        for part in parts:  # grows while it is gone through
            parts += getattr(part, "children", ())
            if isinstance(part, widgets.Play):
                part.playing = False
            part.close()
        super().close()

    def __repr__(self) -> str:
        return f"LatentExplorer of {len(self._order)} latents: run the notebook to move them"

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """With a picture of traversals, which stands in its place where no kernel runs."""
        file = io.BytesIO()
        plot_traversals(self.model, self._kl, z=self.z, label=self.label).savefig(
            file, dpi=60, bbox_inches="tight")
        return {**super()._repr_mimebundle_(**kwargs), "image/png": base64.b64encode(file.getvalue()).decode()}
