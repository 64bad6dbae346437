"""What show_images, plot_history and table show, and the angle that slant measures."""

import io
import math

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import matplotlib.pyplot as plt
import pytest
import torch
from models import TinyVAE
from torchvision.transforms import v2

NAMES = ["_other", "a|b", "große Katze", "50 %", "x_1", "$", "{}", "_"]  # names of folders, so names of classes


@pytest.fixture(autouse=True)
def no_figure_of_another_test():
    yield
    plt.close("all")


def drawn(figure):
    """The figure, drawn as a notebook does it; no window stays open."""
    figure.savefig(io.BytesIO(), format="png")
    assert not plt.get_fignums()
    return figure


def texts(labels):
    return [label.get_text() for label in labels]


# show_images


def canvas(figure, rows, columns):
    """What the figure shows, [3, H, W], and the height and width of the place that each image has in it."""
    (axes,) = figure.axes
    shown = torch.as_tensor(axes.images[0].get_array()).permute(2, 0, 1)
    return shown, math.ceil(shown.shape[1] / rows), math.ceil(shown.shape[2] / columns)


def test_show_images_draws_every_image_and_label():
    images = torch.rand(7, 3, 8, 8)
    figure = drawn(vh.show_images(images, columns=3, labels=list("abcdefg"), row_labels=["1", "2", "3"],
                                  column_labels=["x", "y", "z"], title="seven"))
    (axes,) = figure.axes
    shown, height, width = canvas(figure, 3, 3)
    for i, (image, text) in enumerate(zip(images, axes.texts, strict=True)):
        top, left = i // 3 * height, i % 3 * width
        torch.testing.assert_close(shown[:, top:top + 8, left:left + 8], image)
        x, y = text.get_position()
        assert left < x < left + 8 < left + width and top + 8 <= y <= top + height, "below its image"
    assert shown[:, -height:, width:].min() == 1, "nothing stands where no image is"
    assert texts(axes.texts) == list("abcdefg") and axes.get_title() == "seven"
    assert texts(axes.get_yticklabels()) == ["1", "2", "3"] and texts(axes.get_xticklabels()) == ["x", "y", "z"]
    assert [tick // height for tick in axes.get_yticks()] == [0, 1, 2] == [tick // width for tick in axes.get_xticks()]


def test_a_row_is_no_wider_than_the_images():
    images = torch.rand(4, 1, 8, 8)
    shown, height, width = canvas(vh.show_images(images), 1, 4)
    assert 8 <= height < 12 and 8 < width < 12
    assert (shown[0] == shown[1]).all() and (shown[0] == shown[2]).all(), "grey"


def test_levels_and_outputs_of_a_network_are_shown(caplog):
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).repeat_interleave(4).view(1, 1, 3, 4)
    shown, *_ = canvas(vh.show_images(levels), 1, 1)
    assert shown[0, :3, 0].tolist() == pytest.approx([0, 0.2, 1])
    outside = torch.tensor([-1.0, 0.2, 2.0]).repeat_interleave(4).view(1, 1, 3, 4).requires_grad_()
    shown, *_ = canvas(vh.show_images(outside.to(vh.device())), 1, 1)
    assert shown[0, :3, 0].tolist() == pytest.approx([0, 0.2, 1]) and not caplog.records, "matplotlib had to clip"


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (3, 8, 8), (8, 8), (2, 3, 8, 8, 8), (4, 2, 8, 8), (4, 8, 8, 3)])
def test_what_is_no_batch_of_images(shape):
    with pytest.raises(ValueError, match="images"):
        vh.show_images(torch.rand(shape))
    assert not plt.get_fignums()


def test_no_name_is_special():
    figure = drawn(vh.show_images(torch.rand(len(NAMES), 1, 8, 8), columns=1, labels=NAMES, row_labels=NAMES))
    assert texts(figure.axes[0].texts) == NAMES == texts(figure.axes[0].get_yticklabels())


# plot_history


@pytest.mark.parametrize("beta, title", [(1, "-ELBO"), (4, "loss")])
def test_only_the_negative_elbo_is_called_so(beta, title):
    values = {"loss": [beta + 80.0, beta + 70.0], "recon": [-80.0, -70.0], "kl": [1.0, 1.0]}
    history = vh.History(train=values, test={"update": [1, 2], **values})
    assert vh.plot_history(history).axes[0].get_title() == title


