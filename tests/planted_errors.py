"""Plants one error at a time in a copy of the project and runs tests on it: every error must make some test fail.

    .venv/bin/python tests/planted_errors.py [word ...]

Prints a table of the errors and the test that caught each; exits with 1 when one survives. Words choose the errors whose
description holds one of them. About half a minute for each error on two cores.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELPER = "vae_helpers.py"
LIKELIHOOD, FIT, DATA, MODEL, LEVELS = (f"tests/test_{name}.py" for name in ("likelihood", "fit", "data", "model", "levels"))

ERRORS = [  # what is wrong, file, correct text, wrong text, where a test should notice
    ("KL: sign of the log-variance", HELPER, "log_var.exp() - 1 - log_var)", "log_var.exp() - 1 + log_var)", LIKELIHOOD),
    ("KL: without the half", HELPER, "return 0.5 * (mean**2", "return (mean**2", LIKELIHOOD),
    ("KL: mean over latents for the sum", HELPER, "- 1 - log_var).sum(-1)", "- 1 - log_var).mean(-1)", LIKELIHOOD),
    ("ELBO: KL of p and q swapped", HELPER, "kl_divergence(q_z, p_z)", "kl_divergence(p_z, q_z)", LIKELIHOOD),
    ("ELBO: z is the mean, not a sample", HELPER, "z = q_z.rsample()\n    recon", "z = q_z.mean\n    recon", LIKELIHOOD),
    (
        "importance weight without its prior",
        HELPER,
        "return recon + _prior(model, z).log_prob(z) - q",
        "return recon - q",
        LIKELIHOOD,
    ),
    (
        "importance weight: + log q",
        HELPER,
        "log_prob(z) - q_z.log_prob(z)\n    return",
        "log_prob(z) + q_z.log_prob(z)\n    return",
        LIKELIHOOD,
    ),
    ("importance weights: log K forgotten", HELPER, "total - math.log(num_samples)", "total", LIKELIHOOD),
    (
        "importance weights: mean of logarithms",
        HELPER,
        "log_weights(min(at_once, num_samples - done)).logsumexp(0)",
        "log_weights(min(at_once, num_samples - done)).sum(0)",
        LIKELIHOOD,
    ),
    (
        "importance weights in train mode",
        HELPER,
        "    was_training = model.training\n    model.eval()",
        "    was_training = model.training",
        LIKELIHOOD,
    ),
    (
        "bits: nats not divided by log 2",
        HELPER,
        "return -nats / (num_dims * math.log(2))",
        "return -nats / num_dims",
        LIKELIHOOD,
    ),
    (
        "std = exp(log-variance)",
        HELPER,
        "Normal(mean, (0.5 * log_var.clamp(-14, 14)).exp())",
        "Normal(mean, log_var.clamp(-14, 14).exp())",
        MODEL,
    ),
    (
        "labels of the next image",
        HELPER,
        "float() / 255, self.labels.to(device)",
        "float() / 255, self.labels.roll(1).to(device)",
        DATA,
    ),
    (
        "labels of the digits shifted by one",
        HELPER,
        "torch.as_tensor(bunch.target, dtype",
        "torch.as_tensor((bunch.target + 1) % 10, dtype",
        DATA,
    ),
    ("labels out of range are not noticed", HELPER, "y.max() >= num_classes", "y.max() > num_classes", MODEL),
    ("a residual block without its input", HELPER, "return x + super().forward(x)", "return super().forward(x)", MODEL),
    ("sample: prior of half the width", HELPER, "z = torch.randn(num_images,", "z = 0.5 * torch.randn(num_images,", MODEL),
    (
        "reconstruct: in train mode",
        HELPER,
        "        with _eval_mode(self):\n            return self.decode(self.encode(x, y)",
        "        if True:\n            return self.decode(self.encode(x, y)",
        MODEL,
    ),
    (
        "loss: + recon",
        HELPER,
        'return {"loss": kl - recon, "recon": recon, "kl": kl}',
        'return {"loss": kl + recon, "recon": recon, "kl": kl}',
        FIT,
    ),
    (
        "fit: trains in eval mode",
        HELPER,
        "                model.train()\n                start",
        "                start",
        FIT,
    ),
    (
        "fit: trains on test images",
        HELPER,
        "x, y = data.train[indices].batch(here)",
        "x, y = data.test[indices % len(data.test)].batch(here)",
        FIT,
    ),
    (
        "fit: images in the same order in every epoch",
        HELPER,
        "torch.randperm(len(data.train)).tensor_split",
        "torch.arange(len(data.train)).tensor_split",
        FIT,
    ),
    (
        "fit: the seed is not set",
        HELPER,
        "torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))",
        "torch.seed()",
        FIT,
    ),
    ("fit: the same random numbers in every epoch", HELPER, "SeedSequence((seed, epoch))", "SeedSequence((seed, 1))", FIT),
    ("fit: gradients pile up", HELPER, "                    opt.zero_grad()\n", "", FIT),
    ("fit: the learning rate never falls", HELPER, "                    schedule.step()\n", "", FIT),
    ("fit: transform is forgotten", HELPER, "                    x = x if transform is None else transform(x)\n", "", FIT),
    (
        "fit: one batch too many",
        HELPER,
        "batches = math.ceil(len(data.train) / batch_size)",
        "batches = math.ceil(len(data.train) / batch_size) + 1",
        FIT,
    ),
    ("resume forgets the optimizer", HELPER, '        opt.load_state_dict(state["optimizer"])\n', "", FIT),
    ("resume forgets the schedule", HELPER, '        schedule.load_state_dict(state["schedule"])\n', "", FIT),
    (
        "resume repeats the last epoch",
        HELPER,
        'history, done = History(**state["history"]), state["epoch"]',
        'history, done = History(**state["history"]), max(0, state["epoch"] - 1)',
        FIT,
    ),
    (
        "checkpoint is written in place",
        HELPER,
        'temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")',
        "temporary = path",
        FIT,
    ),
    (
        "evaluate: mean of the means of batches",
        HELPER,
        "float(value.sum(dtype=torch.float64))",
        "float(value.mean(dtype=torch.float64)) * 1000",
        FIT,
    ),
    (
        "evaluate: other samples each time",
        HELPER,
        "    with _eval_mode(model), seeded(seed, here):\n        for start",
        "    with _eval_mode(model):\n        for start",
        FIT,
    ),
    (
        "pixels over 256",
        HELPER,
        "self.images.to(device).float() / 255, self",
        "self.images.to(device).float() / 256, self",
        DATA,
    ),
    (
        "test images binarized by a threshold",
        HELPER,
        "bits = torch.bernoulli(self.test.images.float() / 255, generator=generator)",
        "bits = self.test.images.gt(127)",
        DATA,
    ),
    ("official files: rows for columns", HELPER, "images.permute(0, 3, 1, 2)", "images.permute(0, 3, 2, 1)", DATA),
    ("slant: the other way", HELPER, "torch.atan2(-(share", "torch.atan2((share", DATA),
    (
        "levels: a bin half as wide",
        HELPER,
        "(x - loc) * inverse, inverse / 510",
        "(x - loc) * inverse, inverse / 1020",
        LEVELS,
    ),
    (
        "levels: the edges have no tails",
        HELPER,
        "return torch.where(x < 1 / 510, below, torch.where(x > 1 - 1 / 510, above, inside))",
        "return inside",
        LEVELS,
    ),
    (
        "levels: missing exp of the scale",
        HELPER,
        "inverse = (-log_scale).exp()\n    centre",
        "inverse = 1 / log_scale\n    centre",
        LEVELS,
    ),
    (
        "mixture: blue linked to itself instead of green",
        HELPER,
        "(x - loc)[..., :colour, :, :]",
        "(x - loc)[..., 1:colour + 1, :, :]",
        LEVELS,
    ),
    ("mixture: weights normalized over rows", HELPER, "self.logits.log_softmax(-3)", "self.logits.log_softmax(-2)", LEVELS),
    (
        "explorer: latents in the wrong order",
        HELPER,
        "self._order = self._kl.argsort(descending=True)",
        "self._order = self._kl.argsort()",
        "tests/test_explorer.py",
    ),
    (
        "weights: rounded to eight bits",
        HELPER,
        "{name: value.half() if",
        "{name: value.to(torch.float8_e4m3fn).half() if",
        "tests/test_weights.py",
    ),
]


def copy_project(folder: Path) -> None:
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if (ROOT / "data").is_dir():
        (folder / "data").symlink_to(ROOT / "data")


def main() -> None:
    chosen = [error for error in ERRORS if not sys.argv[1:] or any(word in error[0] for word in sys.argv[1:])]
    survivors = 0
    print("| planted error | caught by |\n| --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_project(folder)
        for what, name, right, wrong, tests in chosen:
            text = (folder / name).read_text()
            if text.count(right) != 1:
                sys.exit(f"{what}: {right!r} is found {text.count(right)} times in {name}; mend this script")
            (folder / name).write_text(text.replace(right, wrong))
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests],
                cwd=folder,
                capture_output=True,
                text=True,
                env={**os.environ, "VAE_BUDGET": "quick"},
            )
            (folder / name).write_text(text)
            caught = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
            survivors += caught is None
            print(f"| {what} | {caught[1] if caught else '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
