"""LatentExplorer: every widget moves the picture, programs can drive it, bad input is refused."""

import io
import math
import statistics
import time

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from explorer import DrawingPad, LatentExplorer, like_mnist
from IPython.core.formatters import DisplayFormatter
from models import LinearGaussian, TinyVAE
from PIL import Image
from torch import nn
from torch.distributions import Independent, Normal
from torchvision.transforms.v2.functional import resize


def build(latent_dim=4, num_classes=0, image_shape=(1, 28, 28)):
    torch.manual_seed(0)
    model = vh.ConvVAE(image_shape, latent_dim, num_classes, channels=(4, 8), hidden=32)
    with torch.no_grad():  # untrained, but with latents that show
        model.up[-1].weight.mul_(20)
        model.from_z[0].weight.mul_(10)
    return model


@pytest.fixture(scope="module")
def data(digits):
    return vh.ImageData(digits.train[:10], digits.test[:100], digits.classes, "few", "digits")


@pytest.fixture
def panel(data, tmp_path):
    return LatentExplorer(build(), data, num_sliders=3, folder=tmp_path / "out")


def press(panel, name):
    panel.buttons[name].click()
    assert panel.status.value == "" or name == "save", panel.status.value


def frame(panel):
    return panel.image.value, panel.map.value


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def code(panel, index):
    return vh.encode_all(panel.model, panel.data.test[index])[0][0]


def static(panel):
    """What stands in the panel's place where no kernel runs, and all that stands beside it."""
    bundle, _ = DisplayFormatter().format(panel)
    return bundle["image/png"], bundle


def test_sliders_are_those_of_largest_kl_and_each_changes_the_image_and_moves_the_mark(panel, data):
    kl = vh.kl_per_dim(panel.model, data.test)
    assert list(panel.sliders) == kl.argsort(descending=True)[:3].tolist()
    for dim, slider in panel.sliders.items():
        assert slider.description == f"z[{dim}], {kl[dim]:.2f} nats"
        before = frame(panel)
        slider.value += 1.5
        assert panel.z[dim] == pytest.approx(slider.value)
        assert all(a != b for a, b in zip(frame(panel), before, strict=True))


def test_it_opens_on_a_test_image_and_reset_restores_the_same_bytes(panel):
    assert torch.equal(panel.z, code(panel, 0)) and panel.index.value == 0
    press(panel, "reset")
    zero = frame(panel)
    press(panel, "prior sample")
    assert panel.z.abs().min() > 0 and all(a != b for a, b in zip(frame(panel), zero, strict=True))
    press(panel, "reset")
    assert not panel.z.any() and frame(panel) == zero


def test_test_images_and_their_reconstructions(panel, data):
    panel.index.value = 7
    press(panel, "encode")
    assert torch.equal(panel.z, code(panel, 7))
    above, below = np.split(pixels(panel.pair.value), 2)
    assert (above[..., 0] == data.test.images[7, 0].numpy()).all() and (below == pixels(panel.image.value)).all()
    seen = set()
    for _ in range(5):
        press(panel, "random image")
        seen.add((panel.index.value, panel.pair.value))
        assert torch.equal(panel.z, code(panel, panel.index.value))
    assert len(seen) > 2
    panel.encode(np.int64(3))
    assert panel.index.value == 3


@pytest.mark.parametrize("index", [100, -1, 1.5, "7", None, math.nan])
def test_an_index_that_is_not_there(panel, index):
    before = panel.z, frame(panel)
    with pytest.raises(ValueError, match="index"):
        panel.encode(index)
    assert torch.equal(panel.z, before[0]) and frame(panel) == before[1]


