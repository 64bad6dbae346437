"""Split, ImageData and load_data: each source, which one a name stands for, pictures of every kind, and broken input."""

import hashlib
import http.server
import json
import math
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import datasets

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # what the reader is warned of, a test names

DATA = Path(os.environ.get("VAE_DATA") or vh.ROOT / "data")
EMBEDDED = vh.ROOT / "notebooks/data/mnist_12k.npz"
needs_mnist = pytest.mark.skipif(not (DATA / "MNIST/raw/train-images-idx3-ubyte").is_file(),
                                 reason="the official files of MNIST are not under the data root")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A data root that is not there yet, and a proxy that refuses every connection."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VAE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def pets(tmp_path, offline):
    return tmp_path / "pets"


def write_pictures(folder, count=10, size=(20, 18), mode="RGB", classes=("cat", "dog"), suffix="png"):
    """``count`` pictures of noise in each class; returns the folder."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i:04}.{suffix}")
    return folder


def all_images(data):
    return torch.cat([data.train.images, data.test.images])


def check(data, shape, classes):
    for part in (data.train, data.test):
        assert part.images.dtype == torch.uint8 and part.images.shape[1:] == shape and len(part) > 0
        assert part.labels.dtype == torch.int64 and set(part.labels.tolist()) == set(range(classes))
        assert part.images.float().std() > 10
    assert len(data.classes) == classes and data.image_shape == shape and data.source


def sizes(data):
    return len(data.train), len(data.test)


# Split and ImageData


LEVELS = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)


@pytest.mark.parametrize("images", [LEVELS, torch.tensor(LEVELS), LEVELS[:, ::-1], LEVELS.transpose(0, 1, 3, 2)])
@pytest.mark.parametrize("labels", [[1, 0], (1, 0), np.array([1, 0]), np.array([1, 0], np.int32), np.array([1, 0], np.uint8),
                                    torch.tensor([1, 0], dtype=torch.int16)])
def test_arrays_and_tensors_make_a_split(images, labels):
    split = vh.Split(images, labels)
    assert isinstance(split.images, torch.Tensor) and isinstance(split.labels, torch.Tensor) and len(split) == 2
    expected = images if isinstance(images, torch.Tensor) else torch.tensor(images.copy())
    assert torch.equal(split.images, expected) and split.labels.tolist() == [1, 0]
    x, y = split.batch()
    assert torch.equal(x * 255, split.images.float()) and x.max() <= 1 and y.dtype == torch.int64 and y.tolist() == [1, 0]


@pytest.mark.parametrize("images, labels, argument", [
    (torch.rand(2, 1, 4, 4), [0, 1], "images"), (LEVELS / 255, [0, 1], "images"), (LEVELS.astype(int), [0, 1], "images"),
    (LEVELS[0], [0, 1, 1], "images"), (None, [0, 1], "images"), (["a", "b"], [0, 1], "images"),
    (LEVELS, [0.0, 1.0], "labels"), (LEVELS, torch.zeros(2), "labels"), (LEVELS, [0], "labels"),
    (LEVELS, [[0], [1]], "labels"), (LEVELS, None, "labels"), (LEVELS, ["cat", "dog"], "labels"),
    (LEVELS, np.array([0, None]), "labels"),
])
def test_a_split_refuses_other_types_and_shapes(images, labels, argument):
    with pytest.raises(ValueError, match=argument):
        vh.Split(images, labels)


@pytest.mark.parametrize("index, rows", [
    (0, [0]), (-1, [4]), (np.int64(3), [3]), (torch.tensor(3), [3]), (slice(1, 3), [1, 2]), (slice(0, 0), []),
    ([4, 0], [4, 0]), (np.array([4, 0]), [4, 0]), (torch.tensor([4, 0]), [4, 0]),
    (torch.tensor([1, 0, 0, 0, 1]).bool(), [0, 4])])
def test_an_index_gives_a_smaller_split(index, rows):
    split = vh.Split(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), [10, 11, 12, 13, 14])
    part = split[index]
    assert part.images.flatten().tolist() == rows and part.labels.tolist() == [10 + row for row in rows]
    assert part.images.shape == (len(rows), 1, 1, 1) and isinstance(part, vh.Split)


def test_the_test_set_is_binarized_once_and_alike(digits):
    grey = vh.load_data("digits")
    again = grey.binarize_test()
    assert torch.equal(again.test.images, digits.test.images) and torch.equal(again.test.labels, grey.test.labels)
    assert set(again.test.images.unique().tolist()) == {0, 255}
    assert torch.equal(again.train.images, grey.train.images)
    assert not torch.equal(grey.binarize_test(seed=1).test.images, again.test.images)
    few = vh.ImageData(grey.train, grey.test[:1], grey.classes, "few", "first digits")
    many = torch.stack([few.binarize_test(seed=seed).test.images[0].float() for seed in range(300)]).mean(0)
    assert (many - grey.test.images[0]).abs().mean() < 10


# the sets that come with scikit-learn and with the notebooks


def test_digits():
    data = vh.load_data("digits")
    check(data, (1, 28, 28), 10)
    assert sum(sizes(data)) == 1797 and data.name == "digits"
    middle = [data.train.images[data.train.labels == digit][..., 13:15, 13:15].float().mean() for digit in (0, 1)]
    assert middle[0] < 0.2 * middle[1], "a zero is empty where a one has ink"
    ink = data.train.images.double()[:, 0]
    grid = torch.arange(28.0).double() - 13.5
    for axis in (1, 2):
        assert ((ink.sum(3 - axis) * grid).sum(1) / ink.sum((1, 2))).abs().mean() < 1, "not in the middle"


def test_photos():
    data = vh.load_data("photos")
    check(data, (3, 32, 32), 2)
    assert (data.classes, data.name) == (("china", "flower"), "photos")
    for photo in load_sample_images().images:
        train = {photo[row:row + 32, column].tobytes() for row in range(0, 396, 8) for column in range(512)}
        columns = data.test.images.permute(0, 3, 2, 1).flatten(0, 1).numpy()
        assert not train & {column.tobytes() for column in columns}, "a column of a test image is in the part to train on"
        assert train & {column.tobytes() for column in data.train.images[..., 0].transpose(1, 2).contiguous().numpy()}


@pytest.fixture(scope="module")
def arrays():
    with np.load(EMBEDDED, allow_pickle=False) as file:
        return dict(file)


COUNTS = {"train": 1000, "test": 200}  # of each class in the file


def test_the_embedded_file_is_small():
    assert EMBEDDED.stat().st_size < 2_200_000


def test_the_embedded_file_holds_plain_arrays_and_as_many_of_each_class(arrays):
    assert sorted(arrays) == ["test_images", "test_labels", "train_images", "train_labels"]
    for part, count in COUNTS.items():
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        assert images.dtype == np.uint8 and images.shape == (10 * count, 28, 28)
        assert labels.dtype == np.int64 and np.bincount(labels).tolist() == 10 * [count]


def test_the_embedded_classes_are_mixed(arrays):
    for part in COUNTS:
        labels = arrays[f"{part}_labels"]
        for piece in (labels[:200], labels[-200:], labels[::10], labels[3::7]):
            assert np.bincount(piece, minlength=10).min() > 0.04 * len(piece)


@needs_mnist
def test_the_embedded_digits_are_the_first_of_each_class_of_the_official_files(arrays):
    for part, count in COUNTS.items():
        official = datasets.MNIST(DATA, train=part == "train")
        images, labels = official.data.numpy(), official.targets.numpy()
        for label in range(10):
            ours = arrays[f"{part}_images"][arrays[f"{part}_labels"] == label]
            theirs = images[labels == label][:count]
            assert sorted(image.tobytes() for image in ours) == sorted(image.tobytes() for image in theirs)


@needs_mnist
def test_mnist_is_the_official_one():
    data = vh.load_data("mnist")
    check(data, (1, 28, 28), 10)
    assert (*sizes(data), data.name, data.source) == (60_000, 10_000, "mnist", "MNIST")
    assert data.classes == tuple("0123456789")
    header = np.array([2051, 60_000, 28, 28], dtype=">i4").tobytes()
    digest = hashlib.md5(header + data.train.images.numpy().tobytes()).hexdigest()
    assert digest == "6bbc9ace898e44ae57da46a324031adb"


# without a network, and with a bad one


def test_mnist_falls_back_to_the_embedded_digits(offline, arrays):
    with pytest.warns(UserWarning, match="MNIST") as seen:
        data = vh.load_data("mnist")
    assert len(seen) == 1 and seen[0].filename == __file__
    assert data.source in str(seen[0].message) and str(offline) in str(seen[0].message) and "12,000" in data.source
    check(data, (1, 28, 28), 10)
    assert (*sizes(data), data.name) == (10_000, 2_000, "mnist")
    assert data.classes == tuple("0123456789"), "as of all of MNIST"
    assert np.array_equal(data.test.images[:, 0], arrays["test_images"])
    assert np.array_equal(data.train.labels, arrays["train_labels"])


def test_cifar10_falls_back_to_photos(offline):
    with pytest.warns(UserWarning, match="CIFAR-10") as seen:
        data = vh.load_data("cifar10")
    assert len(seen) == 1 and seen[0].filename == __file__
    assert data.name == "photos" and data.source in str(seen[0].message)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_fall_back_leaves_nothing_behind(offline, name):
    """A second command, run after a first one without a network, must not take the leftovers for data."""
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"not under {offline}"):
            vh.load_data(name)
        assert not offline.exists()
    write_pictures(offline / "own", 1)
    before = sorted(offline.rglob("*"))
    with pytest.warns(UserWarning, match=f"not under {offline}"):
        vh.load_data(name)
    assert sorted(offline.rglob("*")) == before


def test_a_data_root_that_is_a_file(offline):
    offline.write_text("")
    with pytest.warns(UserWarning, match=f"not under {offline}"):
        assert vh.load_data("mnist").name == "mnist"


@contextmanager
def serving(handler):
    """The address of a server that answers as ``handler`` does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


