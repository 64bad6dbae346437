"""fit: it learns, it is reproducible, it survives kills and bad files, it refuses what cannot work, and never lies."""

import linecache
import math
import os
import re
import subprocess
import sys
import types
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import numpy as np
import pytest
import torch
from models import TinyVAE
from torch import nn
from torch.distributions import Independent, Normal
from torchvision import transforms
from torchvision.transforms import v2


def fresh(seed=0, **arguments):
    torch.manual_seed(seed)
    return vh.ConvVAE(**{"channels": (4, 8), "hidden": 32, "latent_dim": 4, **arguments})


def tiny(seed=0):
    torch.manual_seed(seed)
    return TinyVAE()


def run(model, data, epochs=2, **arguments):
    return vh.fit(model, data, **{"epochs": epochs, "transform": torch.bernoulli, "progress": False, **arguments})


def linear(seed=0):
    """An autoencoder without noise, and the error that it is trained on."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.Linear(4, 784))


def squared_error(model, x, y):
    return (model(x) - x.flatten(1)).square().sum(1)


def equal(a, b):
    return all(torch.equal(u.cpu(), v.cpu()) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def some(few):
    """A single batch: an epoch takes milliseconds."""
    return replace(few, train=few.train[:64], test=few.test[:16])


@contextmanager
def refused(name, path, error=ValueError):
    """The checkpoint at ``path`` is refused for what ``name`` names, and left as it is."""
    content = path.read_bytes()
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert str(path) in message and re.search(rf"\b{re.escape(name)}\b", message.replace(str(path), "")), message
    assert path.read_bytes() == content


# ---------------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_elbo_passes_that_of_independent_pixels(digits, num_classes):
    model = fresh(num_classes=num_classes, hidden=64)
    history = run(model, digits, epochs=6, batch_size=32, lr=1e-2)
    rate = (digits.train.images.float() / 255).mean(0).clamp(1e-3, 1 - 1e-3)
    x, _ = digits.test.batch()
    baseline = -torch.distributions.Bernoulli(rate).log_prob(x).sum((1, 2, 3)).mean()
    assert history.test["loss"][-1] < baseline
    assert history.test["loss"][-1] < history.test["loss"][0]
    assert len(history.train["loss"]) == history.test["update"][-1] == 6 * math.ceil(1500 / 32)
    assert len(history.seconds) == len(history.test["recon"]) == 6
    for part in (history.train, history.test):
        assert all(math.isfinite(value) for values in part.values() for value in values)
        torch.testing.assert_close(torch.tensor(part["kl"]) - torch.tensor(part["recon"]), torch.tensor(part["loss"]))


def test_one_update_is_made_at_lr(some):
    model, reference = linear(), linear()
    x, y = some.train.batch()
    squared_error(reference, x, y).mean().backward()
    vh.fit(model, some, epochs=1, lr=1e-3, optimizer=torch.optim.SGD, loss=squared_error, bfloat16=False, progress=False)
    for before, after in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(after.cpu(), before - 1e-3 * before.grad, rtol=1e-4, atol=1e-6)


def test_one_epoch_of_100_pictures_learns(few):
    model = tiny()
    data = replace(few, train=few.train[:100])
    before = vh.evaluate(model, data.test)["loss"]
    assert run(model, data, epochs=1).test["loss"][0] < before - 5


def test_the_updates_follow_one_cycle_up_to_lr(few):
    rates = []

    class Noted(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            super().step(closure)

    vh.fit(linear(), few, epochs=10, batch_size=30, lr=1e-4, optimizer=Noted, loss=squared_error, progress=False)
    assert len(rates) == 100 and max(rates) == pytest.approx(1e-4, rel=1e-3)
    assert rates[0] < 1e-5 and rates[-1] < 1e-6


@pytest.mark.parametrize("bfloat16", [False, True])
def test_mixed_precision_when_it_is_asked_for(few, bfloat16):
    seen = []

    def loss(model, x, y):
        if model.training:
            seen.append(model[1](x.flatten(1)).dtype)
        return squared_error(model, x, y)

    history = vh.fit(linear(), few, epochs=1, loss=loss, bfloat16=bfloat16, progress=False)
    assert set(seen) == {torch.bfloat16 if bfloat16 else torch.float32}
    assert history.test["loss"][0] == pytest.approx(vh.evaluate(linear(), few.test, loss=squared_error)["loss"], rel=1)


# ------------------------------------------------------------------------------------- history, evaluate, negative_elbo


def test_the_history_is_that_of_evaluate(few):
    model = fresh()
    history = run(model, few)
    values = vh.evaluate(model, few.test)
    assert {name: held[-1] for name, held in history.test.items()} == {"update": 6, **values}


def test_a_new_history_is_empty_and_its_own():
    history = vh.History()
    history.train["loss"] = [1.0]
    assert vh.History() == vh.History(train={}, test={}, seconds=[], kept={})


def test_negative_elbo_is_what_elbo_says(few):
    model, (x, y) = tiny(), few.test.batch()
    with vh.seeded(3):
        recon, kl = vh.elbo(model, x, y)
    with vh.seeded(3):
        values = vh.negative_elbo(model, x, y)
    assert values.keys() == {"loss", "recon", "kl"}
    assert torch.equal(values["recon"], recon) and torch.equal(values["kl"], kl)
    assert torch.equal(values["loss"], kl - recon)


def test_evaluate_is_the_mean_over_the_whole_split(digits):
    model, split = linear(), digits.train[:1300]  # more than pass at once
    values = vh.evaluate(model, split, loss=lambda model, x, y: {"loss": squared_error(model, x, y), "label": y,
                                                                "seven": y == 7})
    with torch.no_grad():
        expected = squared_error(model, *split.batch()).double().mean()
    assert values["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert values["label"] == pytest.approx(float(split.labels.double().mean()))
    assert values["seven"] == pytest.approx(float((split.labels == 7).double().mean()))


def test_evaluate_follows_its_seed_and_leaves_the_random_state_the_modes_and_the_gradients(few):
    model = fresh().train()
    model.down.eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    first, again, other = (vh.evaluate(model, few.test, seed=seed) for seed in (0, 0, 1))
    assert first == again and first["loss"] != other["loss"]
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_held_out_values_come_from_the_test_split_alone(few):
    a, b = fresh(), fresh()
    left, right = run(a, few), run(b, replace(few, test=few.test[:50]))
    assert equal(a, b) and left.test != right.test


def test_a_loss_of_ones_own_and_what_on_epoch_returns_are_kept(few, tmp_path):
    def loss(model, x, y):
        error = squared_error(model, x, y)
        return {"loss": error, "half": error / 2}

    model = linear()
    arguments = {"epochs": 2, "loss": loss, "progress": False, "checkpoint": tmp_path / "a.pt",
                 "on_epoch": lambda model, epoch: torch.tensor([epoch])}
    for _ in range(2):  # trained, then loaded
        history = vh.fit(model, few, **arguments)
        assert {epoch: int(value) for epoch, value in history.kept.items()} == {0: 0, 1: 1, 2: 2}
        assert history.test["half"][-1] == pytest.approx(history.test["loss"][-1] / 2)


def test_truth_values_are_taken_as_numbers(some, tmp_path):
    def loss(model, x, y):
        return {"loss": squared_error(model, x, y), "even": y % 2 == 0, "label": y}

    history = vh.fit(linear(), some, epochs=2, loss=loss, progress=False, checkpoint=tmp_path / "run.pt")
    for part, labels in ((history.train, some.train.labels), (history.test, some.test.labels)):
        assert part["even"] == pytest.approx([float((labels % 2 == 0).float().mean())] * 2)
        assert part["label"] == pytest.approx([float(labels.float().mean())] * 2)


def test_a_parameter_that_on_epoch_returns_is_kept_as_it_was(some):
    history = run(fresh(), some, on_epoch=lambda model, epoch: next(model.parameters()))
    assert not torch.equal(history.kept[0], history.kept[2]) and not history.kept[0].requires_grad


def test_on_epoch_gets_the_model_in_eval_mode_and_the_stop_button_leaves_it_so(some):
    modes = []

    def stop(model, epoch):
        modes.append(model.training)
        if epoch == 2:
            raise KeyboardInterrupt

    model = fresh()
    with pytest.raises(KeyboardInterrupt):
        run(model, some, on_epoch=stop)
    assert modes == [False] * 3 and not model.training


def test_no_epochs(some):
    before, model = fresh(), fresh()
    assert run(model, some, epochs=0).train == {} and equal(before, model)


# ------------------------------------------------------------------------------------------------ batches and randomness


def test_equal_seeds_give_equal_weights_and_other_seeds_others(few):
    models = [fresh() for _ in range(4)]
    torch.manual_seed(1)
    run(models[0], few)
    torch.manual_seed(2)
    run(models[1], few)
    run(models[2], few, seed=1)
    assert equal(models[0], models[1]) and not equal(models[0], models[2])
    assert not equal(models[0], models[3])


@pytest.mark.parametrize("seed", [np.uint8(200), np.int32(5000), np.int64(7), 2**40])
def test_a_seed_counts_by_its_value(some, seed):
    a, b = tiny(), tiny()
    run(a, some, seed=seed)
    run(b, some, seed=int(seed))
    assert equal(a, b)


def test_fit_leaves_the_random_state_and_the_mode_of_distributions(few):
    torch.manual_seed(3)
    expected = torch.rand(2)
    model = fresh()
    torch.manual_seed(3)
    run(model, few)
    assert torch.equal(torch.rand(2), expected)
    with pytest.raises(ValueError):
        Normal(torch.tensor(math.nan), 1.0)


def numbered(few):
    """Labels that number the images; those of the test split go on where those of the training split end."""
    return replace(few, train=vh.Split(few.train.images, torch.arange(300)),
                   test=vh.Split(few.test.images, torch.arange(300, 400)))


def test_every_image_is_used_once_an_epoch_each_time_in_another_order(few):
    seen = []

    def loss(model, x, y):
        if model.training:
            seen.extend(y.tolist())
        return squared_error(model, x, y)

    vh.fit(linear(), numbered(few), epochs=2, batch_size=64, loss=loss, progress=False)
    first, second = seen[:300], seen[300:]
    assert sorted(first) == sorted(second) == list(range(300))
    assert first != list(range(300)) and first != second


def test_it_trains_in_train_mode_and_measures_in_eval_mode(few):
    modes = {}

    def loss(model, x, y):
        for number in y.tolist():
            modes.setdefault(number, []).append((model.training, model.down[2].training))
        return vh.negative_elbo(model, x, None)

    run(fresh().eval(), numbered(few), epochs=2, batch_size=100, loss=loss)
    assert all(modes[number][-2:] == [(True, True)] * 2 for number in range(300))
    assert all(set(modes[number]) == {(False, False)} for number in range(300, 400))


def test_a_last_batch_of_one_is_spread(few):
    assert len(run(fresh(), replace(few, train=few.train[:129]), epochs=1).train["loss"]) == 2  # BatchNorm refuses one


def test_labels_reach_a_model_that_takes_them_and_no_other(some):
    class Own(TinyVAE):
        def encode(self, x, y=None):
            assert y is not None and y.shape == (len(x),)
            return super().encode(x)

    run(Own(), some, epochs=1)
    run(fresh(), some, epochs=1)  # which raises when it is given labels


def test_transform_sees_float_training_batches_on_the_device_and_test_images_do_not(few):
    seen = []

    def transform(x):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1 and x.device.type == vh.device().type
        seen.append(x)
        return x.round()

    vh.fit(tiny(), few, epochs=2, transform=transform, progress=False)
    assert len(torch.cat(seen[-6:])) == 600, "three batches in each of two epochs"
    held_out = {image.numpy().tobytes() for image in few.test.batch()[0]}
    assert not held_out & {image.numpy().tobytes() for image in torch.cat(seen).cpu()}


# ------------------------------------------------------------------------------------------------------ progress, output


def test_it_says_nothing_but_from_where_it_goes_on(some, tmp_path, capsys):
    model, again = fresh(), fresh(seed=1)
    history = run(model, some, checkpoint=tmp_path / "deep/run.pt")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    loaded = run(again, some, checkpoint=tmp_path / "deep/run.pt")
    assert equal(model, again) and loaded == history
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "run.pt" in out and re.search(r"\b2\b", out), "one line, from which epoch"
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d", out), "and from when"


def test_progress_goes_to_stderr(some, capsys):
    vh.fit(tiny(), some, epochs=2, transform=torch.bernoulli)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err


# ----------------------------------------------------------------------------------------------------- stop, kill, resume


class Button:
    """A stop button that a loss looks at in each training batch; kept in a file, so that it is no part of the run."""

    def __init__(self, folder):
        self.file = folder / "button"

    def press_in_batch(self, number):
        self.file.write_text(str(number))

    def look(self):
        left = int(self.file.read_text()) - 1 if self.file.exists() else -1
        self.file.write_text(str(left))
        if left == 0:
            raise KeyboardInterrupt

    def loss(self, model, x, y):
        if model.training:
            self.look()
        return vh.negative_elbo(model, x, y)


@pytest.mark.parametrize("batch", [1, 2, 5, 7, 10])
def test_the_stop_button_passes_through_and_the_same_call_goes_on(few, tmp_path, capsys, batch):
    whole, model, other, button = fresh(), fresh(), fresh(seed=1), Button(tmp_path)
    arguments = {"epochs": 4, "loss": button.loss, "checkpoint": tmp_path / "run.pt"}
    reference = run(whole, few, **{**arguments, "checkpoint": None})
    button.press_in_batch(batch)
    with pytest.raises(KeyboardInterrupt):
        run(model, few, **arguments)
    assert capsys.readouterr().out == ""
    content = (tmp_path / "run.pt").read_bytes()
    final = run(model, few, **arguments)  # the same call, on the model as the stop left it
    assert re.search(rf"\b{(batch - 1) // 3}\b", capsys.readouterr().out), "the epochs that were whole"
    (tmp_path / "run.pt").write_bytes(content)
    again = run(other, few, **arguments)  # and on a model built anew
    assert equal(whole, model) and equal(whole, other)
    for history in (final, again):
        assert history.train == reference.train and history.test == reference.test


@pytest.mark.parametrize("where", ["evaluate", "on_epoch"])
def test_stopped_between_an_epoch_and_its_checkpoint(few, tmp_path, where):
    button, whole, model = Button(tmp_path), tiny(), tiny()

    def loss(model, x, y):
        if where == "evaluate" and not model.training and len(x) == len(few.test):
            button.look()
        return vh.negative_elbo(model, x, y)

    def on_epoch(model, epoch):
        if where == "on_epoch" and epoch == 2:
            button.look()

    arguments = {"epochs": 3, "loss": loss, "on_epoch": on_epoch, "checkpoint": tmp_path / "run.pt"}
    reference = run(whole, few, **{**arguments, "checkpoint": None})
    button.press_in_batch(3 if where == "evaluate" else 1)  # the trial of a batch measures data.test too
    with pytest.raises(KeyboardInterrupt):
        run(model, few, **arguments)
    final = run(model, few, **arguments)
    assert equal(whole, model) and final.train == reference.train and final.test == reference.test
    assert len(final.seconds) == 3


def test_a_weight_of_the_kl_in_a_buffer_goes_on_where_it_was(few, tmp_path):
    class Warm(TinyVAE):
        def __init__(self):
            super().__init__()
            self.register_buffer("beta", torch.zeros(()))

    def loss(model, x, y):
        terms = vh.negative_elbo(model, x, y)
        return {**terms, "loss": model.beta * terms["kl"] - terms["recon"], "beta": model.beta.expand(len(x))}

    def warm_up(model, epoch):
        model.beta.fill_(epoch / 4)

    def stopping(model, epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        warm_up(model, epoch)

    def build(seed=0):
        torch.manual_seed(seed)
        return Warm()

    whole, stopped, resumed = build(), build(), build(1)
    reference = run(whole, few, epochs=4, loss=loss, on_epoch=warm_up)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, few, epochs=4, loss=loss, on_epoch=stopping, checkpoint=tmp_path / "run.pt")
    final = run(resumed, few, epochs=4, loss=loss, on_epoch=warm_up, checkpoint=tmp_path / "run.pt")
    assert reference.test["beta"] == final.test["beta"] == [0.0, 0.25, 0.5, 0.75]
    assert equal(whole, resumed) and final.train == reference.train


def test_a_weight_of_the_kl_in_a_plain_attribute_is_not_lost_in_silence(some, tmp_path):
    def loss(model, x, y):
        terms = vh.negative_elbo(model, x, y)
        return {**terms, "loss": model.beta * terms["kl"] - terms["recon"]}

    def set_beta(model, epoch):
        model.beta = float(epoch)
        if epoch == 2:
            raise KeyboardInterrupt

    model, path = tiny(), tmp_path / "run.pt"
    model.beta = 0.0
    with pytest.raises(KeyboardInterrupt):
        run(model, some, loss=loss, on_epoch=set_beta, checkpoint=path)
    with refused("model", path):
        run(model, some, loss=loss, on_epoch=set_beta, checkpoint=path)


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tools!r})
import kill_fit
assert kill_fit.main(4) == 0

data, folder = kill_fit.vh.load_data("digits").binarize_test(), Path({folder!r})
data = kill_fit.vh.ImageData(data.train[:640], data.test[:100], data.classes, "digits", data.source)
for number in range(3):
    for together in ([("alone.pt", "alone")], [("run.pt", "first"), ("run.pt", "second")], [("run.pt", "again")]):
        for child in [kill_fit.start(data, folder / checkpoint, folder / weights) for checkpoint, weights in together]:
            assert os.waitpid(child, 0)[1] == 0
    assert all(kill_fit.same(folder / "alone", folder / name) for name in ("first", "second", "again"))
    assert {{file.name for file in folder.iterdir()}} == {{"alone", "alone.pt", "first", "second", "again", "run.pt"}}
    (folder / "run.pt").unlink()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments_and_two_at_once_the_weights_are_those_of_a_run_left_alone(tmp_path):
    code = KILLED.format(tools=str(vh.ROOT / "tests/tools"), folder=str(tmp_path))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.count("identical") == 4


# -------------------------------------------------------------------------------------------- what makes two runs differ


@pytest.mark.parametrize("name, changed", [
    ("epochs", {"epochs": 3}), ("seed", {"seed": 1}), ("lr", {"lr": 1e-3}), ("batch_size", {"batch_size": 32}),
    ("bfloat16", {"bfloat16": False}), ("transform", {"transform": torch.round}), ("transform", {"transform": None}),
    ("optimizer", {"optimizer": partial(torch.optim.SGD, momentum=0.9)}),
    ("optimizer", {"optimizer": partial(torch.optim.Adam, fused=True, betas=(0.5, 0.9))}),
    ("loss", {"loss": lambda model, x, y: vh.negative_elbo(model, x, y)})])
def test_other_arguments_are_refused_and_named(some, tmp_path, name, changed):
    path = tmp_path / "run.pt"
    binary = replace(some, train=vh.Split(some.train.images // 128 * 255, some.train.labels))
    run(tiny(), binary, checkpoint=path)
    with refused(name, path):
        run(tiny(), binary, **{"epochs": 2, "checkpoint": path, **changed})


@pytest.mark.parametrize("changed", [{"latent_dim": 5}, {"hidden": 16}, {"blocks": 1}, {"num_classes": 10}])
def test_another_model_is_refused(some, tmp_path, changed):
    run(fresh(), some, checkpoint=tmp_path / "run.pt", epochs=1)
    with refused("model", tmp_path / "run.pt"):
        run(fresh(**changed), some, checkpoint=tmp_path / "run.pt", epochs=1)


def test_another_parameter_activation_or_setting_of_a_layer_is_refused(some, tmp_path):
    class Own(TinyVAE):
        def __init__(self, layer, act=torch.tanh):
            super().__init__()
            self.decoder.insert(0, layer)
            self.act = act

    run(Own(nn.Dropout(0.1)), some, checkpoint=tmp_path / "run.pt")
    wider = Own(nn.Dropout(0.1))
    wider.own = nn.Parameter(torch.zeros(3))
    for model in (Own(nn.Dropout(0.2)), Own(nn.Tanh()), Own(nn.Dropout(0.1), torch.sigmoid), wider):
        with refused("model", tmp_path / "run.pt"):
            run(model, some, checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("name, change", [
    ("data.train", lambda data: replace(data, train=vh.Split(255 - data.train.images[:64], data.train.labels[:64]))),
    ("data.train", lambda data: replace(data, train=data.train[:63])),
    ("data.train", lambda data: replace(data, train=vh.Split(data.train.images, data.train.labels.roll(1)))),
    ("data.test", lambda data: replace(data, test=vh.Split(data.test.images, data.test.labels.flip(0)))),
    ("data.test", lambda data: replace(data, test=vh.Split(data.test.images.flip(3), data.test.labels)))])
def test_other_data_are_refused(some, tmp_path, name, change):
    run(tiny(), some, checkpoint=tmp_path / "run.pt")
    with refused(name, tmp_path / "run.pt"):
        run(tiny(), change(some), checkpoint=tmp_path / "run.pt")


def test_1000_of_3000_pictures_changed_are_refused(tmp_path):
    data = vh.load_data("photos").binarize_test()
    images = data.train.images[:3000, :, :4, :4].clone()
    before = replace(data, train=vh.Split(images, data.train.labels[:3000]), test=data.test[:10])
    before = replace(before, test=vh.Split(before.test.images[:, :, :4, :4], before.test.labels))
    images = images.clone()
    images[1000:2000] = 255 - images[1000:2000]
    after = replace(before, train=vh.Split(images, data.train.labels[:3000]))

    def loss(model, x, y):
        return (model(x) - x).square().sum((1, 2, 3))

    arguments = {"epochs": 1, "loss": loss, "batch_size": 3000, "progress": False, "checkpoint": tmp_path / "run.pt"}
    vh.fit(nn.Conv2d(3, 3, 1), before, **arguments)
    with refused("data.train", tmp_path / "run.pt"):
        vh.fit(nn.Conv2d(3, 3, 1), after, **arguments)


def read(folder, text, name="reader"):
    """The module ``name`` with this text, as a reader's program has it: its source can be had."""
    path = folder / f"{name}.py"
    path.write_text("from __future__ import annotations\n" + text)
    linecache.checkcache(str(path))
    module = types.ModuleType(name)
    module.__file__ = str(path)
    with patch.dict(sys.modules, {name: module}):
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
    return module


