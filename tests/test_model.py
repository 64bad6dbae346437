"""ConvVAE, files of weights, and codes: shapes, modes and labels, what is refused, and what the shipped weights reach."""

import math
import re
import warnings

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import numpy as np
import pytest
import torch
from models import TinyVAE
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

SHIPPED = sorted((vh.ROOT / "notebooks" / "weights").glob("*.pt"))


def small(**arguments):
    torch.manual_seed(0)
    return vh.ConvVAE(**{"channels": (4, 8), "hidden": 16, "latent_dim": 4, **arguments})


# ------------------------------------------------------------------------------------------------------------ ConvVAE


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (3, 32, 32), (1, 8, 20)])
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("training, blocks", [(True, 0), (False, 2)])
def test_shapes(image_shape, num_classes, training, blocks):
    model = vh.ConvVAE(image_shape, 5, num_classes, channels=(4, 8), hidden=16, blocks=blocks).train(training)
    x, y = torch.rand(6, *image_shape).round(), torch.arange(6) if num_classes else None
    q_z = model.encode(x, y)
    assert q_z.batch_shape == (6,) and q_z.event_shape == (5,)
    p_x = model.decode(q_z.rsample(), y)
    assert p_x.batch_shape == (6,) and p_x.event_shape == image_shape
    recon, kl = vh.elbo(model, x, y)
    assert recon.shape == kl.shape == (6,)
    assert (recon < 0).all() and (kl > 0).all()
    (kl - recon).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(6, y).shape == model.reconstruct(x, y).shape == x.shape
    assert model.training == training


def test_the_label_changes_encoder_and_decoder():
    model = small(num_classes=10).eval()
    x, z = torch.rand(1, 1, 28, 28), torch.randn(1, 4)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert not torch.allclose(model.encode(x, zero).mean, model.encode(x, one).mean)
    assert not torch.allclose(model.decode(z, zero).mean, model.decode(z, one).mean)


def test_what_the_architecture_promises():
    model = vh.ConvVAE()
    kinds = [type(m).__name__ for m in model.modules()]
    assert {"Conv2d", "BatchNorm2d", "MaxPool2d", "ConvTranspose2d"} <= set(kinds)
    assert not any("Dropout" in kind for kind in kinds)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.up)