class Cut(http.server.BaseHTTPRequestHandler):
    """Promises a file and breaks off in the middle of it."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(50_000))

    def log_message(self, *arguments):
        pass


class Nonsense(Cut):
    """Answers what is no HTTP at all."""

    def do_GET(self):
        self.wfile.write(b"sign in first\r\n")


class Portal(Cut):
    """Answers every request with a page of its own."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Sign in first</html>")


class Missing(Cut):
    def do_GET(self):
        self.send_error(404)


class Silent(Cut):
    """Takes the request and says nothing."""

    def do_GET(self):
        time.sleep(20)


@pytest.mark.parametrize("answer", [Cut, Nonsense, Portal, Missing, Silent])
def test_a_download_that_fails(offline, monkeypatch, answer):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    start = time.perf_counter()
    with serving(answer) as url:
        monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
        for _ in range(1 if answer is Silent else 2):  # what the first left must not be taken for the data by the second
            with pytest.warns(UserWarning, match="MNIST") as seen:
                assert vh.load_data("mnist").name == "mnist"
            assert [one.category for one in seen].count(UserWarning) == 1 and not offline.exists()
    assert time.perf_counter() - start < 15


# the official files of CIFAR-10, in small


NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


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

    train, test = [batch(f"data_batch_{i}", 20) for i in range(1, 6)], [batch("test_batch", 30)]
    meta = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return root