def test_draws_follow_the_seed_and_leave_the_random_state(data):
    first, second, other = (LatentExplorer(build(), data, seed=seed) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    for panel in (first, second, other):
        press(panel, "prior sample")
    assert torch.equal(first.z, second.z) and not torch.equal(first.z, other.z)
    assert torch.equal(state, torch.get_rng_state())
    for panel in (first, second):
        press(panel, "random image")
    assert first.index.value == second.index.value


def test_a_program_sets_z_also_outside_the_sliders_range(panel):
    z = torch.tensor([0.337, -6.0, 9.5, 1e-3])
    panel.z = z
    assert torch.equal(panel.z, z)
    for dim, slider in panel.sliders.items():
        assert abs(slider.value - z[dim].clamp(-4, 4)) <= 1 / 32 and slider.value % (1 / 16) == 0
    last = list(panel.sliders)[-1]
    panel.sliders[last].value = -1.5
    assert torch.equal(panel.z, z.index_fill(0, torch.tensor(last), -1.5)), "the others stay as they were"
    panel.z.zero_()  # a copy
    assert panel.z.any()
    panel.z = [0, 0, 0, 0]
    assert all(slider.value == 0 for slider in panel.sliders.values()) and panel.z.dtype == torch.float32


@pytest.mark.parametrize("z", [torch.zeros(5), torch.zeros(1, 4), torch.tensor(1.0), torch.tensor([0, math.nan, 0, 0]),
                               [0, 0, 0, math.inf]])
def test_a_z_that_does_not_fit_changes_nothing(panel, z):
    before = panel.z, frame(panel)
    with pytest.raises(ValueError, match=r"\bz\b"):
        panel.z = z
    assert torch.equal(panel.z, before[0]) and frame(panel) == before[1]


def test_a_slider_set_to_nan_is_refused_below_the_panel(panel):
    before, (dim, slider) = panel.z, next(iter(panel.sliders.items()))
    slider.value = math.nan
    assert "ValueError: z" in panel.status.value and torch.equal(panel.z, before)
    slider.value = 0.5
    assert panel.status.value == "" and panel.z[dim] == 0.5


def test_labels_of_a_conditional_model(data):
    panel = LatentExplorer(build(num_classes=10), data)
    assert panel.label == int(data.test.labels[0])
    image, plane = frame(panel)
    panel.labels.index = (panel.label + 1) % 10
    assert panel.image.value != image and panel.map.value == plane
    panel.label = "7"
    assert panel.label == 7 and panel.labels.value == "7"
    panel.label = np.int64(2)
    assert panel.label == 2
    panel.index.value = 3
    press(panel, "encode")
    assert panel.label == int(data.test.labels[3])
    for label in (10, -1, "seven", 1.5):
        with pytest.raises(ValueError, match="label"):
            panel.label = label
    assert panel.label == int(data.test.labels[3])


def test_labels_that_do_not_fit(data):
    plain = LatentExplorer(build(), data)
    assert plain.label is None
    with pytest.raises(ValueError, match="label"):
        plain.label = 1
    with pytest.raises(ValueError, match="labels"):  # five classes, data of ten
        LatentExplorer(build(num_classes=5), data)


def test_the_walk_from_a_to_b(panel):
    start, far = panel.z, torch.tensor([2.0, 0.0, 0.0, 0.0])
    panel.walk.value = 100
    assert not panel.z.any(), "before two points are kept it goes from the first test image to 0"
    panel.walk.value = 0
    assert torch.allclose(panel.z, start)
    panel.z = far
    press(panel, "keep B")
    image = panel.image.value
    panel.z = far.flip(0)
    press(panel, "keep A")
    panel.play.value = 50  # what the play button counts up
    assert panel.walk.value == 50 and torch.allclose(panel.z, torch.tensor([2**0.5, 0, 0, 2**0.5]))
    panel.play.value = 100
    assert torch.allclose(panel.z, far, atol=1e-6) and panel.image.value == image


@pytest.mark.parametrize("a", [torch.zeros(4), torch.tensor([1.0, 0, 2, 0]), torch.tensor([-1.0, 0, -2, 0])],
                         ids=["0", "the same", "opposite"])
def test_a_walk_without_an_arc_meets_both_ends(panel, a):
    b = torch.tensor([1.0, 0, 2, 0])
    panel.z = a
    press(panel, "keep A")
    panel.z = b
    press(panel, "keep B")
    for place, end in ((50, None), (0, a), (100, b)):
        panel.walk.value = place
        assert panel.status.value == "" and (end is None or torch.allclose(panel.z, end, atol=1e-6))


def test_save_writes_the_picture_and_its_z(panel, tmp_path):
    for _ in range(2):
        press(panel, "save")
    assert "002.png" in panel.status.value
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["001.png", "001.pt", "002.png", "002.pt"]
    assert (tmp_path / "out/001.png").read_bytes() == panel.image.value
    state = torch.load(tmp_path / "out/001.pt", weights_only=True)
    assert torch.equal(state["z"], panel.z) and state["label"] is None
    (tmp_path / "out/001.png").unlink()
    press(panel, "prior sample")
    press(panel, "save")
    assert torch.equal(torch.load(tmp_path / "out/002.pt", weights_only=True)["z"], state["z"]), "nothing is written over"


def test_a_folder_that_cannot_be_written_is_shown_and_the_panel_lives_on(panel, tmp_path):
    (tmp_path / "file").write_text("")
    panel.folder = tmp_path / "file/<out>"
    panel.buttons["save"].click()
    assert "Error: " in panel.status.value and "&lt;out&gt;" in panel.status.value
    image = panel.image.value
    press(panel, "prior sample")
    assert panel.image.value != image


def test_a_model_that_fails_is_shown_and_z_stays(panel, monkeypatch):
    before = panel.z, frame(panel)

    def fail(z, y=None):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(panel.model, "decode", fail)
    panel.buttons["prior sample"].click()
    assert "no memory left" in panel.status.value and torch.equal(panel.z, before[0]) and frame(panel) == before[1]
    next(iter(panel.sliders.values())).value += 1
    assert "no memory left" in panel.status.value
    with pytest.raises(RuntimeError, match="no memory left"):
        panel.z = torch.ones(4)


@pytest.mark.parametrize("latent_dim", [1, 2, 9, 512])
def test_any_number_of_latents(data, latent_dim):
    start = time.perf_counter()
    panel = LatentExplorer(build(latent_dim), data)
    assert time.perf_counter() - start < 5 and len(panel.sliders) == min(8, latent_dim)
    for name in ("prior sample", "keep A", "reset", "keep B", "random image"):
        press(panel, name)
    panel.walk.value = 20
    before = frame(panel)
    slider = list(panel.sliders.values())[-1]
    slider.value += 1 if slider.value < 3 else -1
    assert panel.image.value != before[0] and panel.map.value != before[1]


@pytest.mark.parametrize("count", [1, 2])
def test_few_test_images(data, count):
    panel = LatentExplorer(build(), vh.ImageData(data.train, data.test[:count], data.classes, "few", "digits"))
    press(panel, "random image")
    press(panel, "prior sample")


@pytest.mark.parametrize("model", [TinyVAE(), LinearGaussian()], ids=["a reader's own", "float64, correlated"])
def test_models_of_ones_own(data, model):
    if isinstance(model, LinearGaussian):
        small = vh.Split(data.test.images[:, :, 10:14, 10:14].contiguous(), data.test.labels)
        data = vh.ImageData(small, small, data.classes, "small", "digits")
    panel = LatentExplorer(model, data)
    before = frame(panel)
    press(panel, "prior sample")
    assert panel.image.value != before[0] and panel.map.value != before[1]


def test_a_prior_of_the_models_own_is_drawn_from(data):
    model = build()
    model.prior = Independent(Normal(torch.full((4,), 3.0), torch.full((4,), 1e-3)), 1)
    panel = LatentExplorer(model, data)
    press(panel, "prior sample")
    assert torch.allclose(panel.z, torch.full((4,), 3.0), atol=0.1)


def test_colour():
    photos = vh.load_data("photos")
    panel = LatentExplorer(build(5, 2, (3, 32, 32)), photos)
    panel.label = "flower"
    assert pixels(panel.image.value).shape == (32, 32, 3) and panel.label == photos.classes.index("flower")


@pytest.mark.parametrize("training", [True, False])
def test_it_decodes_in_eval_mode_without_gradients_and_leaves_the_mode(data, training):
    model = build().train(training)
    panel = LatentExplorer(model, data)
    panel.z = torch.ones(4, requires_grad=True)
    assert not panel.z.requires_grad and all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training == training for module in model.modules())
    with torch.no_grad():
        image = model.eval().decode(torch.ones(1, 4)).mean[0, 0]
    assert abs(pixels(panel.image.value)[..., 0] - 255 * image.numpy()).max() <= 0.51


