"""Speed and memory on MNIST: ``python tests/tools/benchmark.py`` prints one table, in about 10 minutes on two cores.

(a) ``fit`` against the usual recipe (torchvision dataset, ToTensor, DataLoader) on one 784-400-20-400-784 VAE.
(b) ``fit`` on ConvVAE against a bare loop over ready batches. (c) Peak memory of what came before.
(d) Seconds of training until the test -ELBO passes 110, 100 and 95 nats.
(e) LatentExplorer on ConvVAE: from a slider's move to new bytes of the image and the map.
(f) log p(x) of 1,000 test images with 1,000 importance samples, by the weights of notebook 03.
(g) An epoch of ConvVAE by one process with two threads and by two processes with one thread each.
(h) A ConvVAE update on a quiet machine and beside one busy process, for each way in which threads can wait.

``--only e g`` measures these alone; without it all but (f). ``--full`` adds (f), and 26 epochs to (d).
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import vae_helpers as vh  # isort: skip  # before torch
import torch
from explorer import LatentExplorer
from torch import nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

TRAIN = Path(__file__).resolve().parent / "train_conv.py"
WAITING = {  # how threads of OpenMP wait, in GNU's: name -> environment; unset, they spin 300,000 times
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"}, "unset": {}, "ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"}, "10,000 spins": {"GOMP_SPINCOUNT": "10000"}}


class MLP(nn.Module):
    num_classes = 0

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))

    def encode(self, x, y=None):
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_var).exp()), 1)

    def decode(self, z, y=None):
        return Independent(Bernoulli(logits=self.decoder(z).float().unflatten(1, (1, 28, 28))), 3)


def usual_recipe(model: MLP, root: Path, epochs: int) -> float:
    """Seconds per epoch of the loop that most tutorials show, with the binarization and the schedule of ``fit``."""
    loader = DataLoader(datasets.MNIST(root, transform=transforms.ToTensor()), batch_size=128, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader), cycle_momentum=False)
    start = time.perf_counter()
    for _ in range(epochs):
        for x, _ in loader:
            x = torch.bernoulli(x.view(-1, 784))
            mean, log_var = model.encoder(x).chunk(2, dim=1)
            z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
            logits = model.decoder(z)
            recon = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            loss = (recon - 0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()) / len(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (time.perf_counter() - start) / epochs


def compare_recipes(data: vh.ImageData, root: Path, repeats: int = 3) -> list[tuple[str, str]]:
    ours, usual, losses = [], [], []
    for seed in range(repeats):
        torch.manual_seed(seed)
        model = MLP().to(vh.device())
        history = vh.fit(model, data, epochs=2, transform=torch.bernoulli, seed=seed, progress=False)
        ours.append(sum(history.seconds) / 2)
        torch.manual_seed(seed)
        other = MLP()
        usual.append(usual_recipe(other, root, epochs=2))
        losses.append((history.test["loss"][-1], vh.evaluate(other, data.test)["loss"]))
    left, right = (sum(values) / repeats for values in zip(*losses, strict=True))
    ratio = min(usual) / min(ours)
    return [("(a) fit, s per epoch", f"{min(ours):.2f}"), ("    usual recipe, s per epoch", f"{min(usual):.2f}"),
            ("    ratio (at least 2.7)", f"{ratio:.2f}"),
            ("    test -ELBO after 2 epochs, fit / usual", f"{left:.2f} / {right:.2f} ({abs(left / right - 1):.2%} apart)")]


def bare_loop(model: nn.Module, data: vh.ImageData, batches: int) -> float:
    """Seconds of the least that training can do: batches ready in memory, no history, no checks, no progress."""
    here, size = vh.device(), 128
    x = torch.bernoulli(data.train[:batches * size].batch(here)[0]).split(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    model.train()
    Distribution.set_default_validate_args(False)
    try:
        start = time.perf_counter()
        for batch in x:
            q_z = model.encode(batch)
            z = q_z.rsample()
            kl = vh.gaussian_kl(q_z.base_dist.loc, 2 * q_z.base_dist.scale.log())
            loss = (kl - model.decode(z).log_prob(batch)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start
    finally:
        Distribution.set_default_validate_args(True)


def compare_loops(data: vh.ImageData, batches: int = 150, repeats: int = 3) -> list[tuple[str, str]]:
    part = vh.ImageData(data.train[:batches * 128], data.test[:100], data.classes, data.name, data.source)
    ours, bare = [], []
    for _ in range(repeats):
        model = vh.ConvVAE().to(vh.device())
        bare.append(bare_loop(model, data, batches))
        ours += vh.fit(model, part, epochs=1, transform=torch.bernoulli, bfloat16=False, progress=False).seconds
    return [("(b) ConvVAE in float32, fit, ms per update", f"{min(ours) / batches * 1e3:.1f}"),
            ("    bare loop, ms per update", f"{min(bare) / batches * 1e3:.1f}"),
            ("    ratio (at most 1.10)", f"{min(ours) / min(bare):.2f}")]


def time_to_reach(data: vh.ImageData, epochs: int) -> list[tuple[str, str]]:
    torch.manual_seed(0)
    history = vh.fit(vh.ConvVAE(), data, epochs=epochs, transform=torch.bernoulli, progress=False)
    losses, seconds, rows = history.test["loss"], 0.0, []
    goals = [110, 100, 95]
    for loss, used in zip(losses, history.seconds, strict=True):
        seconds += used
        while goals and loss < goals[0]:
            rows.append((f"(d) {epochs} epochs: test -ELBO below {goals.pop(0)}", f"{seconds:.0f} s"))
    return rows + [(f"(d) {epochs} epochs: test -ELBO at the end", f"{losses[-1]:.2f} nats after {seconds:.0f} s")]


def matrix_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """GFLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=vh.device()).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9


