"""fit: it learns, it is reproducible, it survives kills and bad files, and it refuses what cannot work."""

import math
import os
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from models import TinyVAE
from torch import nn

import vae_helpers as vh


def fresh(seed=0, **arguments):
    torch.manual_seed(seed)
    return vh.ConvVAE(channels=(4, 8), hidden=32, latent_dim=4, **arguments)


def run(model, data, epochs=2, **arguments):
    return vh.fit(model, data, epochs=epochs, transform=torch.bernoulli, progress=False, **arguments)


def with_parameter(size):
    model = fresh()
    model.own = torch.nn.Parameter(torch.zeros(size))
    return model


def equal(a, b):
    return all(torch.equal(u.cpu(), v.cpu()) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_elbo_passes_that_of_independent_pixels(digits, num_classes):
    model = fresh(num_classes=num_classes)
    history = run(model, digits, epochs=15, batch_size=32)
    rate = (digits.train.images.float() / 255).mean(0).clamp(1e-3, 1 - 1e-3)
    x, _ = digits.test.batch()
    baseline = -torch.distributions.Bernoulli(rate).log_prob(x).sum((1, 2, 3)).mean()
    assert history.test["loss"][-1] < baseline
    assert history.test["loss"][-1] < history.test["loss"][0]
    assert len(history.train["loss"]) == history.test["update"][-1] == 15 * math.ceil(1500 / 32)
    assert len(history.seconds) == len(history.test["recon"]) == 15
    for part in (history.train, history.test):
        assert all(math.isfinite(value) for values in part.values() for value in values)
        torch.testing.assert_close(torch.tensor(part["kl"]) - torch.tensor(part["recon"]), torch.tensor(part["loss"]))


def test_the_history_is_that_of_evaluate(few):
    model = fresh()
    history = run(model, few)
    assert vh.evaluate(model, few.test)["loss"] == history.test["loss"][-1]


def test_held_out_values_come_from_the_test_split_alone(few):
    other = vh.ImageData(few.train, few.test[:50], few.classes, few.name, few.source)
    a, b = fresh(), fresh()
    left, right = run(a, few), run(b, other)
    assert equal(a, b) and left.test != right.test


def test_equal_seeds_give_equal_weights_and_other_seeds_others(few):
    models = [fresh() for _ in range(4)]
    torch.manual_seed(1)
    run(models[0], few)
    torch.manual_seed(2)
    run(models[1], few)
    run(models[2], few, seed=1)
    assert equal(models[0], models[1]) and not equal(models[0], models[2])
    assert not equal(models[0], models[3])


def test_fit_leaves_the_random_state_and_the_mode_of_distributions(few):
    torch.manual_seed(3)
    expected = torch.rand(2)
    model = fresh()
    torch.manual_seed(3)
    run(model, few)
    assert torch.equal(torch.rand(2), expected)
    with pytest.raises(ValueError):
        torch.distributions.Normal(torch.tensor(math.nan), 1.0)


def test_every_epoch_has_an_order_of_its_own(few):
    seen = []

    def keep(x):
        seen.append(float(x.sum()))
        return torch.bernoulli(x)

    vh.fit(fresh(), few, epochs=2, batch_size=100, transform=keep, progress=False)
    assert len(seen) == 7 and seen[1:4] != seen[4:], "the check before training, then two epochs of three batches"


def test_it_trains_in_train_mode_and_measures_in_eval_mode(few):
    modes = []

    def loss(model, x, y):
        modes.append(model.training)
        return vh.negative_elbo(model, x, y)

    run(fresh().eval(), few, epochs=1, batch_size=100, loss=loss)
    assert modes == [True, False, True, True, True, False], "first the check before training, then three batches"


def test_every_image_is_used_once_an_epoch(few):
    seen = []

    def loss(model, x, y):
        seen.extend(y.tolist())
        return model(x).square().sum(1)

    data = vh.ImageData(vh.Split(few.train.images, torch.arange(300)), few.test, few.classes, "a", "b")
    vh.fit(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)), data, epochs=1, batch_size=64, loss=loss, progress=False)
    epoch = seen[60 + 2:][:300]  # after the check of the smallest batch and of two test images
    assert sorted(epoch) == list(range(300)) and epoch != list(range(300))


