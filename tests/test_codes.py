"""The measures, quantizers and prior of notebook 10, taken from its cells."""

import math

import pytest
import torch
from cells import defined_in


@pytest.fixture(scope="module")
def cells():
    return defined_in("10", "beta_loss", "dense", "DenseVAE", "straight_through", "nearest", "check_codes", "Codebook",
                      "FSQ", "VQVAE", "vq_loss", "patches", "k_means", "CodePrior", here=torch.device("cpu"))


@pytest.mark.parametrize("beta", [-1, math.nan, math.inf, -math.inf])
def test_a_beta_that_is_no_price_is_refused(cells, beta):
    with pytest.raises(ValueError, match="beta"):
        cells["beta_loss"](beta)


def test_beta_weighs_the_kl_alone(cells, digits):
    torch.manual_seed(0)
    model, (x, y) = cells["DenseVAE"](digits.image_shape), digits.test[:5].batch()
    for beta in (0, 0.5, 4):
        values = cells["beta_loss"](beta)(model, x, y)
        assert torch.allclose(values["loss"], beta * values["kl"] - values["recon"])


@pytest.mark.parametrize("make", [lambda cells: cells["Codebook"](1), lambda cells: cells["Codebook"](0),
                                  lambda cells: cells["FSQ"]((1, 1)), lambda cells: cells["check_codes"](50, 49)])
def test_a_number_of_codes_that_does_not_fit_is_refused(cells, make):
    with pytest.raises(ValueError, match="num_codes"):
        make(cells)


def test_more_centres_than_patches_are_refused_before_k_means(cells, digits):
    cells["data"], cells["x_test"] = digits, digits.test[:3].batch()[0]
    with pytest.raises(ValueError, match="num_codes"):
        cells["k_means"](1_000_000)
    p_x = cells["k_means"](4)
    assert p_x.mean.shape == cells["x_test"].shape and len(cells["patches"](p_x.mean).flatten(0, 1).unique(dim=0)) <= 4


@pytest.mark.parametrize("restart", [False, True])
def test_restarts_bring_dead_vectors_back(cells, restart):
    torch.manual_seed(0)
    book = cells["Codebook"](16, 2, restart=restart, gamma=0.5)
    book.e[1:] += 100  # only the first is near
    for _ in range(20):
        book(torch.randn(64, 2))
    used = cells["nearest"](torch.randn(500, 2), book.e).unique()
    assert len(used) > 8 if restart else used.tolist() == [0]


def test_the_codebook_moves_in_training_only(cells):
    book = cells["Codebook"](4, 2).eval()
    before = book.e.clone()
    book(torch.randn(9, 2))
    assert torch.equal(book.e, before)


def test_fsq_gives_vectors_of_its_codebook_and_a_gradient(cells):
    quantizer, h = cells["FSQ"]((3, 2)), torch.randn(50, 7, 2, requires_grad=True)
    z, distance = quantizer(h)
    assert torch.cdist(z.flatten(0, 1), quantizer.e).min(1).values.max() < 1e-6 and not distance.any()
    z.sum().backward()
    assert (h.grad > 0).all() and len(cells["nearest"](z, quantizer.e).unique()) == 6


def test_images_and_codes_of_a_vq_vae_fit_each_other(cells, digits):
    torch.manual_seed(0)
    model, (x, y) = cells["VQVAE"](digits.image_shape, cells["Codebook"](8, restart=False)).eval(), digits.test[:3].batch()
    k = model.encode(x)
    assert k.shape == (3, 49) and model.decode(k).mean.shape == x.shape
    recon = cells["vq_loss"](model, x, y)["recon"]
    assert torch.allclose(model.decode(k).log_prob(x), recon, atol=1e-3), "the decoder sees the numbers alone"


def test_the_prior_of_codes_samples_by_its_own_probabilities(cells):
    torch.manual_seed(0)
    prior, y = cells["CodePrior"](2, 3, 2, width=8, layers=1).eval(), torch.ones(20_000).long()
    k = prior.sample(y)
    grids = torch.cartesian_prod(*[torch.arange(2)] * 3)
    with torch.no_grad():
        expected = prior.log_prob(grids, y[:8]).exp()
    share = (k[:, None] == grids).all(2).float().mean(0)
    assert torch.allclose(share, expected, atol=0.015)