def test_cifar10_in_the_official_format(official_cifar10):
    root = official_cifar10
    data = vh.load_data("cifar10", root=root)
    check(data, (3, 32, 32), 10)
    assert (*sizes(data), data.name, data.source, data.classes) == (100, 30, "cifar10", "CIFAR-10", tuple(NAMES))
    with (root / "cifar-10-batches-py/data_batch_2").open("rb") as file:
        pixels = pickle.load(file)["data"][3]
    assert np.array_equal(data.train.images[23].flatten(), pixels), "red, green and blue planes in this order"
    assert data.train.labels[23] == 3
    model = vh.ConvVAE(data.image_shape, 4, channels=(4, 8), hidden=16, likelihood="linked")
    history = vh.fit(model, data, epochs=1, batch_size=25, progress=False)
    assert 0 < history.test["loss"][0] < math.inf


def test_a_damaged_cifar10_batch_is_refused(official_cifar10):
    root = official_cifar10
    path = root / "cifar-10-batches-py/data_batch_3"
    spoilt = bytearray(path.read_bytes())
    spoilt[1000] ^= 1
    path.write_bytes(spoilt)
    with pytest.raises(RuntimeError, match="cifar-10-batches-py is damaged"):
        vh.load_data("cifar10", root=root)


def test_a_download(official_cifar10, offline, monkeypatch):
    root = official_cifar10
    with tarfile.open(root / "cifar.tar.gz", "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    packed = (root / "cifar.tar.gz").read_bytes()

    class Host(Cut):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed)))
            self.end_headers()
            self.wfile.write(packed)

    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(packed).hexdigest())
    monkeypatch.setattr(datasets.CIFAR10, "filename", "cifar.tar.gz")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (offline / "cifar-10-batches-py").mkdir(parents=True)  # as a download of another program that broke off leaves it
    with serving(Host) as url:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{url}cifar.tar.gz")
        first = vh.load_data("cifar10")
    second = vh.load_data("cifar10")  # from the disk: the host is gone
    assert first.source == second.source == "CIFAR-10"
    assert torch.equal(first.train.images, second.train.images) and sizes(second) == (100, 30)
    assert [path.name for path in offline.iterdir()] == ["cifar-10-batches-py"]


def write_mnist(folder):
    """Files in the format of MNIST, with other digits."""
    folder.mkdir(parents=True)
    for half, count in (("train", 60_000), ("t10k", 10_000)):
        head = (0x0803).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in (count, 28, 28))
        (folder / f"{half}-images-idx3-ubyte").write_bytes(head + bytes(count * 28 * 28))
        head = (0x0801).to_bytes(4, "big") + count.to_bytes(4, "big")
        (folder / f"{half}-labels-idx1-ubyte").write_bytes(head + bytes(count))


@pytest.mark.parametrize("spoil", [lambda folder: None, lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(b"1"),
                                   lambda folder: (folder / "train-images-idx3-ubyte").unlink()],
                         ids=["other pixels", "cut", "gone"])
def test_a_damaged_official_file_is_refused(tmp_path, offline, spoil):
    write_mnist(tmp_path / "root/MNIST/raw")
    spoil(tmp_path / "root/MNIST/raw")
    with pytest.raises(RuntimeError, match="root/MNIST/raw is damaged"):
        vh.load_data("mnist", root=tmp_path / "root")


# which source a name stands for


@pytest.mark.skipif(not (DATA / "cifar10").is_dir(), reason="there is no cifar10 folder under the data root")
def test_cifar10_from_a_folder_counts_as_cifar10():
    data = vh.load_data("cifar10")
    check(data, (3, 32, 32), 10)
    assert (*sizes(data), data.name, data.source) == (50_000, 10_000, "cifar10", "CIFAR-10, JPEG copy")


@pytest.mark.parametrize("suffix, source", [("png", "CIFAR-10, as pictures"), ("jpg", "CIFAR-10, JPEG copy"),
                                            ("JPEG", "CIFAR-10, JPEG copy")])