def test_a_last_batch_of_one_is_spread(few):
    data = vh.ImageData(few.train[:129], few.test, few.classes, "a", "b")
    assert len(run(fresh(), data, epochs=1).train["loss"]) == 2  # BatchNorm refuses a batch of one


def test_labels_reach_a_model_that_takes_them_and_no_other(few):
    class Own(TinyVAE):
        def encode(self, x, y=None):
            assert y is not None and y.shape == (len(x),)
            return super().encode(x)

    run(Own(), few, epochs=1)
    run(fresh(), few, epochs=1)


def test_transform_sees_float_batches_and_test_images_do_not(few):
    calls = []

    def transform(x):
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        calls.append(len(x))
        return x.round()

    vh.fit(TinyVAE(), few, epochs=1, transform=transform, progress=False)
    assert sum(calls) == 100 + 300  # the check before training, and an epoch


def test_a_loss_of_ones_own_and_what_on_epoch_returns_are_kept(few, tmp_path):
    def loss(model, x, y):
        error = (model(x) - x.flatten(1)).square().sum(1)
        return {"loss": error, "half": error / 2}

    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 784))
    arguments = {"epochs": 2, "loss": loss, "progress": False, "checkpoint": tmp_path / "a.pt",
                 "on_epoch": lambda model, epoch: torch.tensor([epoch])}
    for _ in range(2):  # trained, then loaded
        history = vh.fit(model, few, **arguments)
        assert {epoch: int(value) for epoch, value in history.kept.items()} == {0: 0, 1: 1, 2: 2}
        assert history.test["half"][-1] == pytest.approx(history.test["loss"][-1] / 2)


def test_a_parameter_that_on_epoch_returns_is_kept_as_it_was(few):
    history = run(fresh(), few, on_epoch=lambda model, epoch: next(model.parameters()))
    assert not torch.equal(history.kept[0], history.kept[2])


def test_on_epoch_may_only_return_tensors(few, tmp_path):
    with pytest.raises(TypeError, match="on_epoch returned a list; it must return a Tensor or None"):
        run(fresh(), few, checkpoint=tmp_path / "run.pt", on_epoch=lambda model, epoch: [epoch])
    assert not list(tmp_path.iterdir())


def test_no_epochs(few):
    before, model = fresh(), fresh()
    assert run(model, few, epochs=0).train == {} and equal(before, model)


def test_a_finished_run_is_loaded_at_once(few, tmp_path, capsys):
    model, again = fresh(), fresh(seed=1)
    history = run(model, few, checkpoint=tmp_path / "deep/run.pt")
    assert capsys.readouterr().out == ""
    loaded = run(again, few, checkpoint=tmp_path / "deep/run.pt")
    assert equal(model, again) and loaded == history
    assert capsys.readouterr().out == "run.pt: finished, loaded\n"


class Stop:
    """A transform that presses the stop button at one batch."""

    def __init__(self, at):
        self.left = at

    def __call__(self, x):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return torch.bernoulli(x)

    def __repr__(self):
        return "Stop"