def test_two_panels_on_one_model(data):
    model = build()
    left, right = LatentExplorer(model, data), LatentExplorer(model, data)
    right.z = torch.ones(4)
    before = right.z, frame(right)
    press(left, "prior sample")
    next(iter(left.sliders.values())).value = 2
    assert torch.equal(right.z, before[0]) and frame(right) == before[1]
    left.close()
    next(iter(right.sliders.values())).value = 2
    assert frame(right) != before[1]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
def test_a_model_on_another_device(data):
    panel = LatentExplorer(build().to(vh.device()), data)
    for here in (vh.device(), torch.device("cpu")):
        panel.model.to(here)
        image = panel.image.value
        press(panel, "prior sample")
        assert panel.image.value != image and panel.z.device.type == "cpu"


def test_closed_while_it_plays(panel):
    panel.play.playing, panel.play.value = True, 10
    panel.close()
    assert not panel.play.playing
    panel.play.value = 11  # a tick that was on its way
    panel.close()


def test_without_a_kernel_a_grid_of_traversals_stands_in_its_place(panel):
    picture, bundle = static(panel)
    assert "application/vnd.jupyter.widget-view+json" in bundle and pixels(picture).std() > 0
    panel.z = panel.z + 1
    assert static(panel)[0] != picture, "around the current z"