def test_plot_history_has_a_panel_for_each_term(few):
    history = vh.fit(TinyVAE(), few, epochs=2, transform=torch.bernoulli, progress=False)
    figure = drawn(vh.plot_history(history, "digits"))
    assert texts(axes.title for axes in figure.axes) == [
        "-ELBO", "recon, log p(x|z)", "KL(q(z|x) || p(z))"]
    assert all(axes.get_xlabel() == "updates" and axes.get_ylabel() == "nats per image" for axes in figure.axes)
    assert figure.get_suptitle() == "digits"
    for axes, name in zip(figure.axes, history.train, strict=True):
        train, test = axes.lines
        assert list(train.get_xdata()) == [1, 2, 3, 4, 5, 6] and list(train.get_ydata()) == history.train[name]
        assert list(test.get_xdata()) == [3, 6] and list(test.get_ydata()) == history.test[name]
        assert len(texts(axes.get_legend().get_texts())) == 2


def history_of(**train):
    """A history of 20 updates in two epochs, whose held-out values are the last of each epoch."""
    return vh.History(train=train, test={"update": [10, 20]} | {name: [v[9], v[19]] for name, v in train.items()},
                      seconds=[1.0, 1.0])


def test_terms_of_a_loss_of_ones_own():
    figure = drawn(vh.plot_history(history_of(loss=[5.0] * 20, penalty=[1.0] * 20), ylabel="squared error"))
    assert texts(axes.title for axes in figure.axes) == ["loss", "penalty"]
    assert {axes.get_ylabel() for axes in figure.axes} == {"squared error"}


def test_a_steep_start_does_not_flatten_the_rest():
    low, high = vh.plot_history(history_of(loss=[1e6] + [100.0 - i for i in range(19)])).axes[0].get_ylim()
    assert low < 82 and high < 1000


def test_an_empty_history():
    with pytest.raises(ValueError, match="history"):
        vh.plot_history(vh.History())


# table


def cells(table):
    """The rows of a Markdown table as a reader sees them: lines of cells, without the line below the head."""
    head, line, *rows = [[cell.strip().replace("\\|", "|") for cell in row.replace("\\|", "\0").strip("| ").split("|")]
                         for row in table.data.splitlines()]
    assert len(line) == len(head) and all(set(cell) <= set("-: ") and "-" in cell for cell in line)
    return [[cell.replace("\0", "|") for cell in row] for row in (head, *rows)]


def test_a_table_holds_its_rows():
    table = vh.table(["model", "nats"], [["VAE", 91.5], ["IWAE", "84.8 ± 0.2"], ["none", None]])
    assert cells(table) == [["model", "nats"], ["VAE", "91.5"], ["IWAE", "84.8 ± 0.2"], ["none", "None"]]
    assert cells(vh.table(["alone"], [])) == [["alone"]]


def test_a_bar_within_a_cell_parts_nothing():
    rows = [["log p(x|z)", "|"], *([name, "1"] for name in NAMES)]
    assert cells(vh.table(["log p(x|y)", "n"], rows)) == [["log p(x|y)", "n"], *rows]


@pytest.mark.parametrize("row", [["VAE"], ["VAE", 1, 2], []])
def test_a_row_of_another_length(row):
    with pytest.raises(ValueError, match="rows"):
        vh.table(["model", "nats"], [["a", 1], row])


# slant


@pytest.mark.parametrize("angle", [-25.0, 0.0, 10.0])
def test_slant_of_a_sheared_bar(angle):
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 4:24, 13:15] = 1
    leaning = v2.functional.affine(bar, 0.0, [0, 0], 1.0, [angle, 0.0], v2.InterpolationMode.BILINEAR)
    assert float(vh.slant(leaning)) == pytest.approx(angle, abs=0.5)
    moved = torch.roll(leaning, (3, -4), (2, 3))
    assert float(vh.slant(moved * 0.5)) == pytest.approx(angle, abs=0.5), "neither place nor ink may matter"
    levels = (leaning * 255).to(torch.uint8)
    both = vh.slant(torch.cat([levels, levels.flip(3)]))
    assert both.tolist() == pytest.approx([angle, -angle], abs=0.5)


def test_slant_of_an_empty_image_is_zero():
    assert vh.slant(torch.zeros(2, 1, 28, 28)).tolist() == [0.0, 0.0]