HEAD = """
import functools, math, types
from dataclasses import dataclass
from functools import partial
# OWN
import numpy as np
import torch
from torch import nn
import vae_helpers as vh

def scaled(model, x, y, by):
    return by * vh.negative_elbo(model, x, y)["loss"]

"""
LOSSES = """
## a global
BETA = ONE
def objective(model, x, y): return scaled(model, x, y, BETA)
## a tensor
BETA = torch.tensor([1.0, ONE])
def objective(model, x, y): return scaled(model, x, y, BETA[1])
## an array
BETA = np.array([1.0, ONE])
def objective(model, x, y): return scaled(model, x, y, BETA[1])
## an entry of a dict
CONFIG = {"beta": [1, ONE]}
def objective(model, x, y): return scaled(model, x, y, CONFIG["beta"][1])
## a setting in a namespace
CONFIG = types.SimpleNamespace(beta=ONE)
def objective(model, x, y): return scaled(model, x, y, CONFIG.beta)
## a setting in a dataclass
@dataclass
class Config:
    beta: float = 1.0
CONFIG = Config(ONE)
def objective(model, x, y): return scaled(model, x, y, CONFIG.beta)
## a setting in a dataclass with slots
@dataclass(slots=True)
class Config:
    beta: float = 1.0
CONFIG = Config(ONE)
def objective(model, x, y): return scaled(model, x, y, CONFIG.beta)
## an attribute of a class
class Config:
    beta = ONE
def objective(model, x, y): return scaled(model, x, y, Config.beta)
## its own text
def objective(model, x, y): return scaled(model, x, y, ONE)
## a helper
def weight(): return ONE
def objective(model, x, y): return scaled(model, x, y, weight())
## a helper of a helper
def weight(): return ONE
def twice(): return 2 * weight()
def objective(model, x, y): return scaled(model, x, y, twice())
## a helper called in a comprehension
def weight(k): return k * ONE
def objective(model, x, y): return scaled(model, x, y, sum([weight(k) for k in (1, 2)]))
## a helper called by a function inside
def weight(k): return k * ONE
def objective(model, x, y):
    def inner():
        return lambda: weight(2)
    return scaled(model, x, y, inner()())
## a default
def objective(model, x, y, beta=ONE): return scaled(model, x, y, beta)
## a default that needs its name
def objective(model, x, y, *, beta=ONE): return scaled(model, x, y, beta)
## a closure
def build(beta):
    def inner(model, x, y): return scaled(model, x, y, beta)
    return inner
objective = build(ONE)
## a partial
objective = partial(scaled, by=ONE)
## a partial in a closure
def build(loss): return lambda model, x, y: loss(model, x, y)
objective = build(partial(scaled, by=ONE))
## an object
class Loss:
    def __init__(self, beta): self.beta = beta
    def __call__(self, model, x, y): return scaled(model, x, y, self.beta)
objective = Loss(ONE)
## a private attribute of an object
class Loss:
    def __init__(self, beta): self._beta = beta
    def __call__(self, model, x, y): return scaled(model, x, y, self._beta)
objective = Loss(ONE)
## the method of an object
class Loss:
    def __call__(self, model, x, y): return scaled(model, x, y, ONE)
objective = Loss()
## the object of a method
class Loss:
    beta = 1
    def of(self, model, x, y): return scaled(model, x, y, self.beta)
holder = Loss()
holder.beta = ONE
objective = holder.of
## a static method
class Loss:
    @staticmethod
    def weight(): return ONE
    def __call__(self, model, x, y): return scaled(model, x, y, self.weight())
objective = Loss()
## a property
class Loss:
    @property
    def beta(self): return ONE
    def __call__(self, model, x, y): return scaled(model, x, y, self.beta)
objective = Loss()
## a cached property
class Loss:
    @functools.cached_property
    def beta(self): return ONE
    def __call__(self, model, x, y): return scaled(model, x, y, self.beta)
objective = Loss()
## a partial in a class
class Loss:
    of = staticmethod(partial(scaled, by=ONE))
    def __call__(self, model, x, y): return self.of(model, x, y)
objective = Loss()
## the func of an object in a class
class Loss:
    held = types.SimpleNamespace(func=0, by=ONE)
    def __call__(self, model, x, y): return scaled(model, x, y, self.held.by)
objective = Loss()
## a global in a class inside
BETA = ONE
def objective(model, x, y):
    class Inner:
        beta = BETA
    return scaled(model, x, y, Inner.beta)
## the base of a class
class Base:
    def weight(self): return ONE
class Loss(Base):
    def __call__(self, model, x, y): return scaled(model, x, y, self.weight())
objective = Loss()
## a lambda over several lines
objective = lambda model, x, y: scaled(
    model, x, y,
    ONE
)
## a decorator
def times(loss):
    @functools.wraps(loss)
    def inner(*arguments): return ONE * loss(*arguments)
    return inner
@times
def objective(model, x, y): return scaled(model, x, y, 1)
## a function under a decorator
def same(loss):
    @functools.wraps(loss)
    def inner(*arguments): return loss(*arguments)
    return inner
@same
def objective(model, x, y): return scaled(model, x, y, ONE)
## a cached helper
@functools.lru_cache
def weight(): return ONE
def objective(model, x, y): return scaled(model, x, y, weight())
## a built-in function
WEIGH = {1.0: math.exp, 2.0: math.cos}[ONE]
def objective(model, x, y): return scaled(model, x, y, WEIGH(0.5))
## a function of NumPy
WEIGH = {1.0: np.exp, 2.0: np.cos}[ONE]
def objective(model, x, y): return scaled(model, x, y, float(WEIGH(0.5)))
## a range
STEPS = range(int(ONE))
def objective(model, x, y): return scaled(model, x, y, len(STEPS))
## a distribution
P = torch.distributions.Normal(0.0, ONE)
def objective(model, x, y): return scaled(model, x, y, P.scale)
## another network
torch.manual_seed(int(ONE))
TEACHER = nn.Linear(1, 1)
def objective(model, x, y): return scaled(model, x, y, TEACHER.weight.item())
## a module of one's own
mine.beta = ONE
def objective(model, x, y): return scaled(model, x, y, mine.beta)
## a function of a module of one's own
mine.weight = lambda: ONE
def objective(model, x, y): return scaled(model, x, y, mine.weight())
"""
LOSSES = dict(part.split("\n", 1) for part in LOSSES.split("\n## ")[1:])  # ONE becomes 1.0, then 2.0


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_differs_in(kind, some, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"

    def objective(value):
        monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))
        return read(tmp_path, HEAD.replace("# OWN", "import mine") + LOSSES[kind].replace("ONE", str(value))).objective

    run(tiny(), some, epochs=1, loss=objective(1.0), checkpoint=path)
    run(tiny(), some, epochs=1, loss=objective(1.0), checkpoint=path)  # read anew, but the same: goes on
    with refused("loss", path):
        run(tiny(), some, epochs=1, loss=objective(2.0), checkpoint=path)