def on_map(panel, z):
    """Row and column of the middle of the mark of z, on a map where another z has been marked."""
    panel.z = 0 * panel.z - 10  # in a corner
    before = pixels(panel.map.value)
    panel.z = z
    darker = (pixels(panel.map.value) - before).sum(2) < -100
    return [float(places.mean()) for places in np.nonzero(darker)]


def test_the_map_of_two_latents_has_them_as_they_are(data):
    panel = LatentExplorer(build(2), data)
    (row, column), (above, right) = on_map(panel, [0.0, 0.0]), on_map(panel, [1.0, 0.5])
    size = len(pixels(panel.map.value))
    assert abs(row - size / 2) < 3 and abs(column - size / 2) < 3
    assert above < row - 5 and right > column + 5


class Spread(nn.Module):
    """Codes of four latents, of which the third and the second are spread widest."""

    def encode(self, x, y=None):
        mean = 10 * x.flatten(1)[:, [290, 374, 400, 460]] * torch.tensor([0.01, 0.5, 1.0, 0.02])
        return Independent(Normal(mean, 0.1), 1)

    def decode(self, z, y=None):
        return Independent(Normal(z[:, :1, None, None].expand(-1, 1, 28, 28), 1.0), 3)


def test_the_map_is_the_plane_of_largest_variance(data):
    panel = LatentExplorer(Spread(), data)
    centre, *moved = [torch.tensor(on_map(panel, 2 * z)) for z in torch.cat([torch.zeros(1, 4), torch.eye(4)])]
    far = [float((place - centre).norm()) for place in moved]
    assert min(far[1:3]) > 10 and max(far[0], far[3]) < 3


def named(data, *classes):
    return LatentExplorer(build(), vh.ImageData(data.train, data.test, classes, "few", "digits"))


@pytest.mark.parametrize("name", ["_other", "$5", "a$b$", "Ä", "<b>"])
def test_the_name_of_every_class_is_on_the_map(data, name):
    others = data.classes[1:]
    shown, without = (pixels(named(data, first, *others).map.value) for first in (name, ""))
    assert (shown != without).any(2).sum() > 10


def test_more_classes_than_colours_are_told_apart(data):
    many = vh.Split(data.test.images, torch.arange(len(data.test)) % 12)
    data = vh.ImageData(data.train, many, tuple("abcdefghijkl"), "many", "digits")
    for place in (1, 11):  # of one colour
        names = [*data.classes]
        names[place] = "OTHER"
        assert named(data, *names).map.value != named(data, *data.classes).map.value


