"""Shared code of the VAE tutorial notebooks: ``import vae_helpers as vh``, before torch.

A *model* is any ``nn.Module`` whose ``encode(x, y=None)`` and ``decode(z, y=None)`` return ``torch.distributions`` objects
of batch shape [B]: q(z|x) and p(x|z). ``x`` is float in [0, 1] of shape [B, C, H, W]; ``y`` holds int64 labels [B]. The
prior is N(0, I) unless the model has a distribution ``prior``, or a module with its ``log_prob`` and ``sample``. A model
with a method ``elbo_terms(x, y)`` is asked for both terms instead. With a ``loss`` of its own, ``fit`` trains any module at
all. Log-likelihoods are in nats (natural logarithms; 1 nat = 1.44 bits).
"""

from __future__ import annotations

import os
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    raise ImportError(f"vae_helpers needs Python 3.10 or newer; this is {sys.version.split()[0]}")
if "torch" not in sys.modules:  # threads of torch that wait must not spin: on a busy machine they take the cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import atexit
import hashlib
import inspect
import math
import numbers
import shutil
import tempfile
import time
import traceback
import types
import urllib.request
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from IPython import get_ipython
from IPython.display import Markdown, display
from PIL import Image, ImageOps
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, constraints, kl_divergence
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.utils import make_grid
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------------------- settings

ROOT = Path(__file__).resolve().parent
STYLE = ["tableau-colorblind10", {"figure.dpi": 80, "figure.constrained_layout.use": True, "image.cmap": "gray",
                                  "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": "medium"}]
COLOURS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",  # told apart by colour-blind readers as well: Petroff
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # 2021 (arXiv 2107.02270)
SYSTEMS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "Thumbs.db", "desktop.ini"}  # no pictures


def budget(quick, standard, full):
    """The value that the environment variable VAE_BUDGET names; ``standard`` when unset. ValueError for another name."""
    name, values = os.environ.get("VAE_BUDGET") or "standard", {"quick": quick, "standard": standard, "full": full}
    if name not in values:
        raise ValueError(f"VAE_BUDGET is {name!r}; it must be one of {', '.join(values)}")
    return values[name]


def device() -> torch.device:
    """The current accelerator (CUDA, MPS, ...) where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def output_dir(name: str) -> Path:
    """The folder "checkpoints", "images" or "notebooks/weights" of the project, to write to; made where missing. Pictures
    and weights of a shorter run than ``full`` go under runs/: only ``full`` replaces those that are shipped. The environment
    variable VAE_OUT puts everything under another folder. Raises OSError where that cannot be made."""
    root = Path(os.environ.get("VAE_OUT") or ROOT).expanduser()
    folder = root / name if name == "checkpoints" or budget(False, False, True) else root / "runs" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {folder}: {error}. Set VAE_OUT to a folder that can be written to.") from error
    return folder


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers inside the block follow ``seed``; after it they go on, on CPU and accelerator, as if none was drawn."""
    kind = device().type
    with torch.random.fork_rng(range(torch.accelerator.device_count()), device_type="cuda" if kind == "cpu" else kind):
        torch.manual_seed(seed)
        yield


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, renamed to it at the end: a kill or a full disk spares the old file."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}: {error}. Free some space or choose a folder; an old file is whole.") from error
    finally:
        with suppress(OSError):  # not there, or in a folder that cannot be written to
            temporary.unlink()