@pytest.mark.parametrize("at", [2, 3, 6, 8, 11])
def test_the_stop_button_keeps_model_and_history_and_the_same_call_goes_on(few, tmp_path, capsys, at):
    whole, stopped, resumed = fresh(), fresh(), fresh(seed=1)
    arguments = {"epochs": 4, "progress": False, "checkpoint": tmp_path / "run.pt"}
    reference = vh.fit(whole, few, **{**arguments, "checkpoint": None}, transform=Stop(0))
    history = vh.fit(stopped, few, **arguments, transform=Stop(at))  # the first call is the check before training
    assert "stopped in epoch" in capsys.readouterr().out
    assert len(history.train.get("loss", [])) == at - 2 and len(history.seconds) == (at - 2) // 3
    assert not equal(stopped, fresh()) or at == 2
    final = vh.fit(resumed, few, **arguments, transform=Stop(0))
    assert f"going on after epoch {(at - 2) // 3}" in capsys.readouterr().out
    assert equal(whole, resumed) and final.train == reference.train and final.test == reference.test


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs fork and SIGKILL")
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same():
    out = subprocess.run([sys.executable, vh.ROOT / "tests/kill_fit.py", "8"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.count("identical") == 8


def test_another_configuration_is_refused_and_named(few, digits, tmp_path):
    path = tmp_path / "run.pt"
    run(fresh(), few, checkpoint=path)
    content = path.read_bytes()
    wider = vh.ConvVAE(channels=(4, 8), hidden=32, latent_dim=5)
    for model, data, changed, message in [
            (fresh(), few, {"epochs": 3}, "its epochs is 2, here it is 3"),
            (fresh(), few, {"seed": 1}, "its seed is 0, here it is 1"),
            (fresh(), few, {"lr": 1e-3}, "its lr is 0.003, here it is 0.001"),
            (fresh(), few, {"optimizer": partial(torch.optim.SGD, momentum=0.9)}, "its optimizer is .*Adam.*SGD"),
            (fresh(), few, {"loss": lambda model, x, y: vh.negative_elbo(model, x, y)}, "its loss is negative_elbo.*lambda"),
            (fresh(), digits, {}, "its data is few .*digits"),
            (wider, few, {}, "its model is .*latent_dim=4.*latent_dim=5"),
            (with_parameter(3), few, {}, r"its model is .*own \[3\]")]:
        with pytest.raises(ValueError, match=message):
            run(model, data, **{"epochs": 2, "checkpoint": path, **changed})
    assert path.read_bytes() == content


def test_two_losses_of_one_name_are_told_apart(few, tmp_path):
    def weighted(beta):
        def loss(model, x, y):
            terms = vh.negative_elbo(model, x, y)
            return {**terms, "loss": beta * terms["kl"] - terms["recon"]}
        return loss

    run(fresh(), few, loss=weighted(1.0), checkpoint=tmp_path / "run.pt")
    run(fresh(), few, loss=weighted(1.0), checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="its loss is .*weighted"):
        run(fresh(), few, loss=weighted(2.0), checkpoint=tmp_path / "run.pt")


def test_a_constant_inside_or_a_default_tells_functions_apart_and_a_docstring_does_not():
    def described(source):
        names = {}
        exec(source, names)
        return vh._describe(names["f"])

    assert described("def f(x): return [y * 8 for y in x]") != described("def f(x): return [y * 9 for y in x]")
    assert described("def f(x): return lambda: 8") != described("def f(x): return lambda: 9")
    assert described("def f(x, *, beta=1): return x") != described("def f(x, *, beta=2): return x")
    assert vh._describe(partial(vh.elbo, y=1)) != vh._describe(partial(vh.elbo, y=2))
    assert described("def f(x):\n    'one'\n    return x") == described("def f(x):\n    'two'\n    return x")


def test_numbers_of_numpy_can_be_resumed(few, tmp_path):
    for epochs in (np.int64(1), 1):
        run(fresh(), few, epochs=epochs, lr=np.float64(1e-3), seed=np.int32(2), checkpoint=tmp_path / "run.pt")


def test_a_function_has_one_description_in_every_process():
    code = ("import vae_helpers as vh\n"
            "print(vh._describe(lambda x: x in {'a', 'b', 'c', 'd', 'e'}))")
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=vh.ROOT, env={**os.environ, "PYTHONHASHSEED": seed},
                             stdout=subprocess.PIPE, text=True) for seed in "12"]
    first, second = (process.communicate()[0] for process in runs)
    assert first == second and "lambda" in first


