"""Kills ``fit`` at random moments, resumes it, and compares the final weights with those of a run never killed.

``python tests/tools/kill_fit.py [kills]`` prints a table; exit status 1 when any weight differs.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import vae_helpers as vh  # isort: skip  # before torch
import torch
from models import TinyVAE


def train(data: vh.ImageData, checkpoint: Path, weights: Path) -> None:
    torch.manual_seed(0)
    model = vh.ConvVAE(data.image_shape, 4, channels=(4, 8), hidden=16) if data.image_shape[0] == 3 else TinyVAE()
    vh.fit(model, data, epochs=6, transform=torch.bernoulli, checkpoint=checkpoint, progress=False)
    torch.save(model.state_dict(), weights)


def start(*arguments) -> int:
    """Trains in a child process and returns its number; forked before torch starts threads, which a fork would lose."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            train(*arguments)
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    return child


def same(a: Path, b: Path) -> bool:
    left, right = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main(kills: int) -> int:
    torch.set_num_threads(1)
    rng, wrong = random.Random(0), 0
    print(f"{'data':8}{'killed after s':>16}{'at epoch':>10}  weights after the resume")
    for name in ("digits", "photos"):
        data = vh.load_data(name).binarize_test()
        data = vh.ImageData(data.train[:640], data.test[:100], data.classes, name, data.source)
        with tempfile.TemporaryDirectory() as folder:
            checkpoint, reference, weights = (Path(folder) / file for file in ("run.pt", "reference.pt", "weights.pt"))
            begin = time.perf_counter()
            assert os.waitpid(start(data, checkpoint, reference), 0)[1] == 0
            whole = time.perf_counter() - begin
            for _ in range(kills // 2):
                checkpoint.unlink(missing_ok=True)
                moment = rng.uniform(0, whole)
                child = start(data, checkpoint, weights)
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                epoch = torch.load(checkpoint, weights_only=True)["epoch"] if checkpoint.exists() else "none"
                assert os.waitpid(start(data, checkpoint, weights), 0)[1] == 0
                equal = same(weights, reference)
                wrong += not equal
                print(f"{name:8}{moment:16.2f}{epoch:>10}  {'identical' if equal else 'DIFFERENT'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
