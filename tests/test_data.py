"""load_data: each source, the order of look-up, the fallback with its warning, and broken input."""

import gzip
import hashlib
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import vae_helpers as vh

DATA = vh.ROOT / "data" if "VAE_DATA" not in os.environ else vh.Path(os.environ["VAE_DATA"])


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty data root and a proxy that refuses every connection."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("VAE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def write_pictures(folder, count=20, size=(40, 36), mode="RGB"):
    """``count`` pictures in each of two classes; returns the folder."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i:04}.png")
    return folder


def check(data, shape, classes):
    for part in (data.train, data.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == shape and len(part) > 0
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(classes))
        assert part.images.float().std() > 10
    assert len(data.classes) == classes and data.image_shape == shape and data.source


def test_digits():
    data = vh.load_data("digits")
    check(data, (1, 28, 28), 10)
    assert len(data.train) + len(data.test) == 1797
    x, y = data.train[:5].batch()
    assert torch.equal(x * 255, data.train.images[:5].float()) and torch.equal(y, data.train.labels[:5])
    middle = [data.train.images[data.train.labels == digit][..., 13:15, 13:15].float().mean() for digit in (0, 1)]
    assert middle[0] < 0.2 * middle[1], "a zero is empty where a one has ink"
    ink = data.train.images.float()[:, 0]
    grid = torch.arange(28.0)
    centre = (ink.sum(1) * grid).sum(1) / ink.sum((1, 2))
    assert (centre - 13.5).abs().max() < 1


def test_photos():
    data = vh.load_data("photos")
    check(data, (3, 32, 32), 2)
    assert data.classes == ("china", "flower")


@pytest.mark.skipif(not (DATA / "MNIST/raw").is_dir(), reason="MNIST is not under the data root")
def test_mnist_is_the_official_one():
    data = vh.load_data("mnist")
    check(data, (1, 28, 28), 10)
    assert (len(data.train), len(data.test), data.source) == (60_000, 10_000, "MNIST")
    header = np.array([2051, 60_000, 28, 28], dtype=">i4").tobytes()
    digest = hashlib.md5(header + data.train.images.numpy().tobytes()).hexdigest()
    assert digest == "6bbc9ace898e44ae57da46a324031adb"


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="there is no cifar10 folder under the data root")
def test_cifar10_from_a_folder_counts_as_cifar10():
    data = vh.load_data("cifar10")
    check(data, (3, 32, 32), 10)
    assert (len(data.train), len(data.test), data.name, data.source) == (50_000, 10_000, "cifar10", "CIFAR-10, JPEG copy")
    start = time.perf_counter()
    vh.load_data("cifar10")
    assert time.perf_counter() - start < 2, "decoded again"


def test_root_goes_before_the_environment(tmp_path, offline):
    write_pictures(tmp_path / "mine/cifar10", 12)
    assert vh.load_data("cifar10", root=tmp_path / "mine").source == "CIFAR-10, as pictures"
    with pytest.warns(UserWarning, match="CIFAR-10 is not under"):
        assert vh.load_data("cifar10").name == "photos"


@pytest.mark.parametrize("name, stand_in, title", [("mnist", "digits", "MNIST"), ("cifar10", "photos", "CIFAR-10")])
def test_without_a_network_the_stand_in_is_used_and_said(offline, name, stand_in, title):
    start = time.perf_counter()
    with pytest.warns(UserWarning, match=f"{title} is not under .* could not be downloaded.*stand-in '{stand_in}'") as seen:
        data = vh.load_data(name)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert data.name == stand_in and data.source.endswith(f"in place of {title}")
    assert time.perf_counter() - start < 15


def test_a_damaged_official_file_is_named(tmp_path, offline):
    folder = tmp_path / "root/MNIST/raw"
    folder.mkdir(parents=True)
    for name in vh._OFFICIAL["mnist"][3]:
        (folder / name).write_bytes(gzip.compress(b"no digits"))
    with pytest.raises(RuntimeError, match="train-images-idx3-ubyte is damaged.*Delete it"):
        vh.load_data("mnist", root=tmp_path / "root")


@pytest.fixture
def official_cifar10(tmp_path, monkeypatch, offline):
    """A root with a small set in the format of the official files, whose checksums torchvision takes for the right ones."""
    root, rng = tmp_path / "official", np.random.default_rng(0)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name, count):
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": [i % 10 for i in range(count)]})

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    train, test = [batch(f"data_batch_{i}", 20) for i in range(1, 6)], [batch("test_batch", 30)]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(vh.datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(vh.datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(vh.datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    title, dataset, where, _, stand_in = vh._OFFICIAL["cifar10"]
    monkeypatch.setitem(vh._OFFICIAL, "cifar10", (title, dataset, where, dict(train + test), stand_in))
    return root


def test_cifar10_in_the_official_format(official_cifar10):
    data = vh.load_data("cifar10", root=official_cifar10)
    check(data, (3, 32, 32), 10)
    assert (len(data.train), len(data.test), data.name, data.source) == (100, 30, "cifar10", "CIFAR-10")
    with (official_cifar10 / "cifar-10-batches-py/data_batch_2").open("rb") as file:
        pixels = pickle.load(file)["data"][3]
    assert np.array_equal(data.train.images[23].flatten(), pixels), "red, green and blue planes in this order"
    model = vh.ConvVAE(data.image_shape, 4, channels=(4, 8), hidden=16, likelihood="linked")
    history = vh.fit(model, data, epochs=1, batch_size=25, progress=False)
    assert 0 < history.test["loss"][0] < np.inf and data.classes[9] == "truck"


def test_a_damaged_cifar10_batch_is_named(official_cifar10):
    path = official_cifar10 / "cifar-10-batches-py/data_batch_3"
    spoilt = bytearray(path.read_bytes())
    spoilt[1000] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(RuntimeError, match="data_batch_3 is damaged.*Delete it"):
        vh.load_data("cifar10", root=official_cifar10)


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 3)])
def test_a_folder_of_classes(tmp_path, offline, mode, channels):
    data = vh.load_data(write_pictures(tmp_path / "pets", mode=mode), image_size=16, channels=channels)
    check(data, (channels, 16, 16), 2)
    assert (len(data.train), len(data.test), data.classes, data.name) == (36, 4, ("cat", "dog"), "pets")


def test_a_folder_with_train_and_test(tmp_path, offline):
    write_pictures(tmp_path / "pets/train", 5)
    write_pictures(tmp_path / "pets/test", 3)
    data = vh.load_data(str(tmp_path / "pets"))
    check(data, (3, 32, 32), 2)
    assert (len(data.train), len(data.test)) == (10, 6)


def test_a_folder_keeps_pixels_that_need_no_resize(tmp_path, offline):
    folder = write_pictures(tmp_path / "pets", 10, size=(32, 32))
    first = np.asarray(Image.open(folder / "cat/0000.png"))
    assert np.array_equal(vh.load_data(folder).test.images[0].permute(1, 2, 0), first)


def test_a_folder_is_decoded_once_and_again_when_it_changes(tmp_path, offline, monkeypatch):
    folder = write_pictures(tmp_path / "pets")
    before = vh.load_data(folder)
    with monkeypatch.context() as patch:
        patch.setattr(vh.Image, "open", lambda path: pytest.fail("decoded again"))
        assert torch.equal(vh.load_data(folder).train.images, before.train.images)
    Image.new("RGB", (8, 8)).save(folder / "cat/0000.png")
    assert vh.load_data(folder).test.images[0].sum() == 0


def test_broken_pictures_are_skipped_and_listed(tmp_path, offline):
    folder = write_pictures(tmp_path / "pets")
    whole = (folder / "cat/0005.png").read_bytes()
    (folder / "cat/0005.png").write_bytes(whole[:len(whole) // 2])
    (folder / "dog/0007.png").write_bytes(b"")
    (folder / "dog/notes.png").write_text("not a picture")
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="3 unreadable pictures.*0005.png, 0007.png, notes.png"):
            data = vh.load_data(folder)
        assert len(data.train) + len(data.test) == 38


def test_a_folder_without_a_picture(tmp_path, offline):
    (tmp_path / "pets/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold pictures as <class>"):
        vh.load_data(tmp_path / "pets")


def test_a_folder_without_a_readable_picture(tmp_path, offline):
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat/a.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 unreadable"), pytest.raises(ValueError, match="holds no readable picture"):
        vh.load_data(tmp_path / "pets")


def test_a_folder_of_different_classes(tmp_path, offline):
    write_pictures(tmp_path / "pets/train", 2)
    write_pictures(tmp_path / "pets/test/deeper", 2)
    with pytest.raises(ValueError, match="they must be the same"):
        vh.load_data(tmp_path / "pets")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pets", 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*choose a folder"):
        vh.load_data(folder, root=tmp_path / "file")


@pytest.mark.parametrize("name, message", [("mnits", "did you mean 'mnist'"), ("CIFAR-100", "did you mean 'cifar10'"),
                                           ("/no/such/folder", "neither such a data set nor such a folder"),
                                           ("", "neither"), (None, "neither")])
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        vh.load_data(name)


def test_names_as_people_write_them(offline):
    with pytest.warns(UserWarning, match="in place|stand-in"):
        assert vh.load_data("CIFAR-10").name == "photos"
    assert vh.load_data("Digits").name == "digits"


def test_a_folder_with_only_one_half(tmp_path, offline):
    write_pictures(tmp_path / "pets/train", 2)
    with pytest.raises(ValueError, match="only one of train/ and test/; add the other"):
        vh.load_data(tmp_path / "pets")


@pytest.mark.parametrize("suffix, damage", [("*.uint8", None), ("*.uint8", b"short"), ("*.pt", None), ("*.pt", b"short")])
def test_a_damaged_cache_is_made_anew(tmp_path, offline, suffix, damage):
    folder = write_pictures(tmp_path / "pets")
    before = vh.load_data(folder).train.images.clone()
    (file,) = offline.glob(f"cache/{suffix}")
    file.write_bytes(damage) if damage else file.unlink()
    assert torch.equal(vh.load_data(folder).train.images, before)


def test_a_picture_is_turned_upright(tmp_path, offline):
    folder = write_pictures(tmp_path / "pets", 10, size=(32, 32))
    pixels = np.asarray(Image.open(folder / "cat/0000.png"))
    tag = Image.Exif()
    tag[0x0112] = 3  # the camera was upside down
    Image.fromarray(pixels).save(folder / "cat/0000.png", exif=tag)
    assert np.array_equal(vh.load_data(folder).test.images[0].permute(1, 2, 0), np.rot90(pixels, 2))


@pytest.mark.parametrize("arguments, message", [({"channels": 4}, "channels is 4"), ({"image_size": 30}, "size is 30")])
def test_bad_folder_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        vh.load_data(tmp_path, **arguments)


def test_splits_refuse_other_types():
    with pytest.raises(ValueError, match="images are torch.float32.*must be uint8"):
        vh.Split(torch.rand(2, 1, 4, 4), torch.zeros(2).long())
    with pytest.raises(ValueError, match="labels are torch.float32"):
        vh.Split(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2))


def test_the_test_set_is_binarized_once_and_alike(digits):
    grey = vh.load_data("digits")
    again = grey.binarize_test()
    assert torch.equal(again.test.images, digits.test.images)
    assert set(again.test.images.unique().tolist()) == {0, 255}
    assert torch.equal(again.train.images, grey.train.images)
    assert not torch.equal(grey.binarize_test(seed=1).test.images, again.test.images)
    many = torch.stack([grey.binarize_test(seed=s).test.images[0].float() for s in range(300)]).mean(0)
    assert (many - grey.test.images[0]).abs().mean() < 10


def test_a_mapped_folder_costs_no_memory_to_train_on(tmp_path, offline):
    """Anonymous memory, which only swap could take back, after an epoch on a large and on a small folder."""
    code = """