def _read(path: Path, *keys: str, mmap: bool = False) -> dict:
    """The entries ``keys`` of a file of torch.save; nothing in it is executed. Raises ValueError for any other file."""
    numbers_of_numpy = [np.float64(0).__reduce__()[0], np.dtype, *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"}]
    try:
        with torch.serialization.safe_globals(numbers_of_numpy):
            kept = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return {key: kept[key] for key in keys}
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise ValueError(f"{path} is not there, is damaged or lacks one of {', '.join(keys)}. Give another path, or delete "
                         "it.") from error


def _check_whole(least: int, **values) -> None:
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or value < least:
            raise ValueError(f"{name} is {value!r}; it must be a whole number, at least {least}")


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(eq=False)
class Split:
    """Images, uint8 [N, C, H, W], and labels, int64 [N]; of NumPy too. An index or slice gives a smaller Split.
    Raises ValueError for other types and shapes."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        try:
            self.images, labels = (torch.as_tensor(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
                                   for part in (self.images, self.labels))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"images and labels must be numbers of one type each: {error}") from error
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise ValueError(f"images are {self.images.dtype} {list(self.images.shape)}; they must be uint8 [N, C, H, W]")
        if labels.is_floating_point() or labels.shape != self.images.shape[:1]:
            raise ValueError(f"labels are {labels.dtype} {list(labels.shape)}; they must be whole numbers [{len(self)}]")
        self.labels = labels.long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> Split:
        index = [int(index)] if np.ndim(index) == 0 and not isinstance(index, slice) else index
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
        (dynamic binarization; Burda et al. 2016, arXiv 1509.00519, section 5)."""
        generator = torch.Generator().manual_seed(seed)
        bits = torch.bernoulli(self.test.images.float() / 255, generator=generator).mul(255).to(torch.uint8)
        return replace(self, test=Split(bits, self.test.labels))


def load_data(name: str | Path, root: str | Path | None = None, *, image_size: int | None = None,
              channels: int | None = None) -> ImageData:
    """Reads a whole data set as uint8.

    ``name``: "mnist", "cifar10", "digits" (scikit-learn's 1,797 digits, 28x28), "photos" (32x32 patches of its two
    photographs), or the path of a folder of pictures: ``train/<class>/*`` and ``test/<class>/*`` in it, or ``<class>/*``
    (then a tenth of each class is for testing). A folder of that name goes before a data set. Pictures are brought to
    ``channels`` (1, or 3 by default), resized and cropped to squares of ``image_size`` (32) once, kept under
    ``root``/cache and memory-mapped.
    ``root``: where data sets lie; else the environment variable VAE_DATA, else data/ beside this file. MNIST and CIFAR-10
    are looked for there (CIFAR-10 also as a folder ``root``/cifar10 of pictures), then downloaded by torchvision, then
    replaced, with a warning, by 12,000 digits of MNIST (notebooks/data) or by "photos"; ``ImageData.source`` says which.

    Raises ValueError for an unknown name, a folder without readable pictures or with other classes in train/ than in
    test/, image_size or channels that do not fit; RuntimeError for a damaged file, OSError when the cache cannot be written.
    """
    root = Path(root or os.environ.get("VAE_DATA") or ROOT / "data").expanduser().resolve()
    plain, folder = str(name).lower().replace("-", ""), Path(str(name)).expanduser()
    shapes = {"mnist": (1, 28), "cifar10": (3, 32), "digits": (1, 28), "photos": (3, 32)}
    own = None if isinstance(name, os.PathLike) else shapes.get(plain)
    if str(name) and folder.is_dir():
        if own:
            warnings.warn(f"{name!r} is taken for the folder {folder.resolve()}, not for the data set", stacklevel=2)
        channels, image_size = 3 if channels is None else channels, 32 if image_size is None else image_size
        return _load_folder(folder.resolve(), root, channels, image_size)
    if own is None:
        raise ValueError(f"name is {str(name)!r}; it must be one of {', '.join(shapes)}, or a folder that exists")
    if channels not in (None, own[0]) or image_size not in (None, own[1]):
        raise ValueError(f"channels is {channels}, image_size {image_size}; {plain!r} has {own}: only folders are changed")
    if plain == "cifar10" and (root / plain).is_dir() and not (root / datasets.CIFAR10.base_folder).is_dir():
        kind = "JPEG copy" if any((root / plain).rglob("*.[jJ][pP]*")) else "as pictures"
        return replace(_load_folder(root / plain, root, *own), name=plain, source=f"CIFAR-10, {kind}")
    return _load_official(plain, root) if plain in ("mnist", "cifar10") else _load_packaged(plain)


def _load_official(name: str, root: Path) -> ImageData:
    title, dataset, folder = {"mnist": ("MNIST", datasets.MNIST, "MNIST/raw"),
                              "cifar10": ("CIFAR-10", datasets.CIFAR10, datasets.CIFAR10.base_folder)}[name]
    if not any((root / folder).glob("*")):
        waits = patch.object(urllib.request, "urlopen", partial(urllib.request.urlopen, timeout=5))
        try:
            with waits, tempfile.TemporaryDirectory() as elsewhere:  # a download that breaks off leaves nothing behind
                dataset(elsewhere, download=True)
                shutil.copytree(Path(elsewhere, folder), root / folder, dirs_exist_ok=True)
        except Exception as error:  # no network, a host that answers nonsense, no place to write to
            data = _load_packaged("mnist" if name == "mnist" else "photos")
            warnings.warn(f"{title} is not under {root} and could not be had ({' '.join(str(error).split())}). Going on "
                          f"with {data.source}. For all of it connect to the network, or put {folder}/ there.", stacklevel=3)
            return data
    try:
        halves = [dataset(root, train=train) for train in (True, False)]
        if name == "mnist":  # of CIFAR-10 torchvision checks the files, of MNIST only those that it downloads
            parts = [part.numpy().tobytes() for half in halves for part in (half.data, half.targets)]
            if hashlib.md5(b"".join(parts)).hexdigest() != "3a8942afaa4d4472e73e631e8d5025b7":
                raise ValueError("other pixels or labels than those of MNIST")
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise RuntimeError(f"{root / folder} is damaged ({error}). Delete the folder and run this again.") from error
    images = [torch.as_tensor(half.data) for half in halves]  # [N, H, W] or [N, H, W, C]
    images = [x.view(*x.shape[:3], -1).permute(0, 3, 1, 2).contiguous() for x in images]
    splits = [Split(x, half.targets) for x, half in zip(images, halves, strict=True)]
    classes = tuple(label.split(" - ")[0] for label in halves[0].classes)  # of MNIST "7" in place of "7 - seven"
    return ImageData(*splits, classes, name, title)


def _load_packaged(name: str) -> ImageData:
    """What travels with the notebooks or with scikit-learn: "mnist" (12,000 of its digits), "digits", "photos"."""
    if name == "mnist":
        with np.load(ROOT / "notebooks/data/mnist_12k.npz") as file:
            splits = [Split(file[f"{half}_images"][:, None], file[f"{half}_labels"]) for half in ("train", "test")]
        return ImageData(*splits, tuple("0123456789"), name, "MNIST, 12,000 digits")
    if name == "digits":  # 8x8, enlarged to 20x20 in the middle of 28x28, the size that digits of MNIST have
        bunch = load_digits()
        ink = v2.functional.resize(torch.as_tensor(bunch.images).unsqueeze(1) / 16, [20, 20], antialias=True).clamp(0, 1)
        everything = Split(F.pad(ink.mul(255).round().to(torch.uint8), (4, 4, 4, 4)), bunch.target)
        halves = train_test_split(np.arange(len(ink)), test_size=297, stratify=bunch.target, random_state=0)
        return ImageData(*(everything[half] for half in halves), tuple("0123456789"), name, "scikit-learn digits")
    photos, splits = load_sample_images(), []
    pixels = torch.as_tensor(np.stack(photos.images))
    for columns, step in ((slice(0, 512), 8), (slice(512, None), 16)):  # the rightmost fifth is only for testing
        patches = pixels[:, :, columns].unfold(1, 32, step).unfold(2, 32, step).flatten(1, 2)
        splits.append(Split(patches.flatten(0, 1), torch.arange(2).repeat_interleave(patches.shape[1])))
    return ImageData(*splits, tuple(Path(path).stem for path in photos.filenames), name,
                     "patches of scikit-learn's two photographs")


def _load_folder(folder: Path, root: Path, channels: int, image_size: int) -> ImageData:
    _check_whole(1, image_size=image_size)
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 (grey) or 3 (colour)")
    channels, image_size = int(channels), int(image_size)
    parts = {part.name.lower(): part for part in folder.iterdir() if part.is_dir()}
    if "train" in parts and "test" not in parts and parts.keys() & {"val", "valid", "validation"}:
        raise ValueError(f"{folder} holds {', '.join(sorted(parts))}: rename the half for testing to test")
    halves = {half: parts[half] for half in ("train", "test")} if {"train", "test"} <= parts.keys() else {None: folder}
    found = {half: {} for half in halves}  # half -> class -> pictures
    for half, part in halves.items():
        for path in sorted(part.glob("*/**/*")):
            names = path.relative_to(part).parts
            if not path.is_dir() and not path.is_relative_to(root / "cache") and not any(
                    name.startswith(".") or name in SYSTEMS for name in names):
                found[half].setdefault(names[0], []).append(path)
    classes = [*map(list, found.values())]
    if not classes[0] or classes[0] != classes[-1]:
        raise ValueError(f"{folder} must hold pictures as <class>/*.png (or .jpg, ...), or so under train/ and test/, with "
                         f"the same classes in both; its classes are {' and '.join(map(str, classes))}")
    pictures = [(path, classes[0].index(name), half) for half, of in found.items() for name in of for path in of[name]]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) if path.exists() else path for path, _, _ in pictures]
    key = hashlib.sha256(repr((stats, image_size, channels, "halves")).encode()).hexdigest()[:16]
    cache = root / "cache" / f"{key}.pt"
    keys, whole = ("unreadable", "train", "test"), False
    with suppress(ValueError):  # not there, or damaged
        whole = all(_decode(path, channels, image_size) is None for path in _read(cache, *keys, mmap=True)["unreadable"])
    if not whole:
        _decode_all(pictures, cache, channels, image_size)
    kept = _read(cache, *keys, mmap=True)
    if kept["unreadable"]:
        names = ", ".join(Path(path).name for path in kept["unreadable"])
        warnings.warn(f"{len(kept['unreadable'])} unreadable files of {folder} are left out: {names}", stacklevel=3)
    return ImageData(Split(*kept["train"]), Split(*kept["test"]), tuple(classes[0]), folder.name, f"folder {folder.name}")


