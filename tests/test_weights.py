"""Files of weights: what is written is read back, the shipped ones are what they say, and what is refused."""

import warnings

import pytest
import torch

import vae_helpers as vh

SHIPPED = sorted((vh.ROOT / "notebooks" / "weights").glob("*.pt"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return vh.ConvVAE((3, 8, 12), 5, 4, channels=(4, 8), hidden=16, blocks=1).eval()


def test_a_model_comes_back_with_its_configuration_and_info(model, tmp_path):
    vh.save_weights(model, tmp_path / "w.pt", source="nowhere", elbo=-1.5)
    loaded, info = vh.load_weights(tmp_path / "w.pt")
    assert info == {"source": "nowhere", "elbo": -1.5}
    assert loaded.config == model.config and not loaded.training
    x, y = torch.rand(2, 3, 8, 12), torch.tensor([0, 3])
    ours, theirs = model.encode(x, y).mean, loaded.cpu().encode(x, y).mean
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


def test_shipped_weights_are_small():
    assert SHIPPED, "no weights are shipped"
    assert all(path.stat().st_size < 4e6 for path in SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_weights_reach_their_stored_test_elbo(path):
    model, info = vh.load_weights(path)
    assert info["source"] == "MNIST" and {"elbo", "log_p", "num_samples", "epochs"} <= set(info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = vh.load_data("mnist").binarize_test(seed=0)
    if data.name != "mnist":
        pytest.skip("MNIST is not here")
    assert -vh.evaluate(model, data.test)["loss"] == pytest.approx(info["elbo"], abs=0.05)
    assert info["log_p"] > info["elbo"]


@pytest.mark.parametrize("content", [b"", b"not a file of torch", None])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "w.pt"
    if content is None:
        torch.save({"format": "something else"}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w.pt (is no whole|was not written by) .*weights.*another path"):
        vh.load_weights(path)


def test_a_half_written_file_is_refused(model, tmp_path):
    path = tmp_path / "w.pt"
    vh.save_weights(model, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="w.pt is no whole file of weights"):
        vh.load_weights(path)


def test_a_weight_that_16_bits_cannot_hold_is_refused(model, tmp_path):
    with torch.no_grad():
        next(model.parameters())[0] = 1e6
    with pytest.raises(ValueError, match="down.0.weight holds a weight beyond the range of float16"):
        vh.save_weights(model, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_a_model_that_the_file_could_not_describe_is_refused(tmp_path):
    tracked = vh.ConvVAE()
    tracked.register_buffer("updates", torch.zeros(()))
    own_class = type("Own", (vh.ConvVAE,), {})()
    for model in (tracked, own_class, vh.ConvVAE(likelihood=vh.LIKELIHOODS["bernoulli"])):
        with pytest.raises(ValueError, match="only a plain ConvVAE"):
            vh.save_weights(model, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_saving_leaves_the_random_state(model, tmp_path):
    before = torch.get_rng_state()
    vh.save_weights(model, tmp_path / "w.pt")
    assert torch.equal(before, torch.get_rng_state())