def test_a_copy_of_cifar10_says_what_it_is(offline, suffix, source):
    for half in ("train", "test"):
        write_pictures(offline / "cifar10" / half, 2, suffix=suffix)
    (offline / "cifar10/train/cat/broken.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="broken.png") as seen:
        data = vh.load_data("cifar10")
    assert (*sizes(data), data.name, data.source) == (4, 4, "cifar10", source) and seen[0].filename == __file__


def test_root_goes_before_the_environment(tmp_path, offline):
    write_pictures(tmp_path / "mine/cifar10")
    assert vh.load_data("cifar10", root=tmp_path / "mine").source == "CIFAR-10, as pictures"
    with pytest.warns(UserWarning, match="CIFAR-10"):
        assert vh.load_data("cifar10").name == "photos"


def test_names_as_people_write_them(offline):
    with pytest.warns(UserWarning, match="CIFAR-10"):
        assert vh.load_data("CIFAR-10").name == "photos"
    with pytest.warns(UserWarning, match="MNIST"):
        assert vh.load_data("MNIST").name == "mnist"
    assert vh.load_data("Digits").name == "digits"


@pytest.mark.parametrize("name, hint", [("mnits", "mnist"), ("CIFAR-100", "cifar10"), ("photo", "photos"), ("", "mnist"),
                                        (None, "mnist"), ("/no/such/folder", "/no/such/folder"), ("~/nowhere", "~/nowhere"),
                                        (Path("mnist"), "mnist"), (Path("nowhere"), "nowhere")])
def test_unknown_names(name, hint, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"name is .*{hint}"):
        vh.load_data(name)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(pets):
    write_pictures(pets)
    with pytest.raises(ValueError, match="name is .*0000.png"):
        vh.load_data(pets / "cat/0000.png")


@pytest.mark.parametrize("name", ["photos", "digits", "mnist", "cifar10"])
def test_a_folder_that_bears_the_name_of_a_data_set(offline, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / name)
    with pytest.warns(UserWarning, match=str(tmp_path / name)) as seen:
        data = vh.load_data(name)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert data.classes == ("cat", "dog") and name in data.source
    assert vh.load_data(Path(name)).classes == vh.load_data(f"./{name}").classes == ("cat", "dog"), "said by the reader"


def test_home_is_expanded(offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    write_pictures(tmp_path / "home/pets")
    for name in ("~/pets", Path("~/pets")):
        assert vh.load_data(name, root="~/root").name == "pets"
    monkeypatch.setenv("VAE_DATA", "~/environment")
    vh.load_data("~/pets")
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"pets", "root", "environment"}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("name", ["mnist", "cifar10", "digits", "photos"])
@pytest.mark.parametrize("arguments", [{"image_size": 30}, {"image_size": 64}, {"image_size": 0}, {"channels": 2}])
def test_built_in_sets_have_their_size(offline, name, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        vh.load_data(name, **arguments)


def test_the_size_that_a_set_has_may_be_said():
    assert vh.load_data("digits", image_size=28, channels=1).image_shape == (1, 28, 28)


@pytest.mark.parametrize("arguments", [{"channels": 4}, {"channels": 0}, {"channels": "3"}, {"image_size": 0},
                                       {"image_size": -4}, {"image_size": 32.0}, {"image_size": "32"}])
def test_bad_arguments_for_a_folder(pets, arguments, offline):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        vh.load_data(write_pictures(pets), **arguments)
    assert not offline.exists(), "before any work"


# a folder of pictures: classes and halves


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1), ("RGBA", 3), ("P", 3), ("RGB", 1), ("L", 3), ("1", 1)])
def test_a_folder_of_classes(pets, mode, channels):
    data = vh.load_data(write_pictures(pets, 20, mode=mode), image_size=16, channels=channels)
    check(data, (channels, 16, 16), 2)
    assert (*sizes(data), data.classes, data.name) == (36, 4, ("cat", "dog"), "pets") and "pets" in data.source
    assert data.train.labels.bincount().tolist() == [18, 18] and data.test.labels.bincount().tolist() == [2, 2]


def test_a_folder_with_train_and_test(pets):
    write_pictures(pets / "train", 5)
    write_pictures(pets / "test", 3, size=(24, 24))
    data = vh.load_data(str(pets))
    check(data, (3, 32, 32), 2)
    assert sizes(data) == (10, 6)


@pytest.mark.parametrize("halves", [("Train", "Test"), ("TRAIN", "TEST"), ("train", "Test")])
def test_capitals_do_not_matter(pets, halves):
    write_pictures(pets / halves[0], 3)
    write_pictures(pets / halves[1], 2)
    data = vh.load_data(pets)
    assert (*sizes(data), data.classes) == (6, 4, ("cat", "dog"))


@pytest.mark.parametrize("name", ["train", "test", "Train"])
def test_a_class_may_have_the_name_of_a_half(pets, name):
    data = vh.load_data(write_pictures(pets, classes=("bus", name)))
    assert set(data.classes) == {"bus", name} and sizes(data) == (18, 2)


@pytest.mark.parametrize("name", ["val", "Valid", "validation"])
def test_a_half_for_validation_is_not_taken_for_a_class(pets, name):
    write_pictures(pets / "train", 2)
    write_pictures(pets / name, 2)
    with pytest.raises(ValueError, match="test"):
        vh.load_data(pets)


def test_the_cache_in_the_folder_itself_is_no_class(pets):
    write_pictures(pets)
    first, second = (vh.load_data(pets, root=pets, image_size=np.int64(32)) for _ in range(2))
    assert first.classes == second.classes == ("cat", "dog") and sizes(first) == sizes(second)


def test_pictures_of_deeper_folders_belong_to_the_class(pets):
    write_pictures(pets, 4, classes=("cat/black", "cat/white", "dog"))
    data = vh.load_data(pets)
    assert data.classes == ("cat", "dog") and all_images(data).shape[0] == 12
    labels = torch.cat([data.train.labels, data.test.labels])
    assert labels.bincount().tolist() == [8, 4]