TRANSFORMS = {
    "a method of Tensor": (torch.Tensor.bernoulli, torch.Tensor.round),
    "a module": (v2.Compose([v2.RandomRotation(5), torch.bernoulli]), v2.Compose([v2.RandomRotation(15), torch.bernoulli])),
    "an older Compose": (transforms.Compose([transforms.RandomRotation(5), torch.bernoulli]),
                         transforms.Compose([transforms.RandomRotation(15), torch.bernoulli])),
    "a lambda in a module": (v2.Lambda(lambda x: torch.bernoulli(x / 2)),
                             v2.Lambda(lambda x: torch.bernoulli(x / 3))),
    "a partial": (partial(torch.clamp, max=0.0), partial(torch.clamp, min=1.0)),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_a_transform_that_differs_in(kind, some, tmp_path):
    path, (before, after) = tmp_path / "run.pt", TRANSFORMS[kind]
    for _ in range(2):
        run(tiny(), some, epochs=1, transform=before, checkpoint=path)
    with refused("transform", path):
        run(tiny(), some, epochs=1, transform=after, checkpoint=path)


MODEL = HEAD + """
class Own(vh.ConvVAE):
    FLOOR = 0.0

    def encode(self, x, y=None):
        return super().encode(x * 1.0 + self.FLOOR, y)
"""


@pytest.mark.parametrize("old, new", [("x * 1.0", "x * 0.5"), ("FLOOR = 0.0", "FLOOR = 0.1"),
                                      ("(vh.ConvVAE)", "(vh.ConvVAE, object)")])
def test_a_subclass_of_convvae_edited_between_two_calls_is_refused(some, tmp_path, old, new):
    def build(text):
        torch.manual_seed(0)
        return read(tmp_path, text).Own(channels=(4, 8), hidden=32, latent_dim=4)

    path = tmp_path / "run.pt"
    first = build(MODEL)
    run(first, some, epochs=1, checkpoint=path)
    resumed = build("# a comment that moves the class down\n\n" + MODEL)
    run(resumed, some, epochs=1, checkpoint=path)
    assert equal(first, resumed)
    with refused("model", path):
        run(build(MODEL.replace(old, new)), some, epochs=1, checkpoint=path)


def test_another_lambda_as_likelihood_is_refused(some, tmp_path):
    path = tmp_path / "run.pt"
    narrow = (lambda output: Independent(Normal(output, 0.1), 3), lambda colours: colours)
    wide = (lambda output: Independent(Normal(output, 0.2), 3), lambda colours: colours)
    for _ in range(2):
        run(fresh(likelihood=narrow), some, epochs=1, checkpoint=path)
    with refused("model", path):
        run(fresh(likelihood=wide), some, epochs=1, checkpoint=path)


def test_a_source_that_cannot_be_had_is_said_and_the_run_goes_on(some, tmp_path, capsys):
    path = tmp_path / "run.pt"
    for number, (text, names) in enumerate([
            ("def objective(model, x, y): return vh.negative_elbo(model, x, y)", {"vh": vh, "__name__": "__main__"}),
            ("def objective(model, x, y): return vh.negative_elbo(model, x, y)", {"vh": vh}),
            ("class Loss:\n    def __call__(self, model, x, y): return vh.negative_elbo(model, x, y)\nobjective = Loss()",
             {"vh": vh, "__name__": "__main__"})]):
        path = tmp_path / f"{number}.pt"
        exec(text, names)
        for _ in range(2):
            run(tiny(), some, epochs=1, loss=names["objective"], checkpoint=path)
            said = [line for line in capsys.readouterr().out.splitlines() if path.name not in line]
            assert len(said) == 1 and re.search(r"\bloss\b", said[0])
    run(tiny(), some, epochs=1, loss=names["objective"])
    run(fresh(), some, epochs=1, checkpoint=tmp_path / "known.pt")
    assert capsys.readouterr().out == "", "neither without a checkpoint nor where every source is known"


def test_a_dataclass_is_no_source_that_cannot_be_had(some, tmp_path, capsys):
    module = read(tmp_path, HEAD + LOSSES["a setting in a dataclass"].replace("ONE", "1.0"))
    run(tiny(), some, epochs=1, loss=module.objective, checkpoint=tmp_path / "run.pt")
    assert capsys.readouterr().out == ""


def test_what_does_not_change_the_run_goes_on(some, tmp_path, monkeypatch):
    text = HEAD + """
def objective(model, x, y):
    terms = vh.negative_elbo(model, x, y)
    return {"loss": terms["loss"].double().mean(dim=0, keepdim=True).expand(len(x)).float()}
other = ONE
"""
    path = tmp_path / "run.pt"
    arguments = {"epochs": 1, "checkpoint": path}
    run(tiny(), some, loss=read(tmp_path, text.replace("ONE", "1")).objective, **arguments)
    moved = read(tmp_path, "# moved\n" + text.replace("ONE", "2"))
    run(tiny(3), some, loss=moved.objective, on_epoch=lambda model, epoch: None, progress=True, **arguments)
    run(tiny(), replace(some, name="other", source="elsewhere"), loss=moved.objective, **arguments)
    run(tiny(), some, loss=moved.objective, seed=np.int64(0), batch_size=np.int32(128), lr=np.float64(3e-3),
        **{**arguments, "epochs": np.int64(1)})
    (tmp_path / "moved").mkdir()
    path.rename(tmp_path / "moved/other.pt")
    run(tiny(), some, loss=moved.objective, epochs=1, checkpoint=str(tmp_path / "moved/other.pt"))


@pytest.mark.parametrize("first, then", [(False, True), (True, False)])
def test_another_default_of_bfloat16_is_continued(some, tmp_path, monkeypatch, capsys, first, then):
    for fast in (first, then):  # as on a machine that is fast at it, and on one that is not
        for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, flag, lambda fast=fast: fast, raising=False)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *arguments, fast=fast, **named: fast)
        run(tiny(), some, checkpoint=tmp_path / "run.pt")
    assert "run.pt" in capsys.readouterr().out