def slider_latency(data: vh.ImageData, moves: int = 200) -> list[tuple[str, str]]:
    start = time.perf_counter()
    panel = LatentExplorer(vh.ConvVAE(data.image_shape).to(vh.device()), data)
    opened, times, sliders = time.perf_counter() - start, [], [*panel.sliders.values()]
    for move in range(moves):
        start, before = time.perf_counter(), panel.image.value
        sliders[move % len(sliders)].value = -3 + move % 96 / 16
        times.append((time.perf_counter() - start) * 1e3)
        assert panel.image.value != before or sliders[move % len(sliders)].value == 0
    return [("(e) LatentExplorer, s to open", f"{opened:.2f}"),
            ("    slider move to new bytes, median ms (at most 10)", f"{statistics.median(times):.1f}"),
            ("    95th percentile, ms", f"{sorted(times)[int(0.95 * moves)]:.1f}")]


def likelihood(data: vh.ImageData) -> list[tuple[str, str]]:
    model, _ = vh.load_weights(vh.ROOT / "notebooks" / "weights" / "mnist.pt")
    torch.manual_seed(3)
    x = data.test[torch.randperm(len(data.test))[:1000]].batch()[0]
    start = time.perf_counter()
    log_p = vh.log_likelihood(model, x, num_samples=1000)
    return [("(f) log p(x), 1,000 images, 1,000 samples (at most 180 s)", f"{time.perf_counter() - start:.0f} s"),
            ("    mean and standard error, nats", f"{log_p.mean():.2f} ± {log_p.std() / math.sqrt(1000):.2f}")]


def train(*options: str, threads: int, processes: int = 1, waiting: dict[str, str] = WAITING["PASSIVE"]) -> dict:
    """What train_conv.py prints, in processes of its own."""
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    run = subprocess.run([sys.executable, *launcher, TRAIN, *options], capture_output=True, text=True,
                         env={**env, **waiting, "OMP_NUM_THREADS": str(threads)})
    if run.returncode:
        raise RuntimeError(f"train_conv.py failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def compare_processes(*options: str, cores: int = 2) -> list[tuple[str, str]]:
    one, two = train(*options, threads=cores), train(*options, threads=1, processes=cores)
    return [(f"(g) ConvVAE, 1 process with {cores} threads, s per epoch", f"{one['seconds']:.1f}"),
            (f"    {cores} processes with 1 thread each, s per epoch", f"{two['seconds']:.1f}"),
            ("    test -ELBO at the end, one / two", f"{one['loss']:.2f} / {two['loss']:.2f}")]


@contextmanager
def busy(command: list[str], env: dict[str, str]):
    """A process that keeps the machine busy inside the block."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env={**os.environ, **env})
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.wait()


def busy_machine(updates: int = 60, repeats: int = 3, cores: int = 2) -> list[tuple[str, str]]:
    """Quiet and busy measurements in turn, so that a slower hour of the machine meets all alike; medians."""
    options, rows = ("--updates", str(updates)), []
    loop = ["-c", "print('busy', flush=True)\nwhile True: pass"]
    times = {name: {"quiet": [], "loop": [], "training": []} for name in WAITING}
    for _ in range(repeats):
        for name, waiting in WAITING.items():
            quietly = times[name]["quiet"]
            quietly.append(train(*options, threads=cores, waiting=waiting)["ms"])
            with busy(loop, {}):
                times[name]["loop"].append(train(*options, threads=cores, waiting=waiting)["ms"])
            other = {"OMP_NUM_THREADS": str(cores), **waiting}
            with busy([str(TRAIN), "--forever", "--updates", "20"], other):
                times[name]["training"].append(train(*options, threads=cores, waiting=waiting)["ms"])
    for name, of in times.items():
        quiet, loop, training = (statistics.median(of[beside]) for beside in ("quiet", "loop", "training"))
        rows += [(f"(h) ConvVAE update, waiting {name}: quiet, ms", f"{quiet:.1f}"),
                 ("    times as long beside a busy loop, beside a training", f"{loop / quiet:.1f}, {training / quiet:.1f}")]
    return rows


def show(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:62}{value}", flush=True)


def peak_memory() -> list[tuple[str, str]]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    return [("(c) peak resident memory of all this (at most 1500 MB)", f"{peak:.0f} MB")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*"abcdefgh"], metavar="LETTER", help="parts to measure")
    parser.add_argument("--full", action="store_true", help="with (f), and with 26 epochs in (d)")
    options = parser.parse_args()
    root = Path(os.environ.get("VAE_DATA") or ROOT / "data")
    data = vh.load_data("mnist").binarize_test()
    if len(data.train) != 60_000:
        sys.exit("the benchmark needs the whole of MNIST")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"on {vh.device()}; {data.source}")
    parts = {  # in this order: the memory is that of the parts before it
        "a": lambda: [(f"matrix product {dtype}, GFLOP/s".replace("torch.", ""), f"{matrix_rate(dtype):.0f}")
                      for dtype in (torch.float32, torch.bfloat16)] + compare_recipes(data, root),
        "b": lambda: compare_loops(data),
        "d": lambda: time_to_reach(data, 4) + (time_to_reach(data, 26) if options.full else []),
        "f": lambda: likelihood(data),
        "e": lambda: slider_latency(data),
        "c": peak_memory, "g": compare_processes, "h": busy_machine}
    for name, measure in parts.items():
        if name in options.only if options.only else name != "f" or options.full:
            show(measure())


if __name__ == "__main__":
    main()
