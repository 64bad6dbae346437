"""Plants one error at a time in a copy of the project and runs tests on it: every error must make some test fail.

    .venv/bin/python tests/planted_errors.py [word ...]

Prints a table of the errors and the test that caught each; exits with 1 when one survives. Words choose the errors whose
description holds one of them. About half a minute for each error on two cores. An error is planted in vae_helpers.py when
a file of tests/ should notice it, and in a notebook when the assertions of that notebook should.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
ERRORS = {  # what should notice -> what is wrong, the right text, the wrong text
    "tests/test_likelihood.py": [
        ("KL: sign of the log-variance", "log_var.exp() - 1 - log_var)", "log_var.exp() - 1 + log_var)"),
        ("KL: without the half", "return 0.5 * (mean**2", "return (mean**2"),
        ("KL: mean over latents for the sum", "- 1 - log_var).sum(-1)", "- 1 - log_var).mean(-1)"),
        ("ELBO: KL of p and q swapped", "kl_divergence(q_z, p_z)", "kl_divergence(p_z, q_z)"),
        ("ELBO: z is the mean, not a sample", "z = q_z.rsample()\n    recon", "z = q_z.mean\n    recon"),
        ("importance weight without its prior", "return recon + _prior(model, z).log_prob(z) - q", "return recon - q"),
        ("importance weight: + log q",
         "log_prob(z) - q_z.log_prob(z)\n    return",
         "log_prob(z) + q_z.log_prob(z)\n    return"),
        ("importance weights: log K forgotten", "total - math.log(num_samples)", "total"),
        ("importance weights: mean of logarithms",
         "draw(min(at_once, num_samples - done)).logsumexp(0)",
         "draw(min(at_once, num_samples - done)).sum(0)"),
        ("importance weights: no gradient through z", "z = q_z.rsample((count,))", "z = q_z.sample((count,))"),
        ("importance weights in train mode",
         "    was_training = model.training\n    model.eval()",
         "    was_training = model.training"),
        ("bits: nats not divided by log 2", "return -nats / (num_dims * math.log(2))", "return -nats / num_dims"),
    ],
    "tests/test_model.py": [
        ("std = exp(log-variance)",
         "Normal(mean, (0.5 * log_var.clamp(-14, 14)).exp())",
         "Normal(mean, log_var.clamp(-14, 14).exp())"),
        ("labels out of range are not noticed", "y.max() >= num_classes", "y.max() > num_classes"),
        ("a residual block without its input", "return x + super().forward(x)", "return super().forward(x)"),
        ("sample: prior of half the width", "z = torch.randn(num_images,", "z = 0.5 * torch.randn(num_images,"),
        ("reconstruct: in train mode",
         "        with _eval_mode(self):\n            return self.decode(self.encode(x, y)",
         "        if True:\n            return self.decode(self.encode(x, y)"),
    ],
    "tests/test_data.py": [
        ("labels of the next image",
         "float() / 255, self.labels.to(device)",
         "float() / 255, self.labels.roll(1).to(device)"),
        ("labels of the digits shifted by one",
         "torch.as_tensor(bunch.target, dtype",
         "torch.as_tensor((bunch.target + 1) % 10, dtype"),
        ("pixels over 256", "self.images.to(device).float() / 255, self", "self.images.to(device).float() / 256, self"),
        ("test images binarized by a threshold",
         "bits = torch.bernoulli(self.test.images.float() / 255, generator=generator)",
         "bits = self.test.images.gt(127)"),
        ("official files: rows for columns", "images.permute(0, 3, 1, 2)", "images.permute(0, 3, 2, 1)"),
        ("slant: the other way", "torch.atan2(-(share", "torch.atan2((share"),
    ],
    "tests/test_fit.py": [
        ("loss: + recon",
         'return {"loss": kl - recon, "recon": recon, "kl": kl}',
         'return {"loss": kl + recon, "recon": recon, "kl": kl}'),
        ("fit: trains in eval mode", "                model.train()\n                start", "                start"),
        ("fit: trains on test images",
         "x, y = data.train[indices].batch(here)",
         "x, y = data.test[indices % len(data.test)].batch(here)"),
        ("fit: images in the same order in every epoch",
         "torch.randperm(len(data.train)).tensor_split",
         "torch.arange(len(data.train)).tensor_split"),
        ("fit: the seed is not set",
         "torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))",
         "torch.seed()"),
        ("resume forgets the random state",
         "torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))",
         "pass"),
        ("fit: the same random numbers in every epoch", "SeedSequence((seed, epoch))", "SeedSequence((seed, 1))"),
        ("fit: gradients pile up", "                    opt.zero_grad()\n", ""),
        ("fit: the learning rate never falls", "                    schedule.step()\n", ""),
        ("fit: transform is forgotten", "                    x = x if transform is None else transform(x)\n", ""),
        ("fit: one batch too many",
         "batches = math.ceil(len(data.train) / batch_size)",
         "batches = math.ceil(len(data.train) / batch_size) + 1"),
        ("resume forgets the optimizer", '        opt.load_state_dict(state["optimizer"])\n', ""),
        ("resume forgets the schedule", '        schedule.load_state_dict(state["schedule"])\n', ""),
        ("resume repeats the last epoch",
         'history, done = History(**state["history"]), state["epoch"]',
         'history, done = History(**state["history"]), max(0, state["epoch"] - 1)'),
        ("checkpoint is written in place",
         'temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")',
         "temporary = path"),
        ("evaluate: mean of the means of batches",
         "float(value.cpu().sum(dtype=torch.float64))",
         "float(value.mean(dtype=torch.float64)) * 1000"),
        ("evaluate: other samples each time",
         "    with _eval_mode(model), seeded(seed):\n        for start",
         "    with _eval_mode(model):\n        for start"),
    ],
    "tests/test_levels.py": [
        ("levels: a bin half as wide", "(x - loc) * inverse, inverse / 510", "(x - loc) * inverse, inverse / 1020"),
        ("levels: the edges have no tails",
         "return torch.where(x < 1 / 510, below, torch.where(x > 1 - 1 / 510, above, inside))",
         "return inside"),
        ("levels: missing exp of the scale",
         "inverse = (-log_scale).exp()\n    centre",
         "inverse = 1 / log_scale\n    centre"),
        ("mixture: blue linked to itself instead of green",
         "(x - loc)[..., :colour, :, :]",
         "(x - loc)[..., 1:colour + 1, :, :]"),
        ("mixture: weights normalized over rows", "self.logits.log_softmax(-3)", "self.logits.log_softmax(-2)"),
    ],
    "tests/test_explorer.py": [
        ("explorer: latents in the wrong order",
         "self._order = self._kl.argsort(descending=True)",
         "self._order = self._kl.argsort()"),
    ],
    "tests/test_weights.py": [
        ("weights: rounded to eight bits", "{name: value.half() if", "{name: value.to(torch.float8_e4m3fn).half() if"),
    ],
    "notebooks/01_autoencoder_basics.ipynb": [
        ("PCA: the mean is not added again", "(change(z) @ V + mean)", "(change(z) @ V)"),
        ("squared error: mean over pixels for the sum",
         "(x - x_hat).square().sum((1, 2, 3), dtype=torch.float64).mean()",
         "(x - x_hat).square().mean((1, 2, 3), dtype=torch.float64).mean()"),
    ],
    "notebooks/02_elbo_derivation.ipynb": [
        ("Gaussian density: without the half",
         "return -0.5 * (math.log(2 * math.pi) + torch.log(var)",
         "return -(math.log(2 * math.pi) + torch.log(var)"),
        ("expected reconstruction: the trace is dropped", "(off @ off + spread) / noise_var", "(off @ off) / noise_var"),
        ("entropy: wrong sign", "return 0.5 * torch.logdet(2 * math.pi", "return -0.5 * torch.logdet(2 * math.pi"),
        ("KL of two Gaussians: log-determinants swapped",
         "torch.logdet(cov_p) - torch.logdet(cov)",
         "torch.logdet(cov) - torch.logdet(cov_p)"),
        ("importance weights: + log q",
         "log_w = log_joint(z) - log_normal_full(z, mean, cov)",
         "log_w = log_joint(z) + log_normal_full(z, mean, cov)"),
        ("score-function gradient: the half of log-variance forgotten", "0.5 * (eps**2 - 1)]", "(eps**2 - 1)]"),
    ],
    "notebooks/03_conv_vae.ipynb": [
        ("ELBO by hand: variance for the standard deviation",
         "kl = vh.gaussian_kl(q_z.base_dist.loc, 2 * q_z.base_dist.scale.log())\n    return recon, kl",
         "kl = vh.gaussian_kl(q_z.base_dist.loc, q_z.base_dist.scale.log())\n    return recon, kl"),
    ],
    "notebooks/05_cifar10.ipynb": [
        ("dequantization: levels spread over two intervals", "noisy = (levels + torch.rand_like(levels)) / 256",
         "noisy = (levels + 2 * torch.rand_like(levels)) / 256"),
        ("beta: the scale is not squared",
         "weighted = gradient(lambda output: Independent(Normal(output, scale), 3), 1 / scale**2)",
         "weighted = gradient(lambda output: Independent(Normal(output, scale), 3), 1 / scale)"),
    ],
    "notebooks/06_conditional_vae.ipynb": [
        ("mixture over labels: log of their number forgotten",
         "mixture = log_p.logsumexp(1) - math.log(number)",
         "mixture = log_p.logsumexp(1) - 2 * math.log(number)"),
        ("calibration: confidence and share right added", "abs(share - sure) for sure", "abs(share + sure) for sure"),
        ("label columns before the code", "F.pad(value, (0, more))", "F.pad(value, (more, 0))"),
    ],
}


def copy_project(folder: Path) -> None:
    names = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    if (ROOT / "data").is_dir():
        (folder / "data").symlink_to(ROOT / "data")


def plant(file: Path, right: str, wrong: str) -> bool:
    """Whether ``right`` stood in the code of ``file`` exactly once, where ``wrong`` stands now."""
    if file.suffix == ".py":
        text = file.read_text()
        file.write_text(text.replace(right, wrong))
        return text.count(right) == 1
    notebook = nbformat.read(file, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and right in cell.source]
    for cell in cells:
        cell.source = cell.source.replace(right, wrong)
    nbformat.write(notebook, file)
    return len(cells) == 1


def main() -> None:
    chosen = [(tests, *error) for tests, errors in ERRORS.items() for error in errors
              if not sys.argv[1:] or any(word in error[0] for word in sys.argv[1:])]
    survivors = 0
    print("| planted error | caught by |\n| --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        for tests, what, right, wrong in chosen:
            name = tests if tests.endswith(".ipynb") else "vae_helpers.py"
            if not plant(Path(folder) / name, right, wrong):
                sys.exit(f"{what}: {right!r} is not found in {name}, or not once; mend this script")
            run = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", tests], cwd=folder,
                                 capture_output=True, text=True, env={**os.environ, "VAE_BUDGET": "quick"})
            shutil.copy(ROOT / name, Path(folder) / name)
            shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)
            caught = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
            survivors += caught is None
            print(f"| {what} | {caught[1] if caught else '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