def _decode(path: str | Path, channels: int, image_size: int) -> Tensor | None:
    """A picture as uint8 [channels, image_size, image_size]: turned upright, on white, with 8 bits, resized, cropped. None
    where it cannot be read."""
    with suppress(Exception), Image.open(path) as file:  # a broken picture can make its decoder raise nearly anything
        picture = ImageOps.exif_transpose(file)
        if picture.mode.startswith(("I", "F")):  # 16 or 32 bits, or floats
            values = np.nan_to_num(np.asarray(picture, dtype=np.float64))
            ranges = (1, 255, 65535) if picture.mode == "F" else (65535,)
            top = next((top for top in ranges if values.max() <= 1.1 * top), values.max())  # resizing may overshoot
            picture = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
        elif picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        image = v2.functional.pil_to_tensor(picture.convert("L" if channels == 1 else "RGB"))
        return v2.functional.center_crop(v2.functional.resize(image, image_size, antialias=True), image_size)


def _decode_all(pictures: list[tuple[Path, int, str | None]], cache: Path, channels: int, image_size: int) -> None:
    """Decodes ``pictures`` (path, label, half) one by one into one file of both halves: none needs to fit into memory.
    Where the half is None, the second readable picture of each class and every tenth after it are for testing."""
    labels, seen, kept = {"train": [], "test": []}, Counter(), {"unreadable": []}
    with _writing(cache) as file, tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        for path, label, half in tqdm(pictures, "decoding pictures", file=_progress_file(), leave=False):
            if (image := _decode(path, channels, image_size)) is None:
                kept["unreadable"].append(str(path))
                continue
            half = half or ("test" if seen[label] % 10 == 1 else "train")
            seen[label] += 1
            labels[half].append(label)
            with Path(folder, half).open("ab") as raw:
                raw.write(image.numpy().tobytes())
        if not all(labels.values()):
            raise ValueError(f"of {len(pictures)} files, {pictures[0][0]} the first, {len(kept['unreadable'])} cannot be "
                             "read; there must be a picture to train and one to test, or two of a class")
        for half, of in labels.items():
            shape = (len(of), channels, image_size, image_size)
            pixels = torch.from_file(str(Path(folder, half)), size=math.prod(shape), dtype=torch.uint8)
            kept[half] = (pixels.view(shape), torch.tensor(of))
        try:
            torch.save(kept, file)
        except (OSError, RuntimeError) as error:
            while error:  # the frames hold the mapped files, and these their space on the disk
                traceback.clear_frames(error.__traceback__)
                error = error.__context__
            raise
        finally:
            del kept, pixels  # Windows deletes no file that is mapped


# ----------------------------------------------------------------------------------------------------- likelihood terms


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, diag(exp(log_var))) || N(0, I)) in nats [B], of ``mean`` and ``log_var`` [B, latent_dim].
    Kingma and Welling 2014 (arXiv 1312.6114), appendix B."""
    return 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(-1)


def elbo(model: nn.Module, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two terms of the evidence lower bound, nats [B] each: recon, log p(x|z) at one posterior sample, and kl, which the
    same sample estimates where torch knows no formula. ELBO = E_q[log p(x|z)] - KL(q(z|x) || p(z)) (Kingma and Welling 2014,
    arXiv 1312.6114, equation 3). Raises ValueError when x is no possible value under p(x|z), and when a distribution of the
    model is not one event for each image."""
    if hasattr(model, "elbo_terms"):
        return model.elbo_terms(x, y)
    q_z = _per_image(model.encode(x, y), "q(z|x)", len(x))
    z = q_z.rsample()
    p_z = _prior(model, z[0])
    recon = _recon(model.decode(z, y), x)
    try:
        return recon, kl_divergence(q_z, p_z)
    except NotImplementedError:  # no closed form for this pair: the same sample estimates it
        return recon, q_z.log_prob(z) - p_z.log_prob(z)