import sys, torch, vae_helpers as vh
torch.set_num_threads(1)  # two of these run at once
from pathlib import Path
from torch import nn
root, rows = Path(sys.argv[1]), int(sys.argv[2])
data = vh.load_data(root / "pets")
pictures = data.train.images
if rows > len(pictures):
    big = root / "big.uint8"
    with big.open("wb") as file:
        for _ in range(rows // len(pictures)):
            file.write(pictures.numpy().tobytes())
    pictures = torch.from_file(str(big), size=rows * 3072, dtype=torch.uint8).view(rows, 3, 32, 32)
    data = vh.ImageData(vh.Split(pictures, torch.zeros(rows).long()), data.test, data.classes, "big", "copies")
model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2), nn.Linear(2, 3072))
vh.fit(model, data, epochs=1, loss=lambda m, x, y: (m(x) - x.flatten(1)).square().sum(1), progress=False)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["RssAnon"].split()[0]) // 1024)
"""
    if not vh.Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    write_pictures(tmp_path / "pets", 50)
    vh.load_data(tmp_path / "pets")  # decoded once, for both runs
    runs = [subprocess.Popen([sys.executable, "-c", code, tmp_path, str(rows)], cwd=vh.ROOT, stdout=subprocess.PIPE,
                             text=True) for rows in (90, 60_030)]
    megabytes = [int(process.communicate()[0]) for process in runs]
    assert megabytes[1] - megabytes[0] < 60  # the pixels alone are 184 MB


@pytest.mark.parametrize("angle", [-25.0, 0.0, 10.0])
def test_slant_of_a_sheared_bar(angle):
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 4:24, 13:15] = 1
    leaning = v2.functional.affine(bar, 0.0, [0, 0], 1.0, [angle, 0.0], v2.InterpolationMode.BILINEAR)
    assert float(vh.slant(leaning)) == pytest.approx(angle, abs=0.5)
    moved = torch.roll(leaning, (3, -4), (2, 3))
    assert float(vh.slant(moved * 0.5)) == pytest.approx(angle, abs=0.5), "neither place nor ink may matter"


def test_slant_of_an_empty_image_is_zero():
    assert vh.slant(torch.zeros(2, 1, 28, 28)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("width", [2, 3, 4])
def test_stroke_width_of_a_bar(width):
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 2:26, 10:10 + width] = 1
    assert float(vh.stroke_width(bar)) == pytest.approx(width, rel=0.2)
    assert float(vh.stroke_width(0.5 * bar)) == pytest.approx(float(vh.stroke_width(bar))), "ink may not matter"
    assert vh.stroke_width(torch.zeros(1, 1, 28, 28)).tolist() == [0.0]