def test_numbers_of_numpy_can_be_resumed(some, tmp_path, capsys):
    path = tmp_path / "run.pt"
    for epochs in (np.int64(1), 1):
        run(tiny(), some, epochs=epochs, lr=np.float64(1e-3), seed=np.int32(2), batch_size=np.int64(32), checkpoint=path)
    assert "run.pt" in capsys.readouterr().out


def test_an_object_with_slots_and_strings_of_numpy_are_no_obstacle(some, tmp_path):
    class Slots:
        __slots__ = ("beta", "unset")

    names, slots = np.array(["a", "b"]), Slots()
    slots.beta = 2.0

    def objective(model, x, y):
        assert names[0] == "a" and slots.beta
        return vh.negative_elbo(model, x, y)

    for _ in range(2):
        run(tiny(), some, epochs=1, loss=objective, checkpoint=tmp_path / "run.pt")


# ----------------------------------------------------------------------------------------------------- files and machine


@pytest.mark.parametrize("damage", ["half", "empty", "text", "foreign", "pickle"])
def test_bad_checkpoints_are_refused_and_left(some, tmp_path, damage):
    path = tmp_path / "run.pt"
    run(tiny(), some, checkpoint=path)
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"model": tiny().state_dict()}, path)
    elif damage == "pickle":
        torch.save(tiny(), path)
    else:
        path.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    content, model = path.read_bytes(), tiny()
    with pytest.raises(ValueError, match="run.pt"):
        run(model, some, checkpoint=path)
    assert path.read_bytes() == content and equal(model, tiny())


