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