def test_a_new_residual_block_hands_its_input_on():
    x = torch.randn(4, 8, 5, 5)
    block = vh.Residual(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    assert torch.equal(block(x), x)
    block[-1].bias.data += 1.0
    assert torch.equal(block(x), x + 1)


@pytest.mark.parametrize("name, value", [
    ("image_shape", (2, 28, 28)), ("image_shape", (1, 30, 28)), ("image_shape", (28, 28)),
    ("image_shape", (1, 28.5, 28)), ("latent_dim", 0),
    ("latent_dim", 2.5), ("num_classes", -1), ("blocks", -1), ("hidden", 0), ("channels", (16, 0)),
    ("likelihood", "bernouli")])
def test_bad_constructor_arguments(name, value):
    with pytest.raises(ValueError, match=name):
        vh.ConvVAE(**{name: value})


@pytest.mark.parametrize("x", [torch.rand(2, 3, 28, 28), torch.rand(2, 1, 32, 32), torch.rand(28, 28),
                               torch.zeros(2, 1, 28, 28, dtype=torch.uint8)])
def test_bad_images(x):
    with pytest.raises(ValueError, match=r"\bx\b.*1, 28, 28"):
        vh.ConvVAE().encode(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_tensors_of_another_precision_are_taken(dtype):
    model = small().eval()
    x, z = torch.rand(2, 1, 28, 28).round(), torch.randn(2, 4)
    torch.testing.assert_close(model.encode(x.to(dtype)).mean, model.encode(x).mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model.decode(z.to(dtype)).mean, model.decode(z).mean, rtol=1e-2, atol=1e-2)
    recon, kl = vh.elbo(model, x.to(dtype))
    assert recon.isfinite().all() and kl.isfinite().all()
    assert model.reconstruct(x.to(dtype)).shape == x.shape


@pytest.mark.parametrize("y", [None, torch.tensor([0.0, 1.0]), torch.tensor([0]), torch.tensor([0, 10]),
                               torch.tensor([-1, 0]), torch.tensor([[0, 1]])])
def test_bad_labels(y):
    model = small(num_classes=10).eval()
    with pytest.raises(ValueError, match=r"\by\b"):
        model.encode(torch.rand(2, 1, 28, 28), y)
    with pytest.raises(ValueError, match=r"\by\b"):
        model.decode(torch.randn(2, 4), y)


def test_labels_for_a_model_without_and_a_code_of_another_size():
    with pytest.raises(ValueError, match=r"\by\b"):
        small().encode(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))
    for z in (torch.randn(2, 31), torch.randn(32)):
        with pytest.raises(ValueError, match=r"\bz\b.*\[B, 32\]"):
            vh.ConvVAE().decode(z)


def test_pictures_are_made_in_eval_mode_and_the_mode_comes_back():
    model, x = small().train(), torch.rand(3, 1, 28, 28)
    together = model.reconstruct(x)
    assert model.training and torch.allclose(together[:1], model.reconstruct(x[:1]), atol=1e-5)
    with vh.seeded(1):
        drawn = model.sample(3)
    with vh.seeded(1):
        assert torch.equal(drawn, model.eval().sample(3))


def test_each_module_keeps_the_mode_that_it_had(few):
    model, x = small(), few.test[:3].batch()[0]
    before = {name: value.clone() for name, value in model.named_buffers()}
    model.train()
    model.down.eval()
    model.up[0].eval()
    modes = [module.training for module in model.modules()]
    for use in (lambda: model.reconstruct(x), lambda: model.sample(2), lambda: vh.encode_all(model, few.test[:3]),
                lambda: vh.kl_per_dim(model, few.test[:3]), lambda: vh.mean_images(model, torch.zeros(2, 4)),
                lambda: vh.evaluate(model, few.test[:3]), lambda: vh.log_likelihood(model, x, num_samples=2)):
        use()
        assert [module.training for module in model.modules()] == modes
    with pytest.raises(ValueError, match="x"):
        model.reconstruct(x[:, :, :4])
    assert [module.training for module in model.modules()] == modes, "also after an error"
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_the_second_half_of_the_encoders_output_is_the_log_variance():
    model = small(latent_dim=3).eval()
    mean, log_var = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, -3.0, 1.5])
    with torch.no_grad():
        model.to_q[-1].weight.zero_()
        model.to_q[-1].bias.copy_(torch.cat([mean, log_var]))
        q_z = model.encode(torch.rand(2, 1, 28, 28))
    assert torch.allclose(q_z.mean, mean.expand(2, 3)) and torch.allclose(q_z.variance, log_var.exp().expand(2, 3))


def test_the_log_variance_stays_within_its_bounds():
    model = small(latent_dim=2).eval()
    with torch.no_grad():
        model.to_q[-1].weight.zero_()
        model.to_q[-1].bias.copy_(torch.tensor([0.0, 0.0, 1e6, -1e6]))
        q_z = model.encode(torch.rand(2, 1, 28, 28))
    torch.testing.assert_close(q_z.variance.log(), torch.tensor([14.0, -14.0]).expand(2, 2), rtol=1e-4, atol=1e-4)


def test_samples_come_from_the_prior(monkeypatch):
    model, seen = small(), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, y=None: (seen.append(z), decode(z, y))[1])
    with vh.seeded(0):
        model.sample(1000)
    assert seen[0].shape == (1000, 4) and abs(seen[0].mean()) < 0.1 and abs(seen[0].std() - 1) < 0.1
    model.prior = Independent(Normal(torch.full((4,), 5.0), torch.ones(4)), 1)
    model.sample(1000)
    assert seen[1].shape == (1000, 4) and abs(seen[1].mean() - 5) < 0.1


