"""The environment variables and the pictures."""

import matplotlib.pyplot as plt
import pytest
import torch

import vae_helpers as vh


@pytest.mark.parametrize("name, value", [("quick", 1), ("standard", 2), ("full", 3), ("", 2), (None, 2)])
def test_budget(monkeypatch, name, value):
    monkeypatch.delenv("VAE_BUDGET") if name is None else monkeypatch.setenv("VAE_BUDGET", name)
    assert vh.budget(quick=1, standard=2, full=3) == value


def test_an_unknown_budget(monkeypatch):
    monkeypatch.setenv("VAE_BUDGET", "fast")
    with pytest.raises(ValueError, match="VAE_BUDGET is 'fast'; it must be one of quick, standard, full"):
        vh.budget(1, 2, 3)


def test_only_full_writes_the_pictures_of_the_readme(monkeypatch, tmp_path):
    monkeypatch.setenv("VAE_OUT", str(tmp_path))
    monkeypatch.setenv("VAE_BUDGET", "standard")
    assert vh.output_dir("images") == tmp_path / "runs/images"
    assert vh.output_dir("checkpoints") == tmp_path / "checkpoints"
    monkeypatch.setenv("VAE_BUDGET", "full")
    assert vh.output_dir("images") == tmp_path / "images" and (tmp_path / "images").is_dir()


def test_seeded_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with vh.seeded(1):
        inside = torch.rand(3)
    with vh.seeded(1):
        assert torch.equal(inside, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


def test_device_is_usable():
    assert torch.ones(2, device=vh.device()).sum() == 2


def test_show_images_draws_every_image_and_label():
    images = torch.rand(7, 3, 8, 8)
    figure = vh.show_images(images, columns=3, labels=list("abcdefg"), row_labels=["1", "2", "3"], title="seven")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    assert shown.shape[:2] == (3 * (8 + 2 + 2) - 2, 3 * 10 - 2)
    torch.testing.assert_close(torch.as_tensor(shown[12:20, 10:18]).permute(2, 0, 1), images[4])
    assert [text.get_text() for text in axes.texts] == list("abcdefg")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "2", "3"]
    assert axes.get_title() == "seven"
    with pytest.raises(ValueError, match=r"images are .*\[0, 3, 8, 8\]"):
        vh.show_images(images[:0])


def test_plot_history_has_a_panel_for_each_term_and_opens_no_window(few):
    from models import TinyVAE

    history = vh.fit(TinyVAE(), few, epochs=2, transform=torch.bernoulli, progress=False)
    figure = vh.plot_history(history, "digits")
    assert [axes.get_title() for axes in figure.axes] == ["-ELBO", "reconstruction log-likelihood", "KL(q(z|x) || p(z))"]
    assert all(axes.get_xlabel() == "updates" and axes.get_ylabel() == "nats per image" for axes in figure.axes)
    assert list(figure.axes[0].lines[1].get_xdata()) == [3, 6]
    assert not plt.get_fignums()


def test_plot_latents_colours_each_class_and_names_it():
    points, labels = torch.randn(30, 2), torch.arange(30) % 3
    figure = vh.plot_latents(points, labels, ("a", "b", "c"), "plane")
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b", "c"]
    drawn = [len(group.get_offsets()) for group in figure.axes[0].collections]
    assert drawn == [10, 10, 10] and not plt.get_fignums()
    with pytest.raises(ValueError, match=r"shape \[30, 3\] for 30 labels; they must be \[30, 2\]"):
        vh.plot_latents(torch.randn(30, 3), labels, ("a", "b", "c"))


def test_plot_manifold_runs_to_the_right_and_upwards():
    class Corner(torch.nn.Module):
        """One pixel on: its column follows z_1, its row z_2, so that the picture shows the axes of the grid."""

        latent_dim = 2

        def decode(self, z, y=None):
            images = torch.zeros(len(z), 1, 4, 4)
            images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.sigmoid(z).T
            return torch.distributions.Independent(torch.distributions.Normal(images, 1.0), 3)

    figure = vh.plot_manifold(Corner(), 3)
    shown = figure.axes[0].images[0].get_array()[:, :, 0]
    first, second = shown[::6, ::6], shown[::6, 1::6]
    assert (first[:, 0] < first[:, 2]).all() and (second[2] < second[0]).all()
    assert not plt.get_fignums()
    with pytest.raises(ValueError, match="latent_dim is 32; a manifold is drawn of a model of 2 latents"):
        vh.plot_manifold(vh.ConvVAE(channels=(4, 8), hidden=16))