def log_weights(model: nn.Module, x: Tensor, y: Tensor | None = None, num_samples: int = 1) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) at ``num_samples`` samples z of q(z|x) for each image, nats [num_samples, B]. The
    log of their mean exponential estimates log p(x) and can be trained on (Burda et al. 2016, arXiv 1509.00519, equation
    8). An ``elbo_terms`` of the model must give log q(z|x) - log p(z) of its sample as kl here. Raises ValueError as elbo
    does, and for a count below 1."""
    _check_whole(1, num_samples=num_samples)
    x_all, y_all = torch.cat([x] * num_samples), None if y is None else y.repeat(num_samples)
    if hasattr(model, "elbo_terms"):
        recon, kl = model.elbo_terms(x_all, y_all)
        return (recon - kl).view(num_samples, -1)
    q_z = _per_image(model.encode(x, y), "q(z|x)", len(x))
    z = q_z.rsample((num_samples,))
    recon = _recon(model.decode(z.flatten(0, 1), y_all), x_all).view(num_samples, -1)
    return recon + _prior(model, z[0, 0]).log_prob(z) - q_z.log_prob(z)


@torch.no_grad()
def log_likelihood(model: nn.Module, x: Tensor, y: Tensor | None = None, num_samples: int = 1000,
                   chunk: int = 1000) -> Tensor:
    """Estimate of log p(x), nats [B]: the log of the mean of p(x|z) p(z) / q(z|x) over draws z of q(z|x), in eval mode.
    A lower bound in expectation that rises to log p(x) with ``num_samples`` (Burda et al. 2016, arXiv 1509.00519, equation
    8). At most ``chunk`` images are decoded at once, which bounds the memory; a GPU is faster with more. Raises
    ValueError for counts below 1 and for y of another length."""
    _check_whole(1, num_samples=num_samples, chunk=chunk, **{"len(x)": len(x)})
    if y is not None and len(y) != len(x):
        raise ValueError(f"y holds {len(y)} labels for {len(x)} images; it must hold one for each")
    result = []
    with _eval_mode(model) as here:
        for index in torch.arange(len(x)).split(max(1, chunk // num_samples)):
            x_part, y_part = x[index].to(here), None if y is None else y[index].to(here)
            log_w = [log_weights(model, x_part, y_part, min(chunk, num_samples - done)).logsumexp(0)
                     for done in range(0, num_samples, chunk)]
            result.append(torch.stack(log_w).logsumexp(0) - math.log(num_samples))
    return torch.cat(result).to(x.device)


def _per_image(distribution: Distribution, name: str, *batch: int) -> Distribution:
    if distribution.batch_shape != batch:
        raise ValueError(f"{name} has batch shape {list(distribution.batch_shape)}; it must have {list(batch)}: wrap it in "
                         "torch.distributions.Independent, so that log_prob sums over the axes of one image or code")
    return distribution


def _recon(p_x: Distribution, x: Tensor) -> Tensor:
    """log p(x|z), nats [B]. Raises ValueError when x is no possible value, whatever the settings of torch and Python."""
    if 0 < len(_per_image(p_x, "p(x|z)", len(x)).event_shape) != x.ndim - 1:
        raise ValueError(f"p(x|z) has event shape {list(p_x.event_shape)}; it must be {list(x.shape[1:])}, that of an image")
    with suppress(NotImplementedError):  # a distribution of one's own may leave its support unsaid
        if Distribution._validate_args is not None and not p_x.support.check(x).all():  # None: while fit trains
            raise ValueError(
                f"x is no possible value under p(x|z), of support {p_x.support}. A Bernoulli likelihood takes only 0 and 1: "
                "binarize training batches by fit(..., transform=torch.bernoulli), test images by data.binarize_test(). A "
                "likelihood of levels takes only 0, 1/255, ..., 1: images as they are, neither normalized nor with noise.")
    return p_x.log_prob(x)


def _prior(model: nn.Module, z: Tensor) -> Distribution:
    """p(z), of the shape of one code ``z``: the model's own, else N(0, I)."""
    if (own := getattr(model, "prior", None)) is None:
        return Independent(Normal(torch.zeros_like(z), torch.ones_like(z)), z.ndim)
    return _per_image(own, "p(z)") if isinstance(own, Distribution) else own


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    """-nats / (num_dims log 2): the negative log-likelihood of an image in bits for each of its ``num_dims`` values.
    ``nats`` is log P(x) of the 256 discrete levels. A density p over [0, 1] gives such a probability through the volume of
    one level, 1/256 in each dimension: log P(x) = log p(x) - num_dims log 256, with uniform noise of width 1/256 on x
    (Theis et al. 2016, arXiv 1511.01844, section 3.1). Raises ValueError when num_dims < 1."""
    _check_whole(1, num_dims=num_dims)
    return -nats / (num_dims * math.log(2))


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the Gaussians fitted to the rows of ``a`` [N, d] and ``b`` [M, d], features of images, squared:
    |m_a - m_b|² + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), with means m and covariances S (Dowson and Landau 1982; for samples
    Heusel et al. 2017, arXiv 1706.08500). Raises ValueError for fewer than two rows, other shapes, NaN."""
    for name, rows in (("a", a), ("b", b)):
        if rows.ndim != 2 or len(rows) < 2 or rows.shape[1:] != a.shape[1:] or not rows.isfinite().all():
            raise ValueError(f"{name} has shape {list(rows.shape)}; it must be [N, d], N > 1, of finite features, d as in a")
    a, b = a.cpu().double().numpy(), b.cpu().double().numpy()
    S_a, S_b = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0)).sum()  # the trace of (S_a S_b)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b) - 2 * root)


class DiscretizedLogistic(Distribution):
    """Probabilities of the levels 0, 1/255, ..., 1: what a logistic density of mean ``loc`` has in the bin of each. Bins
    are 1/255 wide; those of 0 and 1 take the tails (Kingma et al. 2016, arXiv 1606.04934, section 5.2). ``loc`` and
    ``log_scale``, the logarithm of the scale, have one shape, the batch shape, and are in units of the whole range. With
    ``links`` [..., C (C - 1) / 2, H, W], for (c, d) = (1, 0), (2, 0), (2, 1), the mean of colour c moves by a link times
    x[d] - loc[d] for each colour d before it (Salimans et al. 2017, arXiv 1701.05517, section 2.2). ``log_prob``: nats of
    each value, given the colours before it. Wrap in Independent for whole images."""

    class Levels(constraints.Constraint):
        def check(self, value: Tensor) -> Tensor:  # 0, 1/255, ..., 1, up to rounding
            return ((value * 255).round() / 255 - value).abs().lt(1e-5) & (value >= 0) & (value <= 1)

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}
    support = Levels()

    def __init__(self, loc: Tensor, log_scale: Tensor, links: Tensor | None = None, validate_args: bool | None = None):
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.links = links
        super().__init__(self.loc.shape, validate_args=validate_args)

    @classmethod
    def of_output(cls, output: Tensor) -> Distribution:
        """p(x|z) of the [B, 2, H, W], [B, 6, H, W] or, with links, [B, 9, H, W] that a decoder gives. Outputs near 0, as at
        the start, mean a grey pixel give or take a tenth; no scale is far below one level."""
        if output.shape[1] not in (2, 6, 9):
            raise ValueError(f"output is {list(output.shape)}; it must have 2, 6 or 9 channels")
        colours = 1 if output.shape[1] == 2 else 3
        loc, log_scale, links = output.tensor_split((colours, 2 * colours), dim=1)
        return Independent(cls(0.5 + 0.25 * loc, (log_scale - 3).clamp(-8, 4), links if links.shape[1] else None), 3)

    def given(self, x: Tensor) -> Tensor:
        """``loc``, moved by the colours of ``x`` before each."""
        if self.links is None:
            return self.loc
        after, before = torch.tril_indices(x.shape[-3], x.shape[-3], offset=-1, device=x.device)
        off = x - self.loc
        return self.loc + torch.zeros_like(off).index_add(-3, after, self.links * off.index_select(-3, before))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inverse = (-self.log_scale).exp()
        centre, half = (value - self.given(value)) * inverse, inverse / 510
        below, above = F.logsigmoid(centre + half), F.logsigmoid(half - centre)
        # sigmoid(a) - sigmoid(b) as sigmoid(a) sigmoid(-b) (1 - exp(b - a)): exact where the difference would be 0
        inside = below + above + torch.log(-torch.expm1(-2 * half))
        return torch.where(value < 1 / 510, below, torch.where(value > 1 - 1 / 510, above, inside))

    @property
    def mean(self) -> Tensor:
        """Of the density clipped to [0, 1], the integral of P(X > t): less than half a level off the mean of the levels."""
        x, scale = self.loc, self.log_scale.exp()
        for _ in range(1 if self.links is None else x.shape[-3]):  # pass c settles colour c, given those before it
            mean = self.given(x)
            x = scale * (F.softplus(mean / scale) - F.softplus((mean - 1) / scale))
        return x


# ---------------------------------------------------------------------------------------------------- convolutional VAE


class Residual(nn.Sequential):
    """x + f(x), where f is the layers given (He et al. 2016, arXiv 1603.05027).
    The last layer starts at zero, so that a new block hands x on as it is."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvVAE(nn.Module):
    """Convolution, MaxPool and BatchNorm down to a Gaussian q(z|x); ConvTranspose and BatchNorm up to p(x|z).
    ``image_shape``: (C, H, W) with C of 1 or 3, H and W multiples of 4. ``num_classes`` > 0: encoder and decoder also take
    the label. ``channels``: filters at the first and the second halving. ``hidden``: width of the dense layers. ``blocks``:
    residual blocks of two convolutions at the smallest size, and as many of one dense layer, in encoder and decoder each.
    ``likelihood``: a name in ``likelihoods``, or a pair like its values. The log-variance of q(z|x) is kept in -14 to 14.
    Raises ValueError for values out of range, and for x, y or z that do not fit."""

    likelihoods = {  # name -> (decoder output [B, k(C), H, W] to p(x|z), k)
        "bernoulli": (lambda output: Independent(Bernoulli(logits=output), 3), lambda colours: colours),
        "logistic": (DiscretizedLogistic.of_output, lambda colours: 2 * colours),
        "linked": (DiscretizedLogistic.of_output, lambda colours: 2 * colours + colours * (colours - 1) // 2)}

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), latent_dim: int = 32, num_classes: int = 0, *,
                 channels: tuple[int, int] = (16, 32), hidden: int = 512, blocks: int = 0,
                 likelihood: str | tuple[Callable, Callable] = "bernoulli"):
        super().__init__()
        _check_whole(0, num_classes=num_classes, blocks=blocks)
        _check_whole(1, latent_dim=latent_dim, hidden=hidden, **{f"channels[{i}]": n for i, n in enumerate(channels)})
        if len(image_shape) != 3 or image_shape[0] not in (1, 3) or any(s < 4 or s % 4 for s in image_shape[1:]):
            raise ValueError(f"image_shape is {image_shape}; it must be (1 or 3, H, W) with H and W multiples of 4")
        if isinstance(likelihood, str) and likelihood not in self.likelihoods:
            raise ValueError(f"likelihood is {likelihood!r}; it must be one of {', '.join(self.likelihoods)}")
        image_shape, (few, many) = tuple(map(int, image_shape)), map(int, channels)
        latent_dim, num_classes, hidden, blocks = map(int, (latent_dim, num_classes, hidden, blocks))
        self.image_shape, self.latent_dim, self.num_classes = image_shape, latent_dim, num_classes
        self.config = {"image_shape": image_shape, "latent_dim": latent_dim, "num_classes": num_classes,
                       "channels": (few, many), "hidden": hidden, "blocks": blocks, "likelihood": likelihood}
        self.likelihood, outputs = self.likelihoods[likelihood] if isinstance(likelihood, str) else likelihood
        bottom = (many, image_shape[1] // 4, image_shape[2] // 4)

        def conv_blocks():
            return [Residual(nn.BatchNorm2d(many), nn.ReLU(), nn.Conv2d(many, many, 3, padding=1),
                             nn.BatchNorm2d(many), nn.ReLU(), nn.Conv2d(many, many, 3, padding=1)) for _ in range(blocks)]

        def dense_blocks():
            return [Residual(nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(blocks)]

        self.down = nn.Sequential(  # MaxPool before BatchNorm normalizes a quarter of the values
            nn.Conv2d(image_shape[0], few, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(few), nn.ReLU(),
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
            nn.ConvTranspose2d(few, outputs(image_shape[0]), 4, stride=2, padding=1))
        self.to(memory_format=torch.channels_last)

    def encode(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(z|x), or q(z|x, y) of a conditional model: batch shape [B], event shape [latent_dim]."""
        if x.shape[1:] != self.image_shape or not x.is_floating_point():
            raise ValueError(f"x is {x.dtype} {list(x.shape)}; this model takes floats in [0, 1], [B, *{self.image_shape}]")
        features = self.down(x.to(self.down[0].weight.dtype))
        mean, log_var = self.to_q(self.with_label(features, y)).float().chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var.clamp(-14, 14)).exp()), 1)

    def decode(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x|z), or p(x|z, y) of a conditional model, of z [B, latent_dim]: batch shape [B], event shape [C, H, W]."""
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z has shape {list(z.shape)}; this model takes [B, {self.latent_dim}]")
        h = self.from_z(self.with_label(z.to(self.from_z[0].weight.dtype), y))
        return self.likelihood(self.up(h).float())

    def with_label(self, features: Tensor, y: Tensor | None) -> Tensor:
        """``features`` [B, n] with the one-hot label appended, [B, n + num_classes]; as they are without labels."""
        _check_labels(y, len(features), self.num_classes)
        return features if y is None else torch.cat([features, F.one_hot(y, self.num_classes).to(features.dtype)], dim=1)

    @torch.no_grad()
    def sample(self, num_images: int, y: Tensor | None = None) -> Tensor:
        """Mean images [num_images, C, H, W] of p(x|z) at draws z of the prior, for labels ``y`` int64 [num_images], in eval
        mode."""
        with _eval_mode(self) as here:
            z = _prior(self, torch.empty(self.latent_dim, device=here)).sample((num_images,))
            return self.decode(z, None if y is None else y.to(here)).mean

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Mean images [B, C, H, W] of p(x|z) at the posterior mean z of each image, in eval mode."""
        with _eval_mode(self) as here:
            x, y = x.to(here), None if y is None else y.to(here)
            return self.decode(self.encode(x, y).mean, y).mean


def load_weights(path: str | Path) -> tuple[ConvVAE, dict]:
    """The ConvVAE of a file {"config": model.config, "state": its weights, "info": a dict}, in eval mode and float32, on
    ``device()``; and the info. Raises ValueError when ``path`` is no such file."""
    kept = _read(Path(path).expanduser(), "config", "state", "info")
    try:
        with seeded(0):  # draws nothing from the reader's random numbers
            model = ConvVAE(**kept["config"])
        model.load_state_dict(kept["state"])
    except Exception as error:
        raise ValueError(f"{path} does not hold the configuration and weights of a ConvVAE: {error}") from error
    return model.eval().to(device()), kept["info"]


@torch.no_grad()
def encode_all(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(z|x) of every image of ``split``, [N, latent_dim] each, on the CPU, in eval mode.
    Raises ValueError for an empty split and where q(z|x) is not over vectors."""
    _check_whole(1, **{"len(split)": len(split)})
    means, stddevs = [], []
    with _eval_mode(model) as here:
        for start in range(0, len(split), 1000):
            x, y = split[start:start + 1000].batch(here)
            q_z = _per_image(model.encode(x, y if getattr(model, "num_classes", 1) else None), "q(z|x)", len(x))
            if len(q_z.event_shape) != 1:
                raise ValueError(f"q(z|x) has event shape {list(q_z.event_shape)}; it must be [latent_dim]")
            means.append(q_z.mean.cpu())
            stddevs.append(q_z.stddev.cpu())
    return torch.cat(means), torch.cat(stddevs)


def kl_per_dim(model: nn.Module, split: Split) -> Tensor:
    """KL of the Gaussian with mean and deviation of q(z_i|x) to N(0, 1), whatever the prior, of each latent i, mean over
    ``split``: nats [latent_dim]. Raises as encode_all."""
    return kl_divergence(Normal(*encode_all(model, split)), Normal(0.0, 1.0)).mean(0)


@torch.no_grad()
def mean_images(model: nn.Module, z: Tensor, label: int | None = None) -> Tensor:
    """Mean images of p(x|z) at each row of ``z`` [B, latent_dim], of class ``label`` if given, in eval mode: [B, C, H, W] in
    [0, 1], on the CPU. Raises ValueError for a label that does not fit."""
    with _eval_mode(model) as here:
        y = None if label is None else torch.full((len(z),), label, device=here)
        return model.decode(z.to(here), y).mean.float().clamp(0, 1).cpu()


def _check_labels(y: Tensor | None, count: int, num_classes: int) -> None:
    if (y is None) != (num_classes == 0):
        raise ValueError(f"y is {'missing' if y is None else 'given'}, but this model has {num_classes} classes")
    if y is not None and (y.dtype != torch.int64 or y.shape != (count,) or (y < 0).any() or (y >= num_classes).any()):
        raise ValueError(f"y is {y.dtype} {list(y.shape)} of {y.unique().tolist()}; this model takes "
                         f"labels int64 [{count}] below {num_classes}")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[torch.device]:
    """Every module in eval mode inside the block, and as it was after it. Yields the device of the weights."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    finally:
        for module, training in modes.items():
            module.training = training


# ------------------------------------------------------------------------------------------------------------- training


def negative_elbo(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The default loss of ``fit``: kl - recon, nats [B], and both terms. A model whose num_classes is 0 gets no labels."""
    recon, kl = elbo(model, x, y if getattr(model, "num_classes", 1) else None)
    return {"loss": kl - recon, "recon": recon, "kl": kl}


@dataclass
class History:
    """What ``fit`` measured, under the names that the loss gives its values ("loss", "recon", "kl"), nats per image.
    ``train``: name -> mean over the batch at every update. ``test``: name -> mean over the test split after every epoch, and
    "update", the updates so far. ``seconds`` of training of each epoch. ``kept``: epoch -> what ``on_epoch`` returned."""

    train: dict[str, list[float]] = field(default_factory=dict)
    test: dict[str, list[float]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, *, loss: Callable = negative_elbo, seed: int = 0) -> dict[str, float]:
    """Mean of each of the loss's values over ``split``, in eval mode and float32; posterior samples follow ``seed``.
    Raises ValueError when the loss does not give one value for each image."""
    _check_whole(1, **{"len(split)": len(split)})
    sums = Counter()
    with _eval_mode(model) as here, seeded(seed):
        for start in range(0, len(split), 1000):
            part = split[start:start + 1000]
            for name, value in _named(loss(model, *part.batch(here)), len(part)).items():
                sums[name] += float(value.cpu().sum(dtype=torch.float64))
    return {name: total / len(split) for name, total in sums.items()}


def _named(values: Tensor | dict[str, Tensor], count: int) -> dict[str, Tensor]:
    values = values if isinstance(values, dict) else {"loss": values}
    shapes = {name: getattr(value, "shape", None) for name, value in values.items()}
    if "loss" not in values or "update" in values or any(shape != (count,) for shape in shapes.values()):
        raise ValueError(f"the loss gives {shapes}; it must give 'loss', and all the rest, as tensors [{count}], one value "
                         "per image, none named 'update': sum over pixels and latents, not over the batch")
    return {name: value if value.is_floating_point() else value.float() for name, value in values.items()}


def fit(model: nn.Module, data: ImageData, *, epochs: int, batch_size: int = 128, lr: float = 3e-3,
        optimizer: Callable = partial(torch.optim.Adam, fused=True), loss: Callable = negative_elbo,  # noqa: B008
        transform: Callable | None = None, checkpoint: str | Path | None = None, seed: int = 0,
        bfloat16: bool | None = None, on_epoch: Callable | None = None, progress: bool = True) -> History:
    """Trains ``model`` in place, on ``device()``, with ``data.train``; measures it on ``data.test`` after every epoch, and
    leaves it in eval mode.

    ``batch_size``: of all processes together; batches are spread, so that sizes differ by at most one.
    ``optimizer``: called as optimizer(parameters, lr=lr). ``lr``: peak of a one-cycle schedule (Smith and Topin 2018, arXiv
    1708.07120).
    ``loss(model, x, y)``: nats per image [B], or a dict of such tensors, "loss" among them, which the History keeps.
    ``transform(x)``: applied to each training batch on the device, such as torch.bernoulli (dynamic binarization).
    ``bfloat16``: train in mixed precision; by default where the hardware is fast at it.
    ``on_epoch(model, epoch)``: called, in eval mode, with 0 before the first epoch and after each; a Tensor it returns is
    kept. Of what it changes, a checkpoint holds the weights and buffers of the model.
    ``checkpoint``: a file written after every epoch and continued when it is there: after the stop button (KeyboardInterrupt
    passes through) or a kill the same call ends with the weights, bit for bit, of one never stopped.
    Equal ``seed`` and initial weights give equal weights on the CPU of one machine. Under torchrun every process makes this
    call and trains on its share of each batch (DistributedDataParallel).

    Raises, before any work, ValueError for arguments or data that do not fit and for a checkpoint of other arguments, data,
    loss, transform or model; FloatingPointError, before a checkpoint is written, when loss or weights are NaN or infinite;
    OSError when the checkpoint cannot be written.
    """
    checkpoint = None if checkpoint is None else Path(checkpoint).expanduser()
    arguments = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "bfloat16": bfloat16,
                 "optimizer": optimizer, "loss": loss, "transform": transform}
    here, (rank, world) = device(), _processes()
    _check_fit(model.to(here), data, world, **arguments)
    epochs, batch_size, seed = map(int, (epochs, batch_size, seed))
    batches = math.ceil(len(data.train) / batch_size)
    opt, updates = optimizer(model.parameters(), lr=lr), epochs * batches
    schedule = (torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=updates, cycle_momentum=False) if updates > 1
                else torch.optim.lr_scheduler.ConstantLR(opt, 1.0))  # a cycle of one update would train at nearly 0
    means_of, mixed = _Means(model, loss), _fast_bfloat16(here) if bfloat16 is None else bfloat16
    if world > 1:
        means_of = nn.parallel.DistributedDataParallel(means_of, find_unused_parameters=True)
    things = arguments | {"model": model, "data.train": vars(data.train), "data.test": vars(data.test)}
    parts = {"model": model, "optimizer": opt, "schedule": schedule}
    run, history, done = _resume(checkpoint, things, parts, rank, world)
    progress = progress and rank == 0
    unchecked = patch.object(Distribution, "_validate_args", None)  # checks of every value cost up to a third of the time
    model.eval()  # the mode to come back to, whatever stops the training
    with _eval_mode(model), seeded(seed), unchecked, tqdm(
            total=updates, initial=max(done, 0) * batches, leave=False, ncols=100,
            file=_progress_file() if progress else None, disable=not progress) as bar:
        for epoch in range(done + 1, epochs + 1):
            if epoch:
                torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))  # as after a resume
                start, order = time.perf_counter(), torch.randperm(len(data.train))
                if rank:  # noise of its own
                    torch.manual_seed(torch.initial_seed() + rank)
                model.train()
                for indices in order.tensor_split(batches):
                    x, y = data.train[indices.tensor_split(world)[rank]].batch(here)
                    x = x if transform is None else transform(x)
                    with torch.autocast(here.type, torch.bfloat16, enabled=mixed):
                        means = means_of(x, y, world / len(indices))
                    totals = torch.stack([value.detach() for value in means.values()])
                    if world > 1:
                        dist.all_reduce(totals)
                    values = dict(zip(means, (totals / world).tolist(), strict=True))
                    _refuse_nan({"loss": values["loss"]}, f"at update {schedule.last_epoch + 1}", checkpoint)
                    opt.zero_grad()
                    means["loss"].backward()
                    opt.step()
                    schedule.step()
                    for name, value in values.items():
                        history.train.setdefault(name, []).append(value)
                    bar.set_postfix(epoch=f"{epoch}/{epochs}", loss=f"{values['loss']:.2f}", refresh=False)
                    bar.update()
                model.eval()
                history.seconds.append(time.perf_counter() - start)
                for buffer in model.buffers() if world > 1 else ():
                    dist.broadcast(buffer, 0)
                values = evaluate(model, data.test, loss=loss)
                _refuse_nan({"loss": values["loss"]}, f"on data.test after epoch {epoch}", checkpoint)
                for name, value in {"update": epoch * batches, **values}.items():
                    history.test.setdefault(name, []).append(value)
            kept = on_epoch(model, epoch) if on_epoch else None
            if kept is not None:
                history.kept[epoch] = torch.as_tensor(kept).detach().to("cpu", copy=True)
            _refuse_nan(model.state_dict(), f"after epoch {epoch}", checkpoint)
            if checkpoint and rank == 0:
                with _writing(checkpoint) as file:
                    torch.save({"run": run, "epoch": epoch, "history": asdict(history),
                                **{name: part.state_dict() for name, part in parts.items()}}, file)
    return history