# ----------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return vh.ConvVAE((3, 8, 12), 5, 4, channels=(4, 8), hidden=16, blocks=1).eval()


def save(model, path, **info):
    halves = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    torch.save({"config": model.config, "state": halves, "info": info}, path)
    return path


def test_a_model_comes_back_with_its_configuration_and_info(model, tmp_path):
    loaded, info = vh.load_weights(save(model, tmp_path / "w.pt", source="nowhere", elbo=-1.5))
    assert info == {"source": "nowhere", "elbo": -1.5}
    assert loaded.config == model.config and not loaded.training
    x, y = torch.rand(2, 3, 8, 12), torch.tensor([0, 3])
    ours, theirs = model.encode(x, y).mean, loaded.cpu().encode(x, y).mean
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.parametrize("likelihood", ["bernoulli", "logistic", "linked"])
def test_each_likelihood_comes_back(tmp_path, likelihood):
    path = save(vh.ConvVAE((3, 8, 8), 2, channels=(4, 8), hidden=16, likelihood=likelihood), tmp_path / "w.pt")
    loaded = vh.load_weights(str(path))[0]
    assert loaded.config["likelihood"] == likelihood and loaded.sample(2).shape == (2, 3, 8, 8)


def test_numbers_of_numpy_are_loaded(tmp_path):
    model = vh.ConvVAE(np.array([1, 8, 12]), np.int64(3), np.int32(4), channels=np.array([4, 8]), hidden=np.uint8(16),
                       blocks=np.int16(1))
    info = {"elbo": np.float64(-88.9), "half": np.float32(0.5), "epochs": np.int64(3), "whole": np.bool_(True)}
    loaded, read = vh.load_weights(save(model, tmp_path / "w.pt", **info))
    assert read == info and loaded.config == model.config
    assert model.sample(2, torch.tensor([0, 3])).shape == (2, 1, 8, 12)


