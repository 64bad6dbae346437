"""Makes notebooks/data/mnist_12k.npz, the digits of MNIST that the notebooks fall back to without a network.

    .venv/bin/python tests/tools/make_mnist_12k.py [folder of the data sets]

Of each of the ten classes, the first 1,000 images of the official training file and the first 200 of the official test
file, in the order of those files; then the classes are mixed by a fixed permutation. Plain arrays: train_images and
test_images, uint8 [N, 28, 28]; train_labels and test_labels, int64 [N]. The official files are looked for in the folder
given, else in the one that VAE_DATA names, else in data/. The digits are by Y. LeCun, C. Cortes and C. J. C. Burges,
CC BY-SA 3.0.
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[2]
MD5 = {"train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
       "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
       "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
       "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Places of the first ``count`` of each label, the labels mixed."""
    places = np.concatenate([np.flatnonzero(labels == label)[:count] for label in np.unique(labels)])
    return np.random.default_rng(0).permutation(places)


def main(root: Path) -> None:
    for name, md5 in MD5.items():
        if hashlib.md5((root / "MNIST/raw" / name).read_bytes()).hexdigest() != md5:
            sys.exit(f"{root / 'MNIST/raw' / name} is not the official file: its MD5 is not {md5}")
    arrays = {}
    for part, count in (("train", 1000), ("test", 200)):
        official = datasets.MNIST(root, train=part == "train")
        chosen = first_of_each_class(official.targets.numpy(), count)
        arrays[f"{part}_images"] = official.data.numpy()[chosen]
        arrays[f"{part}_labels"] = official.targets.numpy()[chosen].astype(np.int64)
    target = ROOT / "notebooks/data/mnist_12k.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **arrays)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("VAE_DATA") or ROOT / "data"))
