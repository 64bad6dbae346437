"""ConvVAE: shapes with and without labels, in train and eval mode, and what it refuses."""

import pytest
import torch

import vae_helpers as vh


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
    model = vh.ConvVAE(num_classes=10, channels=(4, 8), hidden=16).eval()
    x, z = torch.rand(1, 1, 28, 28), torch.randn(1, 32)
    zero, one = torch.tensor([0]), torch.tensor([1])
    assert not torch.allclose(model.encode(x, zero).mean, model.encode(x, one).mean)
    assert not torch.allclose(model.decode(z, zero).mean, model.decode(z, one).mean)


def test_what_the_architecture_promises():
    model = vh.ConvVAE()
    kinds = [type(m).__name__ for m in model.modules()]
    assert {"Conv2d", "BatchNorm2d", "MaxPool2d", "ConvTranspose2d"} <= set(kinds)
    assert not any("Dropout" in kind for kind in kinds)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in model.up)


def test_a_new_residual_block_hands_its_input_on():
    x = torch.randn(4, 8, 5, 5)
    block = vh.Residual(torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, padding=1))
    assert torch.equal(block(x), x)
    block[-1].bias.data += 1.0
    assert torch.equal(block(x), x + 1)


@pytest.mark.parametrize("arguments, message", [
    ({"image_shape": (2, 28, 28)}, r"image_shape is \(2, 28, 28\)"),
    ({"image_shape": (1, 30, 28)}, "multiples of 4"),
    ({"image_shape": (28, 28)}, "image_shape is"),
    ({"latent_dim": 0}, "latent_dim is 0; it must be a whole number, at least 1"),
    ({"num_classes": -1}, "num_classes is -1"),
    ({"blocks": -1}, "blocks is -1"),
    ({"hidden": 0}, "hidden is 0"),
    ({"channels": (16, 0)}, r"channels\[1\] is 0"),
    ({"latent_dim": 2.5}, "latent_dim is 2.5"),
    ({"likelihood": "bernouli"}, "likelihood is 'bernouli'; it must be one of bernoulli"),
])
def test_bad_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        vh.ConvVAE(**arguments)


@pytest.mark.parametrize("x", [torch.rand(2, 3, 28, 28), torch.rand(2, 1, 32, 32), torch.rand(28, 28),
                               torch.zeros(2, 1, 28, 28, dtype=torch.uint8)])
def test_bad_images(x):
    with pytest.raises(ValueError, match=r"x is torch.*this model takes float images in \[0, 1\] of shape \[B, 1, 28, 28\]"):
        vh.ConvVAE().encode(x)


@pytest.mark.parametrize("y, message", [
    (None, "y is missing"),
    (torch.tensor([0.0, 1.0]), "torch.float32"),
    (torch.tensor([0]), r"it must be int64 of shape \[2\]"),
    (torch.tensor([0, 10]), "y holds labels 0 to 10; this model takes 0 to 9"),
    (torch.tensor([-1, 0]), "labels -1 to 0"),
])
def test_bad_labels(y, message):
    model = vh.ConvVAE(num_classes=10).eval()
    with pytest.raises(ValueError, match=message):
        model.encode(torch.rand(2, 1, 28, 28), y)
    with pytest.raises(ValueError, match=message):
        model.decode(torch.randn(2, 32), y)


def test_labels_for_a_model_without_and_a_code_of_another_size():
    with pytest.raises(ValueError, match="y was given to a model without labels"):
        vh.ConvVAE().encode(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"z has shape \[2, 31\]; this model takes \[B, 32\]"):
        vh.ConvVAE().decode(torch.randn(2, 31))


def test_pictures_are_made_in_eval_mode_and_the_mode_comes_back():
    torch.manual_seed(0)
    model, x = vh.ConvVAE(channels=(4, 8), hidden=16, latent_dim=4).train(), torch.rand(3, 1, 28, 28)
    together = model.reconstruct(x)
    assert model.training and torch.allclose(together[:1], model.reconstruct(x[:1]), atol=1e-5)
    with vh.seeded(1):
        drawn = model.sample(3)
    with vh.seeded(1):
        assert torch.equal(drawn, model.eval().sample(3))


def test_the_second_half_of_the_encoders_output_is_the_log_variance():
    model = vh.ConvVAE(channels=(4, 8), hidden=16, latent_dim=3).eval()
    mean, log_var = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([0.0, -3.0, 1.5])
    with torch.no_grad():
        model.to_q[-1].weight.zero_()
        model.to_q[-1].bias.copy_(torch.cat([mean, log_var]))
        q_z = model.encode(torch.rand(2, 1, 28, 28))
    assert torch.allclose(q_z.mean, mean.expand(2, 3)) and torch.allclose(q_z.variance, log_var.exp().expand(2, 3))


def test_samples_come_from_the_prior(monkeypatch):
    model, seen = vh.ConvVAE(channels=(4, 8), hidden=16, latent_dim=4), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z, y=None: (seen.append(z), decode(z, y))[1])
    with vh.seeded(0):
        model.sample(1000)
    assert seen[0].shape == (1000, 4) and abs(seen[0].mean()) < 0.1 and abs(seen[0].std() - 1) < 0.1