def _check_fit(model: nn.Module, data: ImageData, world: int, *, epochs, batch_size, lr, seed, optimizer, loss, transform,
               **_) -> None:
    """Raises ValueError for what ``fit`` cannot train with; tries a batch of each half, in eval mode."""
    _check_whole(0, epochs=epochs, seed=seed)
    _check_whole(1, batch_size=batch_size, **{"len(data.train)": len(data.train), "len(data.test)": len(data.test)})
    if not isinstance(lr, numbers.Real) or not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}; it must be a positive number")
    if "lr" in getattr(optimizer, "keywords", ()) or any(
            group["lr"] != lr for group in optimizer(model.parameters(), lr=lr).param_groups):
        raise ValueError(f"optimizer brings an lr of its own; leave it out and give lr to fit, where it is {lr}")
    for part in (data.train, data.test) if getattr(model, "num_classes", 0) else ():
        _check_labels(part.labels, len(part), model.num_classes)
    least = len(data.train) // math.ceil(len(data.train) / batch_size) // world
    needed = 1 + any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if least < needed:
        raise ValueError(f"batch_size is {batch_size}: a process gets {least} images at once, and needs {needed}")

    def trial(model, x, y):
        with torch.enable_grad():
            values = _named(loss(model, x if transform is None else transform(x), y), len(x))
        if not values["loss"].requires_grad:
            raise ValueError("the loss has no gradient: it must be computed from the weights, and not under no_grad")
        return values

    evaluate(model, data.train[:least], loss=trial)
    evaluate(model, data.test[:batch_size], loss=loss)


