"""Trains ConvVAE on MNIST for a while and prints how long an update and an epoch took, as JSON.

    .venv/bin/python tests/tools/train_conv.py
    .venv/bin/torchrun --standalone --nproc-per-node 2 tests/tools/train_conv.py

benchmark.py starts it with one process and with two, and beside a busy process. torch is imported first here, so that
vae_helpers does not choose how its threads wait: the environment alone does.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import vae_helpers as vh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=0, help="in an epoch; 0 for the whole training set")
    parser.add_argument("--epochs", type=int, default=3, help="the first only warms up")
    parser.add_argument("--forever", action="store_true", help="to keep a machine busy; prints a line once it does")
    options = parser.parse_args()
    data = vh.load_data("mnist").binarize_test()
    train = data.train[:options.updates * 128] if options.updates else data.train
    data = vh.ImageData(train, data.test[:100], data.classes, data.name, data.source)
    updates, parent = -(-len(train) // 128), os.getppid()
    while True:
        torch.manual_seed(0)
        model = vh.ConvVAE(data.image_shape)
        history = vh.fit(model, data, epochs=options.epochs, transform=torch.bernoulli, progress=False)
        if not options.forever or os.getppid() != parent:  # nobody is left to end it
            break
        print("busy", flush=True)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        seconds = statistics.median(history.seconds[1:] or history.seconds)
        print(json.dumps({"ms": seconds / updates * 1e3, "seconds": seconds, "loss": history.test["loss"][-1]}))


if __name__ == "__main__":
    main()
