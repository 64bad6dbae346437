"""Speed and memory of ``fit`` on MNIST: ``python tests/benchmark.py`` prints one table, in about 5 minutes on two cores.

(a) ``fit`` against the usual recipe (torchvision dataset, ToTensor, DataLoader) on one 784-400-20-400-784 VAE.
(b) ``fit`` on ConvVAE against a bare loop over ready batches. (c) Peak memory of that training.
(d) Seconds of training until the test -ELBO passes 110, 100 and 95 nats. ``--full`` adds 26 epochs.
(e) LatentExplorer on ConvVAE: from a slider's move to new bytes of the image and the map; ``--explorer`` does only this.
(f) log p(x) of 1,000 test images with 1,000 importance samples, by the weights of notebook 03; only with ``--full``.
"""

import math
import os
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import vae_helpers as vh


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
            ("    ratio (at least 2.5)", f"{ratio:.2f}"),
            ("    test -ELBO after 2 epochs, fit / usual", f"{left:.2f} / {right:.2f} ({abs(left / right - 1):.2%} apart)")]


def bare_loop(model: nn.Module, data: vh.ImageData, batches: int, bfloat16: bool) -> float:
    """Seconds of the least that training can do: batches ready in memory, no history, no checks, no progress."""
    here, size = vh.device(), 128
    x = torch.bernoulli(data.train[:batches * size].batch(here)[0]).split(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    model.train()
    with vh._unvalidated():
        start = time.perf_counter()
        for batch in x:
            with torch.autocast(here.type, torch.bfloat16, enabled=bfloat16):
                recon, kl = vh.elbo(model, batch)
                loss = (kl - recon).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start


def compare_loops(data: vh.ImageData, batches: int = 150, repeats: int = 3) -> list[tuple[str, str]]:
    part = vh.ImageData(data.train[:batches * 128], data.test[:100], data.classes, data.name, data.source)
    fast = vh._fast_bfloat16(vh.device())
    ours, bare = [], []
    for _ in range(repeats):
        model = vh.ConvVAE().to(vh.device())
        bare.append(bare_loop(model, data, batches, fast))
        ours += vh.fit(model, part, epochs=1, transform=torch.bernoulli, progress=False).seconds
    return [("(b) ConvVAE, fit, ms per update", f"{min(ours) / batches * 1e3:.1f}"),
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
    panel = vh.LatentExplorer(vh.ConvVAE(data.image_shape).to(vh.device()), data)
    opened, times = time.perf_counter() - start, []
    for move in range(moves):
        start = time.perf_counter()
        panel.sliders[move % 8].value = -3 + move % 96 / 16
        times.append((time.perf_counter() - start) * 1e3)
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


def show(rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        print(f"{name:58}{value}")


def main() -> None:
    root = Path(os.environ.get("VAE_DATA") or vh.ROOT / "data")
    data = vh.load_data("mnist").binarize_test()
    if data.name != "mnist":
        sys.exit("the benchmark needs MNIST")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"on {vh.device()}; {data.source}")
    if "--explorer" in sys.argv:
        show(slider_latency(data))
        return
    rows = [(f"matrix product {dtype}, GFLOP/s".replace("torch.", ""), f"{matrix_rate(dtype):.0f}")
            for dtype in (torch.float32, torch.bfloat16)]
    rows += compare_recipes(data, root)
    rows += compare_loops(data)
    rows += time_to_reach(data, 4)
    if "--full" in sys.argv:
        rows += time_to_reach(data, 26)
        rows += likelihood(data)
    rows += slider_latency(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
    rows.append(("(c) peak resident memory of all this (at most 1500 MB)", f"{peak:.0f} MB"))
    show(rows)


if __name__ == "__main__":
    main()
