"""LatentExplorer and what it is built on: every widget moves the picture, programs can drive it, bad input is refused."""

import io
import math
import statistics
import time

import pytest
import torch
from models import LinearGaussian, TinyVAE
from PIL import Image
from torch import nn
from torch.distributions import Independent, Normal

import vae_helpers as vh


class Counting(vh.ConvVAE):
    """Counts the calls of decode, and has the mode and dtype of the last one."""

    calls = 0

    def decode(self, z, y=None):
        self.calls, self.was_training, self.seen = self.calls + 1, self.training, z
        return super().decode(z, y)


def build(latent_dim=4, num_classes=0, image_shape=(1, 28, 28), kind=Counting):
    torch.manual_seed(0)
    model = kind(image_shape, latent_dim, num_classes, channels=(4, 8), hidden=32)
    with torch.no_grad():  # untrained, but with latents that show
        model.up[-1].weight.mul_(20)
        model.from_z[0].weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def data(digits):
    return vh.ImageData(digits.train[:10], digits.test[:100], digits.classes, "few", "digits")


@pytest.fixture
def panel(data, tmp_path):
    return vh.LatentExplorer(build(), data, num_sliders=3, folder=tmp_path / "out")


def press(panel, name):
    panel.buttons[name].click()
    assert panel.status.value == "" or name == "save", panel.status.value


def frame(panel):
    return panel.image.value, panel.map.value


def test_encode_all_and_kl_per_dim_follow_their_definitions(data):
    model = build()
    mean, stddev = vh.encode_all(model, data.test)
    with torch.no_grad():
        q_z = model.eval().encode(data.test.batch()[0])
    torch.testing.assert_close(mean, q_z.mean)
    torch.testing.assert_close(stddev, q_z.stddev)
    kl = torch.distributions.kl_divergence(q_z, Independent(Normal(torch.zeros(4), torch.ones(4)), 1))
    assert vh.kl_per_dim(model, data.test).sum() == pytest.approx(float(kl.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="split is empty"):
        vh.kl_per_dim(model, data.test[:0])


def test_slerp_keeps_the_length_and_meets_both_ends():
    a, b = torch.randn(2, 64).unbind()
    a, b = a / a.norm(), b / b.norm()
    path = [vh.slerp(a, b, t) for t in (0, 0.3, 0.5, 1)]
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], b)
    assert all(float(point.norm()) == pytest.approx(1, abs=1e-5) for point in path)
    for c in (a, -a, torch.zeros(64)):
        assert all(vh.slerp(a, c, t).isfinite().all() for t in (0, 0.5, 1))
    torch.testing.assert_close(vh.slerp(torch.tensor([1.0]), torch.tensor([-1.0]), 0.25), torch.tensor([0.5]))