def test_every_class_is_in_both_halves_where_it_has_two_pictures(pets):
    for i in range(12):
        write_pictures(pets, 1 + i % 2, classes=[f"class {i:02}"])
    data = vh.load_data(pets)
    assert len(data.classes) == 12 and sizes(data) == (12, 6)
    assert sorted(data.train.labels.tolist()) == list(range(12))
    assert sorted(data.test.labels.tolist()) == list(range(1, 12, 2))


@pytest.mark.parametrize("count", [2, 3, 11, 30])
def test_a_tenth_of_each_class_is_for_testing(pets, count):
    data = vh.load_data(write_pictures(pets, count, size=(8, 8)), image_size=8)
    in_test = data.test.labels.bincount(minlength=2).tolist()
    assert in_test[0] == in_test[1] == pytest.approx(max(1, count / 10), abs=0.5) and sum(sizes(data)) == 2 * count


def test_single_pictures_leave_nothing_to_test(pets):
    with pytest.raises(ValueError, match="pets"):
        vh.load_data(write_pictures(pets, 1))


@pytest.mark.parametrize("make", [
    lambda pets: pets.mkdir(), lambda pets: (pets / "cat").mkdir(parents=True),
    lambda pets: (pets / "train/cat").mkdir(parents=True),
    lambda pets: write_pictures(pets, 2, classes=["."]), lambda pets: write_pictures(pets, 2, classes=[".hidden"]),
    lambda pets: [(pets / half / "cat").mkdir(parents=True) for half in ("train", "test")],
], ids=["empty", "an empty class", "an empty half", "no classes", "only hidden", "empty halves"])
def test_a_folder_without_a_class(pets, make):
    make(pets)
    with pytest.raises(ValueError, match="pets.*<class>"):
        vh.load_data(pets)


def test_a_folder_without_a_readable_picture(pets):
    (pets / "cat").mkdir(parents=True)
    (pets / "cat/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="pets.*a.png"):
        vh.load_data(pets)


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog", "eel"], ["cat", "Dog"]])
def test_halves_of_different_classes(pets, classes):
    write_pictures(pets / "train", 2)
    write_pictures(pets / "test", 2, classes=classes)
    with pytest.raises(ValueError, match="pets"):
        vh.load_data(pets)


def test_halves_are_compared_without_what_is_hidden(pets):
    for half in ("train", "test"):
        write_pictures(pets / half, 2)
    write_pictures(pets / "test", 1, classes=[".ipynb_checkpoints"])
    (pets / "train/fish").mkdir()
    assert vh.load_data(pets).classes == ("cat", "dog")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "$RECYCLE.BIN",
                                  "System Volume Information"])
@pytest.mark.parametrize("count", [0, 2])
def test_hidden_and_system_folders_are_no_classes_and_hold_no_pictures(pets, name, count):
    write_pictures(pets, 4, classes=("cat", "dog"))
    write_pictures(pets, count, classes=(name, f"cat/{name}"))
    data = vh.load_data(pets)
    assert data.classes == ("cat", "dog") and sum(sizes(data)) == 8


def test_a_hidden_folder_above_does_not_matter(tmp_path, offline):
    assert sizes(vh.load_data(write_pictures(tmp_path / ".cache/@eaDir/pets"))) == (18, 2)


def test_a_folder_zipped_elsewhere(tmp_path, offline):
    """What a Mac, Windows and an old zip program put beside the pictures, and names that are no UTF-8."""
    write_pictures(tmp_path / "made", 4, classes=("große Katze", "dog"))
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for path in (tmp_path / "made").rglob("*.png"):
            name = path.relative_to(tmp_path / "made")
            archive.write(path, name)
            archive.writestr(f"__MACOSX/{name.parent}/._{name.name}", b"\0\5\x16\7")
            archive.writestr(f"{name.parent}/._{name.name}", b"\0\5\x16\7")
        for name in (".DS_Store", "dog/.DS_Store", "dog/Thumbs.db", "dog/desktop.ini", "__MACOSX/._.DS_Store"):
            archive.writestr(name, b"of the system")
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        archive.extractall(tmp_path / "pets")
    data = vh.load_data(tmp_path / "pets")
    assert data.classes == ("dog", "große Katze") and sum(sizes(data)) == 8
    latin = Path(os.fsdecode(os.fsencode(tmp_path / "pets") + "/Hündin".encode("latin-1")))
    try:
        write_pictures(latin, 4, classes=["."])
        (latin / "kaputt.png").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with pytest.warns(UserWarning, match="kaputt.png"):
        data = vh.load_data(tmp_path / "pets")
    assert len(data.classes) == 3 and sum(sizes(data)) == 12