def test_the_readers_style_neither_moves_nor_breaks_nor_darkens_anything(data):
    usual = LatentExplorer(build(), data)
    expected = frame(usual), static(usual)[0]
    with plt.style.context(["dark_background", {
            "savefig.bbox": "tight", "savefig.format": "pdf", "savefig.dpi": 30, "savefig.transparent": True,
            "figure.dpi": 200, "font.size": 40, "axes.spines.left": False, "image.origin": "lower"}]):
        panel = LatentExplorer(build(), data)
        assert (frame(panel), static(panel)[0]) == expected
        assert plt.rcParams["savefig.format"] == "pdf" and plt.rcParams["figure.facecolor"] == "black"


class Spatial(nn.Module):
    def encode(self, x, y=None):
        return Independent(Normal(x, 1.0), 3)


@pytest.mark.parametrize("model, arguments, message", [
    (build(), {"num_sliders": 0}, "num_sliders"), (build(), {"num_sliders": 2.5}, "num_sliders"),
    (build(), {"num_sliders": "8"}, "num_sliders"), (build(image_shape=(3, 32, 32)), {}, "x is"),
    (Spatial(), {}, r"q\(z\|x\)")])
def test_bad_arguments(data, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentExplorer(model, data, **arguments)


def test_a_move_is_fast(data):
    panel, times = LatentExplorer(build(32), data), []
    slider = next(iter(panel.sliders.values()))
    for move in range(50):
        start = time.perf_counter()
        slider.value = -2 + move / 16
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.1


@pytest.fixture(scope="module")
def mnist():
    return vh.load_data("mnist")


def test_a_drawing_becomes_an_image_as_those_of_mnist(mnist):
    x = mnist.test[:100].batch()[0]
    large = torch.zeros(100, 1, 112, 112)
    large[..., 3:87, 20:104] = resize(x, [84, 84], antialias=True).clamp(0, 1)  # three times as large, off the middle
    made = torch.stack([like_mnist(one[0]) for one in large])
    assert made.shape == x.shape and (made - x).abs().mean() < 0.35 * x.mean()
    share = made[:, 0] / made.sum((1, 2, 3)).view(-1, 1, 1)
    for dim in (1, 2):
        centre = (share.sum(3 - dim) * torch.arange(28)).sum(1)
        assert (centre - 14).abs().max() < 0.6
    assert not like_mnist(torch.zeros(112, 112)).any()
    one_dot = torch.zeros(50, 70)
    one_dot[3, 4] = 1
    assert like_mnist(one_dot).sum() > 100, "a dot fills the box"


def test_the_pad_shows_what_the_model_makes_of_a_drawing(mnist):
    torch.manual_seed(0)
    model = vh.ConvVAE(latent_dim=5, channels=(4, 8), hidden=16).train()
    explorer = LatentExplorer(model, mnist, num_sliders=2)
    pad = DrawingPad(model, mnist, explorer=explorer)
    seen = {name: getattr(pad, name).value for name in ("image", "recon", "posterior", "map", "near")}
    ink = resize(mnist.test[:1].batch()[0], [112, 112])[0, 0]
    pad.canvas.ink = ink.mul(255).round().byte().numpy().tobytes()  # as the page sends it
    assert all(getattr(pad, name).value != before for name, before in seen.items())
    assert torch.equal(pad.x, like_mnist((ink * 255).round() / 255))
    means, _ = vh.encode_all(model, vh.Split((pad.x[None] > 0.5).mul(255).byte(), torch.zeros(1, dtype=torch.int64)))
    torch.testing.assert_close(pad.z, means[0])
    pad.buttons["send to the explorer"].click()
    assert torch.equal(explorer.z, pad.z) and model.training
    explorer.model = None
    pad.buttons["send to the explorer"].click()
    assert "Error" in pad.status.value, "what fails is said on the pad"
    pad.buttons["clear"].click()
    assert not pad.x.any()


@pytest.mark.parametrize("changed, name", [({"num_classes": 10}, "model"), ({"image_shape": (3, 32, 32)}, "data")])
def test_the_pad_refuses_what_cannot_be_drawn(mnist, changed, name):
    data = vh.load_data("photos") if name == "data" else mnist
    with pytest.raises(ValueError, match=name):
        DrawingPad(vh.ConvVAE(latent_dim=2, channels=(4, 8), hidden=16, **changed), data)