def test_a_checkpoint_in_the_home_folder(some, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    run(tiny(), some, checkpoint="~/run.pt")
    assert (tmp_path / "home/run.pt").is_file() and not list(Path().iterdir())


def test_a_checkpoint_that_cannot_be_written(some, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run.pt"):
        run(tiny(), some, checkpoint=tmp_path / "file/run.pt")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        run(tiny(), some, checkpoint=tmp_path)
    whole, model, path, save = tiny(), tiny(), tmp_path / "run.pt", torch.save
    reference = run(whole, some, epochs=3)
    run_so_far = []

    def full_in_epoch_2(state, file, *arguments, **options):
        run_so_far.append(path.read_bytes() if path.exists() else b"")
        if len(run_so_far) < 3:
            return save(state, file, *arguments, **options)
        with Path(file).open("wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_in_epoch_2)
        with pytest.raises(OSError, match=rf"{re.escape(str(path))}.*No space left on device"):
            run(model, some, epochs=3, checkpoint=path)
    assert path.read_bytes() == run_so_far[-1] and {file.name for file in tmp_path.iterdir()} == {"file", "run.pt"}
    assert run(model, some, epochs=3, checkpoint=path).train == reference.train and equal(model, whole)


def test_a_full_disk_spares_the_checkpoint_of_the_last_epoch(few, tmp_path, mount):
    disk, kept = mount("size=400k"), []
    whole, model = tiny(), tiny()
    reference = run(whole, few, epochs=3)

    def fill(model, epoch):
        if epoch == 2:
            kept.append((disk / "run.pt").read_bytes())
            (disk / "rest").write_bytes(bytes(400 * 1024 - len(kept[0]) - 16384))

    with pytest.raises(OSError, match=str(disk / "run.pt")):
        run(model, few, epochs=3, checkpoint=disk / "run.pt", on_epoch=fill)
    assert (disk / "run.pt").read_bytes() == kept[0] and {file.name for file in disk.iterdir()} == {"rest", "run.pt"}
    (disk / "rest").unlink()
    assert run(model, few, epochs=3, checkpoint=disk / "run.pt").train == reference.train and equal(model, whole)


def test_a_read_only_tree_is_named_before_any_work(few, mount):
    disk, model = mount("size=64k,ro"), tiny()
    with pytest.raises(OSError, match=rf"{disk / 'run.pt'}\b(?!\.\d+\.tmp)"):
        run(model, few, epochs=1, checkpoint=disk / "run.pt")
    assert equal(model, tiny()), "nothing was trained"


# ------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("bad", [lambda x: x / 0, lambda x: x * 1e30], ids=["NaN in a batch", "infinite loss"])
def test_a_bad_batch_stops_training_and_spares_weights_and_checkpoint(few, tmp_path, bad):
    left = [5 + 1]  # the trial of one batch, three of the first epoch, one of the second, and this one

    class Once:
        def __call__(self, x):
            left[0] -= 1
            return bad(x) if left[0] == 0 else x

    def loss(model, x, y):
        return squared_error(model, x, y).square()

    model = linear()
    with pytest.raises(FloatingPointError, match=r"loss.*\b5\b.*run.pt"):
        vh.fit(model, few, epochs=3, transform=Once(), loss=loss, progress=False, checkpoint=tmp_path / "run.pt")
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    assert kept["epoch"] == 1 and all(value.isfinite().all() for value in kept["model"].values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_finite_loss_with_a_gradient_of_nan_leaves_the_last_good_checkpoint(few, tmp_path):
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(784))
            self.register_buffer("epochs", torch.zeros(()))

    def loss(model, x, y):
        error = (x.flatten(1) * model.weight).square().sum(1)
        return error if model.epochs < 1 else error + (0 * error).sqrt()  # the root has an infinite slope at 0

    model, path = Rooted(), tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match="run.pt"):
        vh.fit(model, replace(few, train=few.train[:100]), epochs=3, loss=loss, progress=False, checkpoint=path,
               on_epoch=lambda model, epoch: model.epochs.fill_(epoch) and None)
    kept = torch.load(path, weights_only=True)
    assert kept["epoch"] == 1 and kept["model"]["weight"].isfinite().all()
    assert not model.weight.isfinite().any()


def test_a_weight_that_the_loss_does_not_show_is_looked_at_all_the_same(few, tmp_path):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.ones(784)), nn.Parameter(torch.zeros(()))

    def loss(model, x, y):
        return (x.flatten(1) * model.weight).square().sum(1) + (0 * model.other).sqrt() * 0  # its gradient is NaN

    with pytest.raises(FloatingPointError, match=r"\bother\b.*run.pt"):
        vh.fit(Unused(), few, epochs=3, optimizer=torch.optim.SGD, loss=lambda *arguments: loss(*arguments).nan_to_num(1.0),
               progress=False, checkpoint=tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 0


def test_a_buffer_that_is_not_finite_is_refused(some, tmp_path):
    def spoil(model, epoch):
        if epoch == 2:
            model.down[2].running_var.fill_(math.inf)

    with pytest.raises(FloatingPointError, match="running_var"):
        run(fresh(), some, epochs=3, checkpoint=tmp_path / "run.pt", on_epoch=spoil)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1


def test_an_infinite_held_out_loss_is_refused(few, tmp_path):
    def loss(model, x, y):
        error = squared_error(model, x, y)
        return error if model.training or len(x) < 100 or model[1].weight.grad is None else error / 0

    with pytest.raises(FloatingPointError, match=r"loss.*data\.test"):
        vh.fit(linear(), few, epochs=2, loss=loss, progress=False, checkpoint=tmp_path / "run.pt")
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 0


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("name, value", [
    ("epochs", -1), ("epochs", 1.5), ("batch_size", 0), ("batch_size", 1), ("lr", 0), ("lr", math.nan), ("lr", math.inf),
    ("lr", "fast"), ("seed", -1),
    ("optimizer", partial(torch.optim.Adam, lr=1e-9)),
    ("optimizer", partial(partial(torch.optim.SGD, lr=1e-9), momentum=0.9)),
    ("optimizer", lambda parameters, lr: torch.optim.Adam(parameters, lr=1e-9)),
    ("optimizer", lambda parameters, lr: torch.optim.Adam(parameters)),
    ("loss", lambda model, x, y: {"recon": x.sum((1, 2, 3))}),
    ("loss", lambda model, x, y: model.encode(x).mean.mean()),
    ("loss", lambda model, x, y: x),
    ("loss", lambda model, x, y: {"loss": model.encode(x).mean.sum(1), "kl": torch.ones(())}),
    ("loss", lambda model, x, y: 1.0),
    ("loss", lambda model, x, y: None),
    ("transform", lambda x: x[:, :, :20]),
    ("transform", lambda x: x)], ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_are_refused_before_any_work(few, tmp_path, name, value):
    model = fresh()
    # what a transform does to the images shows in x
    with pytest.raises(ValueError, match=rf"\b{name if name != 'transform' else 'x'}\b"):
        run(model, few, **{"checkpoint": tmp_path / "run.pt", name: value})
    assert not list(tmp_path.iterdir()) and equal(model, fresh())


def test_a_loss_without_a_gradient_is_refused_before_any_work(few, tmp_path):
    with pytest.raises(ValueError, match="gradient"):
        vh.fit(linear(), few, epochs=1, loss=lambda model, x, y: squared_error(model, x, y).detach(), progress=False,
               checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


def test_optimizers_that_take_lr_from_fit_are_taken(some):
    for optimizer in (partial(torch.optim.SGD, momentum=0.9), lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr)):
        run(tiny(), some, optimizer=optimizer)


def test_data_that_does_not_fit_is_refused_before_any_work(few, tmp_path):
    grey, colour = vh.load_data("digits"), vh.load_data("photos")
    eleven = vh.Split(few.test.images, few.test.labels + 1)
    for model, data, message in [(fresh(), grey, r"\bx\b.*Bernoulli"),
                                 (fresh(), replace(few, train=few.train[:0]), "data.train"),
                                 (fresh(), replace(few, test=few.test[:0]), "data.test"),
                                 (fresh(), colour, r"\bx\b.*1, 28, 28"),
                                 (fresh(num_classes=10), replace(few, test=eleven), r"\by\b")]:
        with pytest.raises(ValueError, match=message):
            run(model, data, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"\bx\b.*Bernoulli"):
        vh.fit(fresh(), few, epochs=1, progress=False)  # training batches left grey
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_model_without_independent_is_refused(some, tmp_path, method):
    model = tiny()
    whole = getattr(model, method)
    setattr(model, method, lambda *arguments: whole(*arguments).base_dist)
    with pytest.raises(ValueError, match="Independent"):
        run(model, some, checkpoint=tmp_path / "run.pt")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ torchrun

SCRIPT = '''
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import vae_helpers as vh
import torch
from torch import nn

KINDS = {{"one", "two", "three", "four", "five"}}  # a set of words has another order in every process
FOLDER = Path({folder!r})
exec("def one(): return 1.0")  # without a source, which is said
digits = vh.load_data("digits")
data = vh.ImageData(digits.train[:150], digits.test[:50], digits.classes, "few", "first digits")


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.Tanh(), nn.Linear(8, 784))


def loss(model, x, y):
    error = (model(x) - x.flatten(1)).square().sum(1)
    return {{"loss": error, "labels": y, "kinds": 0 * error + sum([one() for kind in KINDS if kind in {{"one", "two"}}])}}


def train(model, **options):
    settings = {{"epochs": 3, "batch_size": 49, "lr": 1e-2, "loss": loss, "bfloat16": False}}  # 1e-5 is finer than bfloat16
    return vh.fit(model, data, **settings | options)


def keep(name, model, history, rank):
    torch.save({{"model": model.state_dict(), "train": history.train, "test": history.test}}, FOLDER / f"{{name}}.{{rank}}")


def main():
    rank, first = int(os.environ["RANK"]), not (FOLDER / "whole.0").exists()

    def die(model, epoch):
        if first and epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    if first:
        try:
            train(build(), batch_size=1, checkpoint=FOLDER / "refused.pt")
        except ValueError as error:
            (FOLDER / f"refused.{{rank}}").write_text(str(error))
        model = build(rank)  # every process starts from the weights of the first
        keep("whole", model, train(model), rank)
    model = build(0 if first else 5)
    keep("resumed", model, train(model, checkpoint=FOLDER / "run.pt", on_epoch=die), rank)


if __name__ == "__main__":
    main()
'''


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_under_torchrun_train_as_one_and_go_on_when_they_are_killed(tmp_path, capsys):
    text = SCRIPT.format(root=str(vh.ROOT), folder=str(tmp_path))
    (tmp_path / "script.py").write_text(text)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    killed, resuming = (subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONHASHSEED": seed})
                        for seed in "12")
    assert killed.returncode != 0 and resuming.returncode == 0, resuming.stdout + resuming.stderr
    source, said = killed.stdout.splitlines(), resuming.stdout.splitlines()
    assert len(source) == 1 and re.search(r"\bloss\b", source[0]), "rank 0 alone"
    assert len(said) == 2 and said[0] == source[0] and "run.pt" in said[1] and re.search(r"\b1\b", said[1])
    for rank in (0, 1):
        assert re.search(r"\bbatch_size\b", (tmp_path / f"refused.{rank}").read_text())
    assert not (tmp_path / "refused.pt").exists()

    whole, resumed = ([torch.load(tmp_path / f"{name}.{rank}", weights_only=True) for rank in (0, 1)]
                      for name in ("whole", "resumed"))
    for kept in (*whole, *resumed):  # equal in both processes, and bit for bit after the kill
        assert all(torch.equal(kept["model"][name], value) for name, value in whole[0]["model"].items())
        assert kept["train"] == whole[0]["train"] and kept["test"] == whole[0]["test"]

    script = read(tmp_path, text, "alone")
    alone = script.build()
    history = script.train(alone, progress=False)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(whole[0]["model"][name], value.cpu(), rtol=0, atol=1e-5)
    for part, other in ((history.train, whole[0]["train"]), (history.test, whole[0]["test"])):
        assert part.keys() == other.keys()
        for name in part:
            assert part[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5)
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    assert checkpoint["epoch"] == 3 and checkpoint["history"]["train"] == whole[0]["train"]