def test_links(tmp_path, pets):
    """To a class or a picture elsewhere: followed. To nothing: listed, and read once it leads somewhere."""
    write_pictures(tmp_path / "elsewhere", 4)
    write_pictures(pets, 4, classes=["dog"])
    (pets / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (pets / "dog/linked.png").symlink_to(tmp_path / "elsewhere/dog/0000.png")
    assert sum(sizes(vh.load_data(pets))) == 9
    (pets / "dog/dangling.png").symlink_to(tmp_path / "later.png")
    (pets / "fish").symlink_to(tmp_path / "nowhere")
    for _ in range(2):
        with pytest.warns(UserWarning, match="dangling.png"):
            data = vh.load_data(pets)
        assert data.classes == ("cat", "dog") and sum(sizes(data)) == 9
    Image.new("RGB", (8, 8), "red").save(tmp_path / "later.png")
    assert sum(sizes(vh.load_data(pets))) == 10


@pytest.mark.parametrize("link", [".", ".."])
def test_a_link_to_a_folder_above_repeats_no_picture(pets, link):
    write_pictures(pets, 4)
    (pets / "cat/link").symlink_to(link)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # to list them is right, too
        assert sum(sizes(vh.load_data(pets))) == 8


def test_a_folder_from_a_phone(tmp_path, offline):
    """Spaces and umlauts, JPEG files that lie on their side, a HEIC among them, which Pillow does not read, and a GIF."""
    folder = write_pictures(tmp_path / "Fotos von Jürgen", 3, classes=("große Katze", "Hund"), suffix="jpg")
    pixels, sideways = np.zeros((24, 16, 3), np.uint8), Image.Exif()
    pixels[:, :8] = 255
    sideways[0x0112] = 6
    for i in range(2):
        Image.fromarray(pixels).save(folder / f"Hund/Bild {i} ä.JPG", exif=sideways)
        Image.new("P", (16, 16)).save(folder / f"Hund/{i}.gif", save_all=True, append_images=[Image.new("P", (16, 16), 1)])
    (folder / "Hund/IMG 1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.warns(UserWarning, match="IMG 1.HEIC") as seen:
        data = vh.load_data(folder, image_size=16)
    assert len(seen) == 1 and data.classes == ("Hund", "große Katze") and data.name == "Fotos von Jürgen"
    assert sum(sizes(data)) == 10
    turned = torch.cat([torch.full((3, 8, 16), 255), torch.full((3, 8, 16), 0)], dim=1)
    assert sum(bool((image.int() - turned).abs().max() < 60) for image in all_images(data)) == 2


# a folder of pictures: pixels


def read_back(folder, write, **arguments):
    """The picture that ``write`` writes to a path without its suffix, as load_data reads it."""
    (folder / "only").mkdir(parents=True)
    for name in ("a", "b"):  # one of them is for testing
        write(str(folder / "only" / name))
    data = vh.load_data(folder, image_size=16, **arguments)
    assert torch.equal(data.train.images, data.test.images) and len(data.train) == 1
    return data.train.images[0]


def test_pictures_of_the_right_size_keep_their_pixels(pets):
    write_pictures(pets, 10, size=(32, 32))
    expected = sorted(np.asarray(Image.open(path)).transpose(2, 0, 1).tobytes() for path in pets.rglob("*.png"))
    assert sorted(image.numpy().tobytes() for image in all_images(vh.load_data(pets))) == expected


def test_the_middle_of_a_picture_is_kept(pets):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    image = read_back(pets, lambda path: Image.fromarray(pixels).save(f"{path}.png"))
    assert np.array_equal(image, pixels[:, 8:24].transpose(2, 0, 1))
    high = read_back(pets / "high", lambda path: Image.fromarray(pixels).rotate(90, expand=True).save(f"{path}.png"))
    assert np.array_equal(high, np.rot90(pixels[:, 8:24]).transpose(2, 0, 1))


def test_a_large_picture_is_averaged(pets):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    small = read_back(pets, lambda path: Image.fromarray(noise).save(f"{path}.png"), channels=1).float()
    assert small.mean() == pytest.approx(noise.mean(), abs=5) and small.std() < noise.std() / 3


RAMP = np.linspace(0, 65535, 256).round().reshape(16, 16)  # level i of 8 bits at place i


@pytest.mark.parametrize("pixels, suffix", [
    (RAMP.astype(np.uint16), "png"), (RAMP.astype(np.uint16), "tif"), (RAMP.astype(">u2"), "tif"),
    (RAMP.astype(np.int32), "tif"), ((RAMP * 32_000).astype(np.int32), "tif"), (RAMP.astype(np.float32), "tif"),
    ((RAMP / 257).astype(np.float32), "tif"), ((RAMP / 65535).astype(np.float32), "tif"),
    ((RAMP / 257).astype(np.uint8), "png"),
], ids=["16 bits", "16 bits, TIFF", "16 bits, big-endian", "32 bits", "all 32 bits", "floats to 65535", "floats to 255",
        "floats to 1", "8 bits"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_more_than_8_bits_are_scaled(pets, pixels, suffix, channels):
    image = read_back(pets, lambda path: Image.fromarray(pixels).save(f"{path}.{suffix}"), channels=channels)
    assert image.shape == (channels, 16, 16)
    for colour in image:
        assert (colour.flatten().int() - torch.arange(256)).abs().max() <= 1


def test_pixels_of_16_bits_share_one_scale(pets):
    image = read_back(pets, lambda path: Image.fromarray((RAMP / 8).astype(np.uint16)).save(f"{path}.png"), channels=1)
    assert abs(int(image.max()) - 32) <= 1, "a dark scan stays dark"


@pytest.mark.parametrize("least, most", [(-0.02, 1.02), (-3, 260)])
def test_floats_that_overshoot_their_range_a_little(pets, least, most):
    pixels = np.linspace(least, most, 256, dtype=np.float32).reshape(16, 16)
    image = read_back(pets, lambda path: Image.fromarray(pixels).save(f"{path}.tif"), channels=1)
    assert (image.flatten().int() - torch.arange(256)).abs().max() <= 6


def test_floats_that_are_no_numbers(pets):
    pixels = (RAMP / 65535).astype(np.float32)
    pixels[0, 0] = np.nan
    image = read_back(pets, lambda path: Image.fromarray(pixels).save(f"{path}.tif"), channels=1)
    assert (image.flatten().int() - torch.arange(256)).abs().max() <= 1
    black = read_back(pets / "black", lambda path: Image.fromarray(0 * RAMP.astype(np.float32)).save(f"{path}.tif"))
    assert black.max() == 0


INK = np.zeros((16, 16), np.uint8)
INK[:, 8:] = 255


def write_ink(mode, suffix):
    """A function that writes black ink, right, on a transparent ground, left, whose colour is black or nearly so."""
    options = {}
    if mode in ("RGBA", "LA"):
        picture = Image.merge(mode, [Image.new("L", (16, 16))] * (len(mode) - 1) + [Image.fromarray(INK)])
        options = {"lossless": True} if suffix == "webp" else {}
    elif mode.startswith("P"):  # two entries of the palette, both black
        picture = Image.fromarray(INK // 255).convert("P")
        picture.putpalette([0, 0, 0] * 256)
        options["transparency"] = bytes([0, 255]) if mode == "P, an alpha for each" else 0
    elif mode == "1":
        picture, options["transparency"] = Image.fromarray(INK == 0), 255
    else:
        picture = Image.fromarray(np.where(INK, 0, 7).astype(np.uint8)).convert(mode)
        options["transparency"] = 7 if mode == "L" else (7, 7, 7)
    return lambda path: picture.save(f"{path}.{suffix}", **options)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, suffix", [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P, an alpha for each", "png"),
                                          ("L", "png"), ("RGB", "png"), ("1", "png"), ("P", "gif"), ("RGBA", "webp"),
                                          ("RGBA", "tif"), ("RGBA", "tga")])
def test_a_transparent_ground_is_white(pets, mode, suffix, channels):
    image = read_back(pets, write_ink(mode, suffix), channels=channels)
    assert torch.equal(image, 255 - torch.tensor(INK).expand(channels, 16, 16))


def test_half_transparent_ink_is_grey(pets):
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 128))
    image = read_back(pets, lambda path: picture.save(f"{path}.png"))
    assert ((image.int() - 127).abs() <= 1).all()