@pytest.mark.parametrize("where", ["evaluate", "on_epoch"])
def test_stopped_between_an_epoch_and_its_checkpoint(few, tmp_path, capsys, monkeypatch, where):
    calls, evaluate = [], vh.evaluate

    def stop(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*arguments, **options) if where == "evaluate" else None

    if where == "evaluate":  # called before training and after each epoch
        monkeypatch.setattr(vh, "evaluate", stop)
    history = run(fresh(), few, epochs=3, checkpoint=tmp_path / "run.pt", on_epoch=stop if where == "on_epoch" else None)
    assert "the same call goes on after epoch 1" in capsys.readouterr().out
    assert len(history.seconds) == len(history.test["loss"]) == (1 if where == "evaluate" else 2)
    assert torch.load(tmp_path / "run.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("damage", ["half", "empty", "text", "foreign", "pickle"])
def test_bad_checkpoints_are_refused_and_left(few, tmp_path, damage):
    path = tmp_path / "run.pt"
    run(fresh(), few, checkpoint=path)
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"model": fresh().state_dict()}, path)
    elif damage == "pickle":
        torch.save(fresh(), path)
    else:
        path.write_bytes({"half": whole[:len(whole) // 2], "empty": b"", "text": b"hello"}[damage])
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"run.pt (is no whole checkpoint|was not written by fit).*another path"):
        run(fresh(), few, checkpoint=path)
    assert path.read_bytes() == content


def test_a_checkpoint_that_cannot_be_written(few, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*choose a folder"):
        run(fresh(), few, checkpoint=tmp_path / "file/run.pt")
    run(fresh(), few, checkpoint=tmp_path / "run.pt", epochs=1)
    before = (tmp_path / "run.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vh.torch, "save", full)
    with pytest.raises(OSError, match="No space left on device.*Free some space"):
        vh._write(tmp_path / "run.pt", partial(vh.torch.save, {}))
    assert (tmp_path / "run.pt").read_bytes() == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("bad, message", [
    (lambda x: x / 0, "the batch after transform holds NaN or infinity at update 4"),
    (lambda x: x * 1e30, "the loss is .* at update 4")])
def test_nan_stops_training_names_the_update_and_spares_the_checkpoint(few, tmp_path, bad, message):
    calls = []

    def transform(x):
        calls.append(1)
        return bad(x) if len(calls) == 5 else x

    def loss(model, x, y):
        return (model(x) - x.flatten(1)).square().sum(1).square()

    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 784))
    with pytest.raises(FloatingPointError, match=f"{message}; the checkpoint .*run.pt of epoch 1 is whole"):
        vh.fit(model, few, epochs=3, transform=transform, loss=loss, progress=False, checkpoint=tmp_path / "run.pt")
    kept = torch.load(tmp_path / "run.pt", weights_only=True)
    assert kept["epoch"] == 1 and all(value.isfinite().all() for value in kept["model"].values())
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arguments, message", [
    ({"epochs": -1}, "epochs is -1; it must be a whole number, at least 0"),
    ({"batch_size": 0}, "batch_size is 0; it must be a whole number, at least 1"),
    ({"lr": 0}, "lr is 0; it must be a positive number"),
    ({"lr": math.nan}, "lr is nan"),
    ({"seed": -1}, "seed is -1"),
    ({"epochs": 1.5}, "epochs is 1.5; it must be a whole number"),
    ({"batch_size": 1}, "more than 1 value per channel"),
    ({"loss": lambda model, x, y: {"recon": x.sum((1, 2, 3))}}, "returned a dict of recon; it must have an entry 'loss'"),
    ({"loss": lambda model, x, y: model.encode(x).mean.mean()}, r"gives 'loss' of shape \[\] for 100 images; it must"),
    ({"loss": lambda model, x, y: x}, "one value per image"),
])
def test_bad_arguments_are_refused_before_any_work(few, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(fresh(), few, checkpoint=tmp_path / "run.pt", **arguments)
    assert not list(tmp_path.iterdir())


def test_data_that_does_not_fit_is_refused_before_any_work(few, tmp_path):
    grey = vh.load_data("digits")
    none = vh.ImageData(few.train[:0], few.test, few.classes, "a", "b")
    colour = vh.load_data("photos")
    eleven = vh.ImageData(vh.Split(few.train.images, few.train.labels + 1), few.test, few.classes, "a", "b")
    for model, data, message in [(fresh(), grey, "takes only 0 and 1"), (fresh(), none, r"len\(data.train\) is 0"),
                                 (fresh(), colour, r"this model takes float images .*1, 28, 28"),
                                 (fresh(num_classes=10), eleven, "y holds labels 1 to 10; this model takes 0 to 9")]:
        with pytest.raises(ValueError, match=message):
            run(model, data, checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="checkpoint is the folder"):
        run(fresh(), few, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="takes only 0 and 1"):
        vh.fit(fresh(), few, epochs=1, progress=False)  # training batches left grey
    assert not list(tmp_path.iterdir())