class _Means(nn.Module):
    """The means of the loss's values over a batch as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor, weight: float) -> dict[str, Tensor]:
        means = {name: value.sum() * weight for name, value in _named(self.loss(self.model, x, y), len(x)).items()}
        return {name: value if name == "loss" else value.detach() for name, value in means.items()}


def _processes() -> tuple[int, int]:
    """The number of this process and how many train together: 0 and 1 but under torchrun, whose processes meet here."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return 0, 1
    if not dist.is_initialized():
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device().type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


def _fast_bfloat16(here: torch.device) -> bool:
    if here.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return here.type == "cpu" and any(getattr(torch.cpu, flag, bool)() for flag in flags)


def _refuse_nan(values: dict[str, Tensor | float], where: str, checkpoint: Path | None) -> None:
    for name, value in values.items():
        if not torch.as_tensor(value).isfinite().all():
            kept = f"the checkpoint {checkpoint} is that of the last epoch" if checkpoint else "build the model anew"
            raise FloatingPointError(f"{name} is NaN or infinite {where}; {kept}. Look at transform and loss, or lower lr.")


def _resume(checkpoint: Path | None, things: dict, parts: dict, rank: int, world: int) -> tuple[dict, History, int]:
    """The fingerprint of ``things``, the history and the last epoch in ``checkpoint``, whose state ``parts`` take; an empty
    history and -1 where there is none. Raises ValueError when the fingerprint there is another."""
    if checkpoint is None:
        return {}, History(), -1
    run, shared, trained = {}, [None], [*parts["model"].parameters(), *parts["model"].buffers()]
    for name, thing in things.items():
        run |= _fingerprint(name, thing, trained)
    if rank == 0:
        for name in [name for name, text in run.items() if text == "(no source)"]:
            print(f"{name} has code without a source: after a change of it the checkpoint would be continued all the same")
        if checkpoint.exists():
            shared = [_read(checkpoint, "run", "epoch", "history", *parts)]
            before = shared[0]["run"]
            for name in sorted(before.keys() | run.keys()):
                if before.get(name) != run.get(name):
                    raise ValueError(f"{checkpoint} is of another run: {name} is {before.get(name)} there, {run.get(name)} "
                                     "here. Give another path, or delete the file to train anew.")
            written = time.strftime("%Y-%m-%d %H:%M", time.localtime(checkpoint.stat().st_mtime))
            print(f"{checkpoint.name}: going on from epoch {shared[0]['epoch']}, written {written}")
    if world > 1:
        dist.broadcast_object_list(shared)
    (state,) = shared
    if state is None:
        return run, History(), -1
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return run, History(**state["history"]), state["epoch"]


