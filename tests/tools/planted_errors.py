"""Plants one error at a time in a copy of the project and runs tests on it: every error must make some test fail.

    .venv/bin/python tests/tools/planted_errors.py [-j 2] [word ...]
    .venv/bin/python tests/tools/planted_errors.py --places

Prints a table of the errors and the test that caught each; exits with 1 when one survives. Words choose the errors whose
description or test holds one of them. ``-j``: so many at once, each with one thread. ``--places`` runs no test and only
looks for the place of every error: seconds, and enough after a change of the code.

An error finds its place by the function that holds it and by the expression or statement that is right there, compared as
syntax trees: names matter, layout, quotes and comments do not. The place must be the only one.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import nbformat

ROOT = Path(__file__).resolve().parents[2]
SKIP_EVAL = ("_eval_mode(model)", "nullcontext(device())")  # the device alone, and every module as it is
TRAIN_SELF = ("_eval_mode(self)", "nullcontext(device())")
KL = "(mean**2 + log_var.exp() - 1 - log_var)"
SEED = ("fit", "torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))")
ERRORS = {  # what should notice -> what is wrong, the function, method or class that holds it, what is right, what is wrong
    "tests/test_settings.py": [
        ("budget: unset means quick", "budget", "os.environ.get('VAE_BUDGET') or 'standard'",
         "os.environ.get('VAE_BUDGET') or 'quick'"),
        ("pictures of short runs replace those that are shipped", "output_dir", "root / 'runs' / name", "root / name"),
        ("seeded: the seed is not set", "seeded", "torch.manual_seed(seed)", "None"),
        ("waiting threads spin", "", "os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')", "None"),
    ],
    "tests/test_data.py": [
        ("labels of the next image", "Split.batch", "self.labels.to(device)", "self.labels.roll(1).to(device)"),
        ("pixels over 256", "Split.batch", "self.images.to(device).float() / 255", "self.images.to(device).float() / 256"),
        ("embedded digits: names of the classes shifted by one", "_load_packaged",
         "ImageData(*splits, tuple('0123456789'), name, 'MNIST, 12,000 digits')",
         "ImageData(*splits, tuple('1234567890'), name, 'MNIST, 12,000 digits')"),
        ("test images binarized by a threshold", "ImageData.binarize_test",
         "torch.bernoulli(self.test.images.float() / 255, generator=generator)", "self.test.images.gt(127)"),
        ("official files: rows for columns", "_load_official",
         "x.view(*x.shape[:3], -1).permute(0, 3, 1, 2)",
         "x.view(*x.shape[:3], -1).permute(0, 3, 2, 1)"),
        ("official files: training and test images change places", "_load_official", "(True, False)", "(False, True)"),
        ("embedded digits: labels of the next image", "_load_packaged", "file[f'{half}_labels']",
         "np.roll(file[f'{half}_labels'], 1)"),
        ("a folder goes after a data set of its name", "load_data", "str(name) and folder.is_dir()",
         "str(name) and folder.is_dir() and not known"),
        ("pictures: not turned upright", "_decode", "ImageOps.exif_transpose(file)", "file.copy()"),
        ("pictures: 16 bits are clipped", "_decode", "values / top * 255", "values"),
        ("pictures: transparency on black", "_decode", "Image.new('RGBA', picture.size, 'white')",
         "Image.new('RGBA', picture.size, 'black')"),
        ("folder: hidden files are pictures", "_load_folder", "name.startswith('.')", "False"),
        ("folder: small classes have nothing to test", "_decode_all", "seen[label] % 10 == 1", "seen[label] % 10 == 9"),
        ("folder: the split forgets the class", "_decode_all", "seen[label] += 1", "seen[0] += 1"),
        ("folder: every label is 0", "_decode_all", "labels[half].append(label)", "labels[half].append(0)"),
        ("folder: the cache outlives a change of the pictures", "_load_folder",
         "(str(path), path.stat().st_size, path.stat().st_mtime_ns)", "str(path)"),
    ],
    "tests/test_likelihood.py": [
        ("Fréchet distance: of means alone", "frechet",
         "((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b) - 2 * root", "((a.mean(0) - b.mean(0)) ** 2).sum()"),
        ("Fréchet distance: the product of covariances without a root", "frechet",
         "np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0)).sum()", "np.linalg.eigvals(S_a @ S_b).real.clip(0).sum()"),
        ("KL: sign of the log-variance", "gaussian_kl", KL, "mean**2 + log_var.exp() - 1 + log_var"),
        ("KL: without the half", "gaussian_kl", f"0.5 * {KL}.sum(-1)", f"{KL}.sum(-1)"),
        ("KL: mean over latents for the sum", "gaussian_kl", f"{KL}.sum(-1)", f"{KL}.mean(-1)"),
        ("ELBO: KL of p and q swapped", "elbo", "kl_divergence(q_z, p_z)", "kl_divergence(p_z, q_z)"),
        ("ELBO: estimate of the KL has the other sign", "elbo", "q_z.log_prob(z) - p_z.log_prob(z)",
         "p_z.log_prob(z) - q_z.log_prob(z)"),
        ("ELBO: z is the mean, not a sample", "elbo", "q_z.rsample()", "q_z.mean"),
        ("ELBO: terms per pixel are accepted", "_per_image", "distribution.batch_shape != batch", "False"),
        ("grey pixels under Bernoulli are accepted", "_recon", "p_x.support.check(x).all()", "p_x.support.check(x).any()"),
        ("importance weight without its prior", "log_weights", "recon + _prior(model, z[0, 0]).log_prob(z)", "recon"),
        ("importance weight: + log q", "log_weights", "recon + _prior(model, z[0, 0]).log_prob(z) - q_z.log_prob(z)",
         "recon + _prior(model, z[0, 0]).log_prob(z) + q_z.log_prob(z)"),
        ("importance weight of a model's own terms: + kl", "log_weights", "recon - kl", "recon + kl"),
        ("importance weights: no gradient through z", "log_weights",
         "q_z.rsample((num_samples,))", "q_z.sample((num_samples,))"),
        ("importance weights: labels of other images", "log_weights",
         "y.repeat(num_samples)", "y.repeat_interleave(num_samples)"),
        ("importance weights: log K forgotten", "log_likelihood", "torch.stack(log_w).logsumexp(0) - math.log(num_samples)",
         "torch.stack(log_w).logsumexp(0)"),
        ("importance weights: mean of logarithms", "log_likelihood",
         "torch.stack(log_w).logsumexp(0)", "torch.stack(log_w).mean(0)"),
        ("importance weights: the last chunk is too long", "log_likelihood", "min(chunk, num_samples - done)", "chunk"),
        ("importance weights in train mode", "log_likelihood", *SKIP_EVAL),
        ("bits: nats not divided by log 2", "bits_per_dim", "-nats / (num_dims * math.log(2))", "-nats / num_dims"),
        ("levels: a bin half as wide", "DiscretizedLogistic.log_prob", "inverse / 510", "inverse / 1020"),
        ("levels: the edges have no tails", "DiscretizedLogistic.log_prob",
         "torch.where(value < 1 / 510, below, torch.where(value > 1 - 1 / 510, above, inside))", "inside"),
        ("levels: no exp of the scale", "DiscretizedLogistic.log_prob", "(-self.log_scale).exp()", "1 / self.log_scale"),
        ("levels: mean of the unclipped density", "DiscretizedLogistic.mean",
         "scale * (F.softplus(mean / scale) - F.softplus((mean - 1) / scale))", "mean"),
        ("levels: -1/255 is a level", "DiscretizedLogistic.Levels.check", "value >= 0", "value >= -1"),
        ("links: a colour linked to itself", "DiscretizedLogistic.given", "off.index_select(-3, before)",
         "off.index_select(-3, after)"),
        ("links: the mean forgets the colours before", "DiscretizedLogistic.mean",
         "1 if self.links is None else x.shape[-3]", "1"),
    ],
    "tests/test_model.py": [
        ("std = exp(log-variance)", "ConvVAE.encode", "0.5 * log_var.clamp(-14, 14)", "log_var.clamp(-14, 14)"),
        ("labels out of range are not noticed", "_check_labels", "y >= num_classes", "y > num_classes"),
        ("a residual block without its input", "Residual.forward", "x + super().forward(x)", "super().forward(x)"),
        ("a new residual block changes its input", "Residual.__init__", "nn.init.zeros_(parameter)", "None"),
        ("sample: prior of half the width", "ConvVAE.sample",
         "_prior(self, torch.empty(self.latent_dim, device=here)).sample((num_images,))",
         "0.5 * _prior(self, torch.empty(self.latent_dim, device=here)).sample((num_images,))"),
        ("sample: in train mode", "ConvVAE.sample", *TRAIN_SELF),
        ("reconstruct: in train mode", "ConvVAE.reconstruct", *TRAIN_SELF),
        ("reconstruct: from a draw", "ConvVAE.reconstruct", "self.encode(x, y).mean", "self.encode(x, y).sample()"),
        ("eval mode: every module trains afterwards", "_eval_mode", "module.training = training", "module.training = True"),
        ("encode_all: variance for the standard deviation", "encode_all", "q_z.stddev.cpu()", "q_z.variance.cpu()"),
        ("kl_per_dim: sum over images", "kl_per_dim",
         "kl_divergence(Normal(*encode_all(model, split)), Normal(0.0, 1.0)).mean(0)",
         "kl_divergence(Normal(*encode_all(model, split)), Normal(0.0, 1.0)).sum(0)"),
        ("mean_images: in train mode", "mean_images", *SKIP_EVAL),
        ("weights: unpickled", "_read", "torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)",
         "torch.load(path, map_location='cpu', weights_only=False, mmap=mmap)"),
        ("weights: left in train mode", "load_weights", "model.eval().to(device())", "model.train().to(device())"),
    ],
    "tests/test_fit.py": [
        ("loss: + recon", "negative_elbo", "kl - recon", "kl + recon"),
        ("loss: averaged over the batch is accepted", "_named", "shape != (count,)", "len(shape) > 1"),
        ("fit: trains in eval mode", "fit", "model.train()", "None"),
        ("fit: trains on test images", "fit", "data.train[indices.tensor_split(world)[rank]]",
         "data.test[indices % len(data.test)]"),
        ("fit: images in the same order in every epoch", "fit", "torch.randperm(len(data.train))",
         "torch.arange(len(data.train))"),
        ("fit: the seed is not set", *SEED, "torch.seed()"),
        ("resume forgets the random state", *SEED, "None"),
        ("fit: the same random numbers in every epoch", *SEED, "torch.manual_seed(seed)"),
        ("fit: gradients pile up", "fit", "opt.zero_grad()", "None"),
        ("fit: the learning rate never falls", "fit", "schedule.step()", "None"),
        ("fit: transform is forgotten", "fit", "x if transform is None else transform(x)", "x"),
        ("fit: one batch too many", "fit", "math.ceil(len(data.train) / batch_size)",
         "math.ceil(len(data.train) / batch_size) + 1"),
        ("fit: one update trains at nearly 0", "fit", "updates > 1", "updates > 0"),
        ("fit: an lr of the optimizer's own", "_check_fit", "group['lr'] != lr", "False"),
        ("fit: NaN weights are saved", "fit",
         "_refuse_nan(model.state_dict(), f'after epoch {epoch}', checkpoint)", "None"),
        ("fit: an infinite loss on test images passes", "fit",
         "_refuse_nan({'loss': values['loss']}, f'on data.test after epoch {epoch}', checkpoint)", "None"),
        ("fit: what on_epoch returned changes later", "fit",
         "torch.as_tensor(kept).detach().to('cpu', copy=True)", "kept.detach()"),
        ("history: epochs for updates", "fit", "epoch * batches", "epoch"),
        ("resume forgets the optimizer", "fit", "{'model': model, 'optimizer': opt, 'schedule': schedule}",
         "{'model': model, 'schedule': schedule}"),
        ("resume forgets the schedule", "fit", "{'model': model, 'optimizer': opt, 'schedule': schedule}",
         "{'model': model, 'optimizer': opt}"),
        ("resume repeats the last epoch", "_resume", "(run, History(**state['history']), state['epoch'])",
         "(run, History(**state['history']), max(0, state['epoch'] - 1))"),
        ("resume takes the checkpoint of another run", "_resume", "before.get(name) != run.get(name)", "False"),
        ("resume takes that of another loss", "_fingerprint", "inspect.getsource(thing.__code__)", "''"),
        ("resume takes that of a loss whose globals changed", "_fingerprint",
         "{part: scope[part] for part in named & scope.keys()}", "{}"),
        ("checkpoint is written in place", "_writing", "path.with_name(f'{path.name}.{os.getpid()}.tmp')", "path"),
        ("evaluate: mean of the means of batches", "evaluate", "float(value.cpu().sum(dtype=torch.float64))",
         "float(value.mean(dtype=torch.float64)) * 1000"),
        ("evaluate: other samples each time", "evaluate", "seeded(seed)", "torch.no_grad()"),
        ("evaluate: in train mode", "evaluate", *SKIP_EVAL),
        ("two processes: both train on the same share", "fit", "indices.tensor_split(world)[rank]",
         "indices.tensor_split(world)[0]"),
        ("two processes: half the gradient", "fit", "world / len(indices)", "1 / len(indices)"),
    ],
    "tests/test_pictures.py": [
        ("pictures: uint8 shown as white", "show_images", "255 if images.dtype == torch.uint8 else 1", "1"),
        ("table: a row of another length", "table", "len(row) != len(head)", "False"),
        ("slant: the other way", "slant", "-(share * down * right).sum((1, 2))", "(share * down * right).sum((1, 2))"),
    ],
    "tests/test_explorer.py": [
        ("explorer: latents in the wrong order", "LatentExplorer.__init__", "kl.argsort(descending=True)", "kl.argsort()"),
        ("explorer: sliders turned round", "LatentExplorer.__init__", "self.sliders[dim].value", "-self.sliders[dim].value"),
        ("explorer: plane of the smallest variance", "Map.__init__",
         "torch.linalg.eigh(means.T.cov(correction=0)).eigenvectors[:, -2:]",
         "torch.linalg.eigh(means.T.cov(correction=0)).eigenvectors[:, :2]"),
        ("explorer: a walk through the middle of the line", "LatentExplorer._step",
         "arc if angle.sin() > 1e-3 else torch.lerp(a, b, t)", "torch.lerp(a, b, t)"),
        ("explorer: the label stays at 0", "LatentExplorer.encode", "int(part.labels[0])", "0"),
        ("explorer: draws of N(0, I) where the prior is another", "LatentExplorer._sample", "own is not None", "False"),
    ],
    "tests/test_ladder.py": [
        ("ladder: the posterior forgets the mean of the prior", "Level.posterior", "p_z.mean + p_z.stddev * change.mean",
         "p_z.stddev * change.mean"),
        ("ladder: a sampled KL of the wrong sign", "Ladder.terms", "q_z.log_prob(z) - p_z.log_prob(z)",
         "p_z.log_prob(z) - q_z.log_prob(z)"),
        ("ladder: one level kept too many", "Ladder.reconstruct", "i < keep", "i <= keep"),
        ("ladder: every class gets the features of the first", "Ladder.top", "self.start[y]", "self.start[0 * y]"),
        ("free bits: given in evaluation as well", "free_bits", "model.training", "True"),
        ("free bits: nothing is free", "free_bits", "FREE.get(size, 0)", "0"),
    ],
    "tests/test_at_work.py": [
        ("bits-back: the prior of z twice as wide", "prior", "float(STEPS)", "2.0 * STEPS"),
        ("bits-back: q(z|x) is not pushed back", "pop", "stack.encode_reverse(z, LATENTS, *posterior(model, x))", "None"),
        ("bits-back: images in the order of the stack", "read", "[pop(stack, network) for _ in range(count)][::-1]",
         "[pop(stack, network) for _ in range(count)]"),
        ("bits-back: the checksum is not looked at", "read", "hashlib.sha256(content).digest() != digest", "False"),
        ("bits-back: any model may read a file", "read", "maker != fingerprint(model)", "False"),
        ("bits-back: the model keeps its mode", "exact", "network.double().eval()",
         "network.double()"),
    ],
    "tests/test_codes.py": [
        ("beta: NaN passes", "beta_loss", "not 0 <= beta < math.inf", "beta < 0 or beta == math.inf"),
        ("beta weighs both terms", "beta_loss", "beta * kl - recon", "beta * (kl - recon)"),
        ("codebook: no vector is dead", "Codebook.follow", "(self.n < 0.1 * fair) & self.restart", "self.n < 0"),
        ("codebook: it moves in evaluation as well", "Codebook.forward", "self.training", "True"),
        ("straight-through: no gradient", "straight_through", "h + (z - h).detach()", "z.detach() + 0 * h"),
        ("prior of codes: a place sees the next", "CodePrior.forward", "self.body(h + self.place[:h.shape[1]], mask=mask, "
         "is_causal=True)", "self.body(h + self.place[:h.shape[1]])"),
    ],
    "notebooks/06_conditional_vae.ipynb": [
        ("mixture over labels: log of their number forgotten", "", "log_p.logsumexp(1) - math.log(K)",
         "log_p.logsumexp(1) - 2 * math.log(K)"),
        ("calibration: confidence and share right added", "",
         "confidence[bins == b].mean() - (guess == y)[bins == b].float().mean()",
         "confidence[bins == b].mean() + (guess == y)[bins == b].float().mean()"),
    ],
    "notebooks/09_vaes_at_work.ipynb": [
        ("M2: log p(y) forgotten", "bound_without_label", "math.log(elbos.shape[1])", "0"),
        ("posterior of a part: the KL forgotten", "fit_posterior", "kl_divergence(q_z, p_z)", "0"),
        ("context model: it sees its own pixel", "contexts", "(2, 1)", "(2, 2)"),
    ],
    "notebooks/10_other_codes.ipynb": [
        ("gap: the best latent against the worst", "gap", "ranked[:, -2]", "ranked[:, 0]"),
        ("rotation: the codes stay", "rotated", "q_z.mean @ U.T", "q_z.mean"),
        ("perplexity: the entropy in place of its exponential", "perplexity",
         "float((-torch.xlogy(share, share).sum()).exp())", "float(-torch.xlogy(share, share).sum())"),
    ],
}


class Error(NamedTuple):
    tests: str
    what: str
    where: str
    right: str
    wrong: str

    @property
    def file(self) -> str:
        """What the error is planted in."""
        if self.tests.endswith(".ipynb"):
            return self.tests
        return {"tests/test_explorer.py": "notebooks/explorer.py", "tests/test_ladder.py": "notebooks/ladder.py",
                "tests/test_at_work.py": "notebooks/bits_back.py",
                "tests/test_codes.py": "notebooks/10_other_codes.ipynb"}.get(self.tests, "vae_helpers.py")


class PlaceError(ValueError):
    """The place of an error is not there, or not the only one."""


parsed = lru_cache(maxsize=4)(ast.parse)


def definitions(tree: ast.AST, where: str) -> list[ast.AST]:
    """Every function or class in ``tree`` of the qualified name ``where``; the whole tree for ""."""
    found = [tree]
    for name in filter(None, where.split(".")):
        found = [node for outer in found for node in ast.walk(outer) if node is not outer and isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name == name]
    return found


def replacements(source: str, where: str, right: str, wrong: str) -> list[str]:
    """``source`` with ``wrong`` in place of ``right``, once for each place inside ``where``."""
    (statement,) = ast.parse(right).body
    expression = isinstance(statement, ast.Expr)
    pattern = statement.value if expression else statement
    right = ast.dump(pattern)
    places = {(node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
              for scope in definitions(parsed(source), where) for node in ast.walk(scope)
              if type(node) is type(pattern) and ast.dump(node) == right}
    lines, results = source.encode().splitlines(keepends=True), []
    for first, column, last, end in sorted(places):
        text = f"({wrong})" if expression else textwrap.indent(wrong, " " * column).lstrip()
        changed = lines[:first - 1] + [lines[first - 1][:column], text.encode(), lines[last - 1][end:]] + lines[last:]
        results.append(b"".join(changed).decode())
        ast.parse(results[-1])
    return results


def plant(error: Error, file: Path) -> None:
    """Writes the error into ``file``, a module or a notebook. Raises PlaceError where its place is not there just once."""
    if file.suffix == ".py":
        found = replacements(file.read_text(encoding="utf-8"), error.where, error.right, error.wrong)
        if len(found) == 1:
            file.write_text(found[0], encoding="utf-8")
    else:
        notebook, found = nbformat.read(file, as_version=4), []
        for cell in notebook.cells:
            if cell.cell_type == "code" and not re.search(r"^\s*[%!]", cell.source, re.M):  # those only IPython can parse
                found += [(cell, text) for text in replacements(cell.source, error.where, error.right, error.wrong)]
        if len(found) == 1:
            found[0][0].source = found[0][1]
            nbformat.write(notebook, file)
    if len(found) != 1:
        raise PlaceError(f"{error.what}: {len(found)} times in {error.where or 'the code'} of {error.file}: {error.right}")


@contextmanager
def planted(error: Error, folder: Path):
    """The project in ``folder`` has the error inside the block, and is whole after it."""
    file = folder / error.file
    whole = file.read_bytes()
    plant(error, file)
    try:
        yield
    finally:
        file.write_bytes(whole)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def copy_project(folder: Path) -> None:
    """What git knows or would add, with links to the data sets; what is decoded from them is written in the copy."""
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                           capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for path in [*(ROOT / "data").glob("*"), *(ROOT / "data/cache").glob("*")]:
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if path.name != "cache":
            link.symlink_to(path)


def failing_test(folder: Path, tests: str) -> str | None:
    """The first test of ``tests`` that fails in the project in ``folder``; None when all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", tests]
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900,
                             env={**os.environ, "VAE_BUDGET": "quick"})
    except subprocess.TimeoutExpired:
        return "no end within 15 minutes"
    failed = re.search(r"^(?:FAILED|ERROR) ([^\s[]+)", run.stdout, re.M)
    if run.returncode < 0:
        return f"pytest ended by signal {-run.returncode}"
    if run.returncode and not failed:
        raise RuntimeError(f"pytest {tests} ended with status {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return failed[1] if failed else None


def try_places(errors: list[Error]) -> int:
    """Plants every error without a test; returns how many found no place, and prints them."""
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        for error in errors:
            try:
                with planted(error, Path(folder)):
                    pass
            except PlaceError as problem:
                lost += 1
                print(problem)
    print(f"{len(errors) - lost} of {len(errors)} places found")
    return lost


def try_all(errors: list[Error], at_once: int) -> int:
    """Plants every error and runs its tests; returns how many survived, and prints a table."""
    survivors = 0
    with tempfile.TemporaryDirectory() as top, ThreadPoolExecutor(at_once) as pool:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(at_once):
            copy_project(Path(top) / str(number))
            folders.put(Path(top) / str(number))

        def noticed(error: Error | str) -> str | None:
            """What notices the error; of a test file alone, what fails without any."""
            folder = folders.get()
            try:
                with nullcontext() if isinstance(error, str) else planted(error, folder):
                    return failing_test(folder, error if isinstance(error, str) else error.tests)
            finally:
                folders.put(folder)

        files = sorted({error.tests for error in errors})
        for tests, failed in zip(files, pool.map(noticed, files), strict=True):
            if failed:
                sys.exit(f"without any planted error, {tests} fails: {failed}")
        print("| planted error | caught by |\n| --- | --- |", flush=True)
        for error, caught in zip(errors, pool.map(noticed, errors), strict=True):
            survivors += caught is None
            print(f"| {error.what} | {caught or '**nothing**'} |", flush=True)
    print(f"\n{len(errors) - survivors} of {len(errors)} caught")
    return survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only errors whose description or test holds one of them")
    parser.add_argument("-j", type=int, default=1, help="errors tried at once, each with one thread where there are several")
    parser.add_argument("--places", action="store_true", help="only look for the place of every error")
    options = parser.parse_args()
    chosen = [Error(tests, *entry) for tests, entries in ERRORS.items() for entry in entries
              if not options.words or any(word in f"{entry[0]} {tests}" for word in options.words)]
    if options.j > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(bool(try_places(chosen) if options.places else try_all(chosen, options.j)))


if __name__ == "__main__":
    main()