def test_a_path_in_the_home_folder(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save(model, tmp_path / "w.pt")
    assert vh.load_weights("~/w.pt")[0].config == model.config


def test_shipped_weights_are_small():
    assert SHIPPED, "no weights are shipped"
    assert all(path.stat().st_size < 4e6 for path in SHIPPED)


def test_shipped_weights_reach_their_stored_test_elbo():
    model, info = vh.load_weights(vh.ROOT / "notebooks/weights/mnist.pt")
    assert info["source"] == "MNIST" and {"elbo", "log_p", "num_samples", "epochs"} <= set(info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = vh.load_data("mnist").binarize_test(seed=0)
    whole = len(data.test) == 10_000  # else the 2,000 test digits that travel with the notebooks
    assert -vh.evaluate(model, data.test)["loss"] == pytest.approx(info["elbo"], abs=0.05 if whole else 2)
    assert info["log_p"] > info["elbo"]


@pytest.mark.parametrize("content", [
    b"", b"not a file of torch", {"format": "something else"}, [1, 2], nn.Linear(2, 2),
    {"config": {"no_such_argument": 1}, "state": {}, "info": {}}, {"config": {}, "state": {}, "info": {}},
    {"config": [], "state": {}, "info": {}}, {"config": {"latent_dim": -1}, "state": {}, "info": {}}],
    ids=["empty", "text", "other keys", "list", "pickle", "other config", "other state", "no config", "bad config"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "w.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        vh.load_weights(path)
    assert path.read_bytes() == before


def test_a_half_written_file_is_refused(model, tmp_path):
    path = save(model, tmp_path / "w.pt")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="w.pt"):
        vh.load_weights(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="w.pt"):
        vh.load_weights(tmp_path / "w.pt")


def own_likelihood(output):
    return Independent(Normal(output, 1.0), 3)


def same_number(colours):
    return colours


def test_a_model_that_the_file_cannot_describe_is_refused(tmp_path):
    tracked = small()
    tracked.register_buffer("updates", torch.zeros(()))
    for number, model in enumerate((tracked, small(likelihood=(own_likelihood, same_number)))):
        with pytest.raises(ValueError, match=f"w{number}.pt"):
            vh.load_weights(save(model, tmp_path / f"w{number}.pt"))


# ------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("num_classes", [0, 10])
def test_encode_all_and_kl_per_dim_follow_their_definitions(digits, num_classes):
    model, split = small(num_classes=num_classes).train(), digits.train[:1200]  # more than are encoded at once
    mean, stddev = vh.encode_all(model, split)
    assert mean.shape == stddev.shape == (1200, 4) and not mean.requires_grad and mean.device.type == "cpu"
    x, y = split.batch()
    with torch.no_grad():
        q_z = model.eval().encode(x, y if num_classes else None)
    torch.testing.assert_close(mean, q_z.mean)
    torch.testing.assert_close(stddev, q_z.stddev)
    kl = kl_divergence(q_z, Independent(Normal(torch.zeros(4), torch.ones(4)), 1)).mean()
    per_dim = vh.kl_per_dim(model, split)
    assert per_dim.shape == (4,) and per_dim.sum() == pytest.approx(float(kl), rel=1e-4)


def test_kl_per_dim_of_known_posteriors(few):
    class Known(TinyVAE):
        def encode(self, x, y=None):
            return Independent(Normal(torch.tensor([0.0, 3.0]).expand(len(x), 2), torch.tensor([1.0, 0.5])), 1)

    expected = [0.0, 0.5 * (9 + 0.25 - 1) - math.log(0.5)]
    torch.testing.assert_close(vh.kl_per_dim(Known(), few.test[:7]), torch.tensor(expected))


@pytest.mark.parametrize("num_classes, label", [(0, None), (10, 3)])
def test_mean_images_are_those_of_the_decoder_in_eval_mode(num_classes, label):
    model, z = small(num_classes=num_classes).train(), torch.randn(5, 4)
    images = vh.mean_images(model, z, label)
    assert images.shape == (5, 1, 28, 28) and images.device.type == "cpu" and not images.requires_grad
    with torch.no_grad():
        expected = model.eval().decode(z, None if label is None else torch.full((5,), label)).mean
    torch.testing.assert_close(images, expected)
    assert label is None or not torch.allclose(images, vh.mean_images(model, z, label + 1))


def test_mean_images_lie_between_0_and_1():
    class Unbounded(nn.Module):
        def decode(self, z, y=None):
            return Independent(Normal(z.view(-1, 1, 2, 2), 1.0), 3)

    images = vh.mean_images(Unbounded(), torch.tensor([[-1.0, 0.25, 0.5, 7.0]]))
    assert images.flatten().tolist() == [0.0, 0.25, 0.5, 1.0]


def test_codes_that_cannot_be_had(few):
    class Spatial(TinyVAE):
        def encode(self, x, y=None):
            return Independent(Normal(x, torch.ones_like(x)), 3)

    class Apart(TinyVAE):
        def encode(self, x, y=None):
            return super().encode(x).base_dist

    for use in (vh.encode_all, vh.kl_per_dim):
        with pytest.raises(ValueError, match="split"):
            use(small(), few.test[:0])
        with pytest.raises(ValueError, match=r"q\(z\|x\)"):
            use(Spatial(), few.test[:3])
        with pytest.raises(ValueError, match="Independent"):
            use(Apart(), few.test[:3])
    with pytest.raises(ValueError, match=r"\bz\b"):
        vh.mean_images(small(), torch.zeros(2, 5))
    for model, label in ((small(), 1), (small(num_classes=10), None), (small(num_classes=10), 10)):
        with pytest.raises(ValueError, match=r"\by\b"):
            vh.mean_images(model, torch.zeros(2, 4), label)