def _fingerprint(name: str, thing, trained: list[Tensor]) -> dict[str, str]:
    """Name -> text that changes with what ``thing`` computes: plain values, checksums of arrays, the source of the reader's
    functions and methods, and the same of all that these name; of ``trained`` tensors only the shape. What is installed goes
    by its name, so that nothing depends on the version of Python."""
    run, seen, queue = {}, {id(tensor): tensor for tensor in trained}, [(name, thing)]
    for name, thing in queue:  # grows by the parts of each
        if isinstance(thing, np.ndarray | np.generic):
            thing = torch.as_tensor(thing) if thing.ndim and thing.dtype.kind in "biufc" else thing.tolist()
        kind = thing if isinstance(thing, type | types.FunctionType) else type(thing)
        run[name] = f"{kind.__qualname__} {getattr(thing, '__name__', '')}"
        own, parts = not _installed(kind), {}
        if isinstance(thing, Tensor):
            known = id(thing) in seen or not thing.numel()
            values = b"" if known else thing.detach().cpu().reshape(-1).view(torch.uint8).numpy()
            run[name] = f"{list(thing.shape)}, checksum {hashlib.sha256(values).hexdigest()[:16]}"
        elif thing is None or isinstance(
                thing, numbers.Number | str | bytes | range | slice | Path | Enum | torch.dtype | torch.device):
            run[name] = repr(thing)
        elif id(thing) in seen:
            continue
        elif isinstance(thing, dict | list | tuple | set | frozenset):
            thing = sorted(thing, key=repr) if isinstance(thing, set | frozenset) else thing
            parts = thing if isinstance(thing, dict) else dict(enumerate(thing))
        elif own and isinstance(thing, types.FunctionType):
            codes, scope = [thing.__code__], thing.__globals__
            for code in codes:  # grows by the functions inside
                codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
            named = {part for code in codes for part in code.co_names}
            parts = {part: scope[part] for part in named & scope.keys()} | inspect.getclosurevars(thing).nonlocals
            for module in [part for part in parts.values() if isinstance(part, types.ModuleType) and not _installed(part)]:
                parts |= {f"{module.__name__}.{part}": vars(module)[part] for part in named & vars(module).keys()}
            parts["defaults"] = (thing.__defaults__, thing.__kwdefaults__)
            try:
                run[name] = inspect.getsource(thing.__code__)
            except OSError:
                run[name] = "(no source)"
        elif own and isinstance(thing, type):  # with the methods that a reader wrote
            parts = {"bases": thing.__bases__} | {part: value for part, value in vars(thing).items() if part[:2] != "__" or (
                isinstance(value, types.FunctionType) and not _installed(value)
                and not (is_dataclass(thing) and value.__code__.co_filename == "<string>"))}
        else:
            names = {"__class__"} if own else {"func", "args", "keywords", "fget", "__func__", "__self__", "__wrapped__"}
            if kind is not thing and (own or isinstance(thing, nn.Module) or str(kind.__module__).startswith(
                    ("torch", "types", "argparse", "sklearn"))):
                plumbing = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules"}
                names |= {*getattr(thing, "__dict__", ()), *getattr(kind, "__slots__", ())} - plumbing
            parts = {part: getattr(thing, part) for part in names if hasattr(thing, part)}
        seen[id(thing)] = thing
        queue += [(f"{name}.{part}", parts[part]) for part in sorted(parts, key=str)]
    return run