def test_every_way_to_hold_the_camera(pets):
    """The tag of EXIF says how the upright picture was moved before it was stored."""
    stored = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    upright = {1: stored, 2: stored[:, ::-1], 3: np.rot90(stored, 2), 4: stored[::-1], 5: stored.swapaxes(0, 1),
               6: np.rot90(stored, -1), 7: np.rot90(stored, 2).swapaxes(0, 1), 8: np.rot90(stored)}
    for tag in upright:
        (pets / str(tag)).mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = tag
        for name in ("a.png", "b.png"):
            Image.fromarray(stored).save(pets / str(tag) / name, exif=exif)
    data = vh.load_data(pets, image_size=16)
    for image, label in zip(data.train.images, data.train.labels.tolist(), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), upright[label + 1]), f"orientation {label + 1}"


def test_colours_of_print(pets):
    image = read_back(pets, lambda path: Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(f"{path}.jpg"))
    assert image.flatten(1).float().mean(1).tolist() == pytest.approx([255, 0, 0], abs=3)


def test_broken_pictures_are_skipped_and_listed(pets):
    write_pictures(pets, 20)
    whole = (pets / "cat/0005.png").read_bytes()
    (pets / "cat/0005.png").write_bytes(whole[:len(whole) // 2])
    (pets / "dog/0007.png").write_bytes(b"")
    (pets / "dog/notes.png").write_text("not a picture")
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="0005.png, 0007.png, notes.png") as seen:
            data = vh.load_data(pets)
        assert sum(sizes(data)) == 38 and len(seen) == 1 and seen[0].filename == __file__


def test_a_picture_that_can_be_read_later_is_read_then(pets):
    """Its size and its time may be the same: what was missing is the right to read it, a disk or a decoder."""
    write_pictures(pets, 4)
    path = pets / "cat/0001.png"
    whole, times = path.read_bytes(), (1_000_000_000, 1_000_000_000)
    path.write_bytes(whole[::-1])
    os.utime(path, ns=times)
    with pytest.warns(UserWarning, match="0001.png"):
        assert sum(sizes(vh.load_data(pets))) == 7
    path.write_bytes(whole)
    os.utime(path, ns=times)
    for _ in range(2):
        assert sum(sizes(vh.load_data(pets))) == 8


# a folder of pictures: the cache


def files_of(folder):
    """Name -> number and time of each file: a file made anew has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_folder_is_decoded_once_and_again_when_it_changes(pets, offline):
    write_pictures(pets)
    before, files = vh.load_data(pets), files_of(offline / "cache")
    again = vh.load_data(pets)
    assert torch.equal(again.train.images, before.train.images) and torch.equal(again.test.labels, before.test.labels)
    assert files_of(offline / "cache") == files and len(files) == 1
    vh.load_data(pets, image_size=16)
    vh.load_data(pets, channels=1)
    assert len(files_of(offline / "cache")) == 3 and files.items() <= files_of(offline / "cache").items()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(pets / "cat/0000.png")
    changed = all_images(vh.load_data(pets))
    assert [image.flatten(1)[:, 0].tolist() for image in changed].count([1, 2, 3]) == 1 and len(changed) == 20
    (pets / "cat/0001.png").unlink()
    assert sum(sizes(vh.load_data(pets))) == 19
    write_pictures(pets, 1, classes=["eel"])
    assert vh.load_data(pets).classes == ("cat", "dog", "eel")


def test_every_way_to_name_the_root_leads_to_one_cache(tmp_path, offline, monkeypatch):
    write_pictures(tmp_path / "root/cifar10", 2)
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "root", "root", "./root", "root/../root"):
        vh.load_data("cifar10", root=root)
    assert len(list(tmp_path.glob("root/cache/*"))) == 1


class Harmful:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", [
    Path.unlink, lambda file: file.write_bytes(b"short"), lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(file.read_bytes()[:5000]), lambda file: torch.save({}, file),
    lambda file: torch.save([1], file),
    lambda file: torch.save(Harmful(file.parent.parent / "harm"), file),
    lambda file: file.write_bytes(pickle.dumps(Harmful(file.parent.parent / "harm"))),
], ids=["gone", "short", "empty", "cut", "another", "a list", "harmful", "a pickle"])
def test_a_damaged_cache_is_made_anew(pets, offline, damage):
    before = vh.load_data(write_pictures(pets)).train.images.clone()
    (file,) = offline.glob("cache/*")
    damage(file)
    assert torch.equal(vh.load_data(pets).train.images, before)
    assert [path.name for path in offline.rglob("*")] == ["cache", file.name], "nothing else is made"


def test_a_cache_that_cannot_be_written(pets, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file.cache"):
        vh.load_data(write_pictures(pets, 2), root=tmp_path / "file")


@pytest.mark.parametrize("image_size", [32, 64])
def test_a_full_disk_while_decoding(pets, mount, image_size):
    """The pixels of 64 do not fit; those of 32 do, but not a second time, into the cache."""
    disk = mount("size=96k")
    write_pictures(pets)
    with pytest.raises(OSError, match="mounted.cache"):
        vh.load_data(pets, root=disk, image_size=image_size)
    assert not [path for path in disk.rglob("*") if path.is_file()]
    assert sizes(vh.load_data(pets, root=disk, image_size=8)) == (18, 2)


def test_the_stop_button_while_decoding(pets, offline, monkeypatch):
    write_pictures(pets)
    with monkeypatch.context() as patch:
        opened = Image.open

        def stopped(path, *arguments, **more):
            if Path(path).name == "0007.png":
                raise KeyboardInterrupt
            return opened(path, *arguments, **more)

        patch.setattr(Image, "open", stopped)
        with pytest.raises(KeyboardInterrupt):
            vh.load_data(pets)
    assert not [path for path in offline.rglob("*") if path.is_file()]
    assert sizes(vh.load_data(pets)) == (18, 2)


def mapped_file(tensor):
    """The file that the memory of ``tensor`` is a map of, or nothing."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(place, 16) for place in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.split(maxsplit=5)[5:]
    return []


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")


@needs_proc
@pytest.mark.parametrize("halves", [["."], ["train", "test"]], ids=["classes", "train and test"])
def test_both_halves_are_maps_of_the_cache(pets, offline, halves):
    for half in halves:
        write_pictures(pets / half)
    for _ in range(2):  # as decoded, and from the cache
        data = vh.load_data(pets)
        (file,) = offline.glob("cache/*")
        for part in (data.train, data.test, data.train[3:5]):
            assert mapped_file(part.images) == [str(file)]
    assert mapped_file(data.train.images.clone()) != [str(file)]


MEMORY = """
import json, sys, threading, time, vae_helpers as vh
from pathlib import Path
from torch import nn


def anonymous():
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) // 1024


def measure(folder):
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.002):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    data = vh.load_data(folder, image_size=512)
    done.set()
    watcher.join()
    vh.fit(nn.Linear(1, 1), data, epochs=1, batch_size=4, progress=False, checkpoint=folder.parent / f"{folder.name}.pt",
           loss=lambda model, x, y: model(x[:, 0, 0, :1]).square().sum(1))
    return max(seen), anonymous()


print(json.dumps([measure(Path(sys.argv[1]) / name) for name in ("small", "large")]))
"""


@needs_proc
def test_a_large_folder_costs_no_memory(tmp_path, offline):
    """Anonymous memory, which only swap could take back: the most while pictures are decoded, and after an epoch."""
    picture = Image.fromarray(np.arange(512 * 512 // 64, dtype=np.uint8).reshape(64, 64)).resize((512, 512)).convert("RGB")
    for name, count in (("small", 12), ("large", 240)):
        (tmp_path / name / "only").mkdir(parents=True)
        for i in range(count):
            picture.save(tmp_path / name / f"only/{i}.bmp") if i == 0 else os.link(
                tmp_path / name / "only/0.bmp", tmp_path / name / f"only/{i}.bmp")
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=vh.ROOT, capture_output=True, text=True, check=True)
    (peak_small, after_small), (peak_large, after_large) = json.loads(out.stdout.splitlines()[-1])
    assert peak_large - peak_small < 90 and after_large - after_small < 90, "the pixels alone are 189 MB"