def test_plot_traversals_has_the_latents_of_largest_kl_first(data):
    kl = torch.tensor([0.1, 2.0, 0.0, 1.0])
    axes = vh.plot_traversals(build(), kl, values=torch.linspace(-2, 2, 5)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["$z_{1}$, 2.00 nats", "$z_{3}$, 1.00 nats"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-2", "-1", "0", "1", "2"]
    assert axes.images[0].get_array().shape[:2] == (4 * 30 - 2, 5 * 30 - 2)
    shown = vh.plot_traversals(build(3, 10, (3, 32, 32)), kl[:3], dims=[2], label=1).axes[0].images[0].get_array()
    assert shown.shape == (32, 9 * 34 - 2, 3) and shown.std() > 0


def test_every_slider_changes_the_image_and_moves_the_mark(panel):
    assert len(panel.sliders) == 3 and len(panel.folded) == 1
    order = panel._kl.argsort(descending=True).tolist()
    for slider, dim in zip([*panel.sliders, *panel.folded], order, strict=True):
        assert slider.description == f"z[{dim}], {panel._kl[dim]:.2f} nats"
        image, plane = frame(panel)
        slider.value += 1.5
        assert panel.z[dim] == pytest.approx(slider.value) and panel.image.value != image and panel.map.value != plane


def test_it_opens_on_a_test_image_and_reset_restores_the_same_bytes(panel, data):
    assert torch.allclose(panel.z, vh.encode_all(panel.model, data.test[0])[0][0])
    assert Image.open(io.BytesIO(panel.image.value)).size == (252, 252)
    assert Image.open(io.BytesIO(panel.test_image.value)).size == Image.open(io.BytesIO(panel.reconstruction.value)).size
    press(panel, "reset")
    zero = frame(panel)
    press(panel, "prior sample")
    assert panel.z.abs().min() > 0 and all(a != b for a, b in zip(frame(panel), zero, strict=True))
    press(panel, "reset")
    assert not panel.z.any() and frame(panel) == zero


def test_each_button_decodes_once(panel):
    for name in ("prior sample", "reset", "random image", "encode"):
        before = panel.model.calls
        press(panel, name)
        assert panel.model.calls == before + 1, name
    before = panel.model.calls
    panel.z = torch.ones(4)
    assert panel.model.calls == before + 1
    panel.sliders[0].value = 0.5
    assert panel.model.calls == before + 2


def test_test_images_and_their_reconstructions(panel, data):
    panel.index.value = 7
    press(panel, "encode")
    assert torch.allclose(panel.z, vh.encode_all(panel.model, data.test[7])[0][0])
    shown = Image.open(io.BytesIO(panel.test_image.value)).resize((28, 28), Image.Resampling.NEAREST)
    assert torch.equal(torch.tensor(list(shown.tobytes())), data.test.images[7].flatten().long())
    seen = set()
    for _ in range(5):
        press(panel, "random image")
        seen.add((panel.index.value, panel.reconstruction.value))
    assert len(seen) > 2
    for index in (100, -1, 1.5):
        with pytest.raises(ValueError, match=f"index is {index}; it must be a whole number from 0 to 99"):
            panel.encode(index)


def test_draws_follow_the_seed_and_leave_the_random_state(data):
    first, second, other = (vh.LatentExplorer(build(), data, seed=seed) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    for panel in (first, second, other):
        press(panel, "prior sample")
    assert torch.equal(first.z, second.z) and not torch.equal(first.z, other.z)
    assert torch.equal(state, torch.get_rng_state())


def test_a_program_sets_z_also_outside_the_sliders_range(panel):
    z = torch.tensor([0.337, -6.0, 9.5, 1e-3])
    panel.z = z
    assert torch.equal(panel.z, z)
    for slider, dim in zip([*panel.sliders, *panel.folded], panel._dims, strict=True):
        assert abs(slider.value - z[dim]) <= 1 / 32 and slider.value % (1 / 16) == 0
    panel.z.zero_()  # a copy
    panel.z = [0.0, 0.0, 0.0, 0.0]
    assert all((slider.min, slider.value, slider.max) == (-4, 0, 4) for slider in panel.sliders)


@pytest.mark.parametrize("z, message", [
    (torch.zeros(5), r"z has shape \[5\]; this model takes \[4\]"),
    (torch.zeros(1, 4), r"z has shape \[1, 4\]; this model takes \[4\]"),
    (torch.tensor(1.0), r"z has shape \[\]"),
    (torch.tensor([0, math.nan, 0, 0]), "z is nan at 1; it must be finite"),
    ([0, 0, 0, math.inf], "z is inf at 3; it must be finite")])
def test_a_z_that_does_not_fit_changes_nothing(panel, z, message):
    before = panel.z, frame(panel)
    with pytest.raises(ValueError, match=message):
        panel.z = z
    assert torch.equal(panel.z, before[0]) and frame(panel) == before[1]


def test_a_slider_set_to_nan_goes_back(panel):
    before = panel.sliders[0].value, panel.z
    with pytest.raises(ValueError, match="it must be finite"):
        panel.sliders[0].value = math.nan
    assert panel.sliders[0].value == before[0] and torch.equal(panel.z, before[1])


def test_labels_of_a_conditional_model(data):
    panel = vh.LatentExplorer(build(num_classes=10), data)
    assert panel.label == int(data.test.labels[0])
    image, plane = frame(panel)
    panel.labels.value = (panel.label + 1) % 10
    assert panel.image.value != image and panel.map.value == plane
    panel.label = "7"
    assert panel.label == 7
    panel.index.value = 3
    press(panel, "encode")
    assert panel.label == int(data.test.labels[3])
    for label in (10, -1, "seven", None):
        with pytest.raises(ValueError, match=f"label is {label!r}; this model takes 0 to 9 or one of 0, 1"):
            panel.label = label
    with pytest.raises(ValueError, match="label is 1; this model takes none"):
        vh.LatentExplorer(build(), data).label = 1
    with pytest.raises(ValueError, match="the model takes labels 0 to 10, but data has 10 classes"):
        vh.LatentExplorer(build(num_classes=11), data)
    with pytest.raises(ValueError, match="labels 0 to 9; this model takes 0 to 4"):
        vh.LatentExplorer(build(num_classes=5), data)


def test_the_walk_from_a_to_b(panel):
    assert panel.play.disabled and panel.walk.disabled
    with pytest.raises(ValueError, match="the walk needs two kept points"):
        panel.walk.value = 5
    panel.z = [2.0, 0.0, 0.0, 0.0]
    press(panel, "keep B")
    image = panel.image.value
    panel.z = [0.0, 2.0, 0.0, 0.0]
    press(panel, "keep A")
    assert not panel.play.disabled and not panel.walk.disabled and list(panel.kept) == ["A", "B"]
    panel.play.value = 25  # what the play button counts up
    assert panel.walk.value == 25 and torch.allclose(panel.z, torch.tensor([2**0.5, 2**0.5, 0, 0]))
    panel.play.value = 50
    assert torch.allclose(panel.z, torch.tensor([2.0, 0, 0, 0]), atol=1e-6) and panel.image.value == image


def test_save_writes_the_picture_and_its_z(panel, tmp_path):
    for _ in range(2):
        press(panel, "save")
    assert "002.png" in panel.status.value
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001.png", "001.pt", "002.png", "002.pt"]
    assert (tmp_path / "out/001.png").read_bytes() == panel.image.value
    state = torch.load(tmp_path / "out/001.pt", weights_only=True)
    assert torch.equal(state["z"], panel.z) and state["label"] is None


def test_a_folder_that_cannot_be_written_is_shown_and_the_panel_lives_on(panel, tmp_path):
    (tmp_path / "file").write_text("")
    panel.folder = tmp_path / "file/<out>"
    panel.buttons["save"].click()
    assert "save: " in panel.status.value and "&lt;out&gt;" in panel.status.value
    image = panel.image.value
    press(panel, "prior sample")
    assert panel.image.value != image


@pytest.mark.parametrize("latent_dim, folded", [(1, 0), (2, 0), (9, 1), (512, 24)])
def test_any_number_of_latents(data, latent_dim, folded):
    start = time.perf_counter()
    panel = vh.LatentExplorer(build(latent_dim), data)
    assert time.perf_counter() - start < 5
    assert (len(panel.sliders), len(panel.folded)) == (min(8, latent_dim), folded)
    for name in ("prior sample", "keep A", "reset", "keep B", "random image"):
        press(panel, name)
    panel.walk.value = 20
    before = frame(panel)
    panel.sliders[-1].value += 1
    assert panel.image.value != before[0] and panel.map.value != before[1]


def test_every_one_of_512_latents_has_its_slider(data):
    panel = vh.LatentExplorer(build(512), data, num_sliders=4)
    seen = set(panel._dims[:4])
    for _, page in panel.page.options:
        panel.page.value = page
        shown = panel.rest.children[0].children[1:]
        for slider, dim in zip(shown, panel._dims[4:], strict=True):
            assert slider.description.startswith(f"z[{dim}],") and abs(slider.value - panel.z[dim]) <= 1 / 32
        seen.update(panel._dims[4:])
    assert seen == set(range(512))
    shown[-1].value = 3
    assert panel.z[panel._dims[-1]] == 3


@pytest.mark.parametrize("model", [TinyVAE(), LinearGaussian()], ids=["a reader's own", "float64, correlated"])
def test_models_of_ones_own(data, digits, model):
    if isinstance(model, LinearGaussian):
        small = vh.Split(data.test.images[:, :, 10:14, 10:14].contiguous(), data.test.labels)
        data = vh.ImageData(small, small, data.classes, "small", "digits")
    panel = vh.LatentExplorer(model, data)
    before = frame(panel)
    press(panel, "prior sample")
    assert panel.image.value != before[0] and panel.map.value != before[1]


def test_a_prior_of_the_models_own_is_drawn_from(data):
    model = build()
    model.prior = Independent(Normal(torch.full((4,), 3.0), torch.full((4,), 1e-3)), 1)
    panel = vh.LatentExplorer(model, data)
    press(panel, "prior sample")
    assert torch.allclose(panel.z, torch.full((4,), 3.0), atol=0.1)


def test_colour():
    photos = vh.load_data("photos")
    panel = vh.LatentExplorer(build(5, 2, (3, 32, 32)), photos)
    panel.label = "flower"
    picture = Image.open(io.BytesIO(panel.image.value))
    assert picture.mode == "RGB" and picture.size == (224, 224)


@pytest.mark.parametrize("training", [True, False])
def test_it_decodes_in_eval_mode_without_gradients_and_leaves_the_mode(data, training):
    model = build().train(training)
    panel = vh.LatentExplorer(model, data)
    press(panel, "prior sample")
    assert not model.was_training and model.training == training
    assert not model.seen.requires_grad and model.seen.dtype == torch.float32
    assert all(parameter.grad is None for parameter in model.parameters())


def test_two_panels_on_one_model(data):
    model = build()
    left, right = vh.LatentExplorer(model, data), vh.LatentExplorer(model, data)
    right.z = torch.ones(4)
    before = right.z, frame(right)
    press(left, "prior sample")
    left.sliders[0].value = 2
    assert torch.equal(right.z, before[0]) and frame(right) == before[1]
    left.close()
    right.sliders[0].value = 2
    assert frame(right) != before[1]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_a_model_on_another_device(data):
    panel = vh.LatentExplorer(build().to(vh.device()), data)
    press(panel, "prior sample")
    assert panel.model.seen.device.type == vh.device().type and panel.z.device.type == "cpu"
    panel.model.cpu()
    press(panel, "reset")
    assert panel.model.seen.device.type == "cpu"


def test_z_goes_to_where_the_model_is(data, monkeypatch):
    panel = vh.LatentExplorer(build(), data)
    monkeypatch.setattr(vh, "_device_of", lambda model: torch.device("meta"))
    with pytest.raises(Exception, match="meta|[Dd]evice"):
        panel.z = torch.ones(4)
    assert panel.model.seen.device.type == "meta" and "no image" in panel.status.value


def test_closed_while_it_plays(panel):
    for name in ("keep A", "prior sample", "keep B"):
        press(panel, name)
    panel.play.playing, panel.play.value = True, 10
    calls, image = panel.model.calls, panel.image.value
    panel.close()
    assert not panel.play.playing and panel.play.comm is None and panel.sliders[0].comm is None
    panel.play.value = 11  # a tick that was on its way
    panel.sliders[0].value = 3
    panel.close()
    assert panel.model.calls == calls and panel.image.value == image


def test_without_a_kernel_a_grid_of_traversals_stands_in_its_place(panel):
    bundle = panel._repr_mimebundle_()
    assert bundle["image/png"] and "latents" in bundle["text/plain"]
    assert "application/vnd.jupyter.widget-view+json" in bundle


class Spatial(nn.Module):
    def encode(self, x, y=None):
        return Independent(Normal(x, 1.0), 3)


@pytest.mark.parametrize("model, arguments, message", [
    (build(), {"num_sliders": 0}, "num_sliders is 0; it must be a whole number, at least 1"),
    (build(image_shape=(3, 32, 32)), {}, r"this model takes float images in \[0, 1\] of shape \[B, 3, 32, 32\]"),
    (Spatial(), {}, r"q\(z\|x\) has event shape \[1, 28, 28\]; it must be \[latent_dim\]")])
def test_bad_arguments(data, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        vh.LatentExplorer(model, data, **arguments)


def test_a_move_is_fast(data):
    panel, times = vh.LatentExplorer(build(32), data), []
    for move in range(50):
        start = time.perf_counter()
        panel.sliders[0].value = -2 + move / 16
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.1