def _installed(kind) -> bool:
    """Whether a class, function or module is part of Python or of a package, so that its name says what it is."""
    name = getattr(kind, "__globals__", {"__name__": getattr(kind, "__module__", None)}).get("__name__")
    root = (name or kind.__name__).partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in sys.stdlib_module_names or root != "__main__" and ("site-packages" in file or "dist-packages" in file)


def _progress_file():
    """What tqdm writes to: in a notebook one line, rewritten in place and empty at the end, so nothing is stored."""
    if not hasattr(get_ipython(), "kernel"):
        return sys.stderr
    line = display({"text/plain": ""}, raw=True, display_id=True)
    return types.SimpleNamespace(encoding="utf-8", write=lambda text: line.update({"text/plain": text.strip()}, raw=True))


# ------------------------------------------------------------------------------------------------------------- pictures


def table(head: list[str], rows: list[list]) -> Markdown:
    """A table for the end of a cell: ``rows`` under ``head``. Raises ValueError for a row of another length."""
    if wrong := [row for row in rows if len(row) != len(head)]:
        raise ValueError(f"rows holds {wrong[0]}, of length {len(wrong[0])}; head has {len(head)} columns")
    cells = [[str(value).replace("|", "\\|") for value in row] for row in [head, ["---"] * len(head), *rows]]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in cells))


def show_images(images: Tensor, *, columns: int = 10, labels: list[str] | None = None, row_labels: list[str] | None = None,
                column_labels: list[str] | None = None, title: str = "", size: float = 0.7) -> plt.Figure:
    """Figure with ``images`` [N, C, H, W], float in [0, 1] or uint8, in rows of ``columns``, each ``size`` inches wide.
    ``labels``: a text under each image. ``row_labels``, ``column_labels``: a text left of each row, below each column.
    Raises ValueError without an image."""
    if images.ndim != 4 or not len(images) or images.shape[1] not in (1, 3):
        raise ValueError(f"images are {images.dtype} {list(images.shape)}; they must be [N, C, H, W], N > 0 and C of 1 or 3")
    _check_whole(1, columns=columns)
    images = images.detach().cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    images = F.pad(images, (0, 2, 0, images.shape[2] // 3 if labels else 2), value=1.0)  # room to the right and below
    height, width = images.shape[2:]
    figure, axes = plt.subplots(layout="constrained", figsize=(
        size * columns + 0.6 * bool(row_labels), size * rows * height / width + 0.35 * bool(title)))
    canvas = make_grid(images, columns, padding=0, pad_value=1.0).clamp(0, 1)
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(title=title, frame_on=False)
    axes.set_yticks([(row + 0.5) * height for row in range(rows)] if row_labels else [], row_labels or [])
    axes.set_xticks([(column + 0.5) * width for column in range(columns)] if column_labels else [], column_labels or [],
                    fontsize="small")
    for i, text in enumerate(labels or []):
        axes.text((i % columns + 0.5) * width, (i // columns + 0.88) * height, text, ha="center", va="center",
                  fontsize="x-small")
    axes.tick_params(length=0)
    axes.grid(False)
    plt.close(figure)
    return figure


def plot_history(history: History, title: str = "", ylabel: str = "nats per image") -> plt.Figure:
    """Figure with a panel for each of the loss's values: training batches by update, ``data.test`` by epoch.
    Raises ValueError for a history without an epoch."""
    if not history.train:
        raise ValueError("history is empty: train for at least one epoch")
    is_elbo = {"kl", "recon"} <= history.train.keys() and np.allclose(
        np.subtract(history.train["kl"], history.train["recon"]), history.train["loss"], rtol=1e-3)
    names = {"loss": "-ELBO" if is_elbo else "loss", "kl": "KL(q(z|x) || p(z))", "recon": "recon, log p(x|z)"}
    figure, panels = plt.subplots(1, len(history.train), figsize=(3 * len(history.train), 2.6), squeeze=False,
                                  layout="constrained")
    for panel, (name, values) in zip(panels[0], history.train.items(), strict=True):
        panel.plot(range(1, len(values) + 1), values, lw=0.5, alpha=0.6, label="training batches")
        panel.plot(history.test["update"], history.test[name], "o-", ms=3, label="held out, by epoch")
        low, high = np.percentile(values[len(values) // 10:] + history.test[name], [0, 99])  # a steep start is out of view
        panel.set(title=names.get(name, name), xlabel="updates", ylabel=ylabel,
                  ylim=(low - 0.05 * (high - low) - 1e-9, high + 0.1 * (high - low) + 1e-9))
        panel.legend(fontsize="small")
    figure.suptitle(title)
    plt.close(figure)
    return figure


def slant(images: Tensor) -> Tensor:
    """Angle by which the ink of each image [N, 1, H, W] leans, degrees [N]: 0 is upright, positive is to the right.
    From second-order moments: the shear that makes the covariance of row and column vanish (Teague 1980). 0 without ink."""
    ink = images.float().mean(1)
    rows = torch.arange(ink.shape[1], device=ink.device).view(1, -1, 1)
    columns = torch.arange(ink.shape[2], device=ink.device).view(1, 1, -1)
    share = ink / ink.sum((1, 2), keepdim=True).clamp(min=1e-6)
    down = rows - (share * rows).sum((1, 2), keepdim=True)
    right = columns - (share * columns).sum((1, 2), keepdim=True)
    return torch.rad2deg(torch.atan2(-(share * down * right).sum((1, 2)), (share * down**2).sum((1, 2))))
