"""Files of binary images (notebooks/bits_back.py), and what the functions of notebook 09 refuse."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cells import defined_in

import vae_helpers as vh

import bits_back  # isort: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return vh.ConvVAE((1, 28, 28), 4, channels=(2, 4), hidden=8).eval()


@pytest.fixture
def images(digits):
    return digits.test.images[:7]


@pytest.fixture
def file(model, images, tmp_path):
    bits_back.write(tmp_path / "digits.vae", model, images)
    return tmp_path / "digits.vae"


def test_a_file_comes_back_bit_for_bit(model, images, file):
    assert torch.equal(bits_back.read(file, model), images)


def test_a_model_in_train_mode_stays_so_and_reads_the_same(model, images, file):
    assert torch.equal(bits_back.read(file, model.train()), images) and model.training


def test_it_grows_by_the_negative_elbo(digits, tmp_path):
    trained, _ = vh.load_weights(vh.ROOT / "notebooks/weights/mnist.pt")
    bits = bits_back.write(tmp_path / "a.vae", trained, digits.test.images[:60])
    expected = vh.evaluate(trained, digits.test[:60])["loss"] / np.log(2)
    assert len(bits) == 61 and abs((bits[-1] - bits[0]) / 60 / expected - 1) < 0.02


@pytest.mark.parametrize("width", ["default", "avx2"])
def test_a_fresh_process_on_another_processor_reads_it(model, images, file, tmp_path, width):
    torch.save({"config": model.config, "state": model.state_dict(), "info": {}}, tmp_path / "weights.pt")
    code = ("import sys; sys.path[:0] = sys.argv[1:3]; import vae_helpers as vh, bits_back, torch\n"
            "model, _ = vh.load_weights(sys.argv[3]); torch.save(bits_back.read(sys.argv[4], model), sys.argv[5])")
    subprocess.run([sys.executable, "-c", code, vh.ROOT, vh.ROOT / "notebooks", tmp_path / "weights.pt", file,
                    tmp_path / "out.pt"], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": width})
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), images)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:100] + bytes([b[100] ^ 1]) + b[101:], lambda b: b"",
                                    lambda b: b + b"x", lambda b: b"x" + b[1:], lambda b: b[:20]])
def test_a_damaged_file_is_refused(model, file, damage):
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="path"):
        bits_back.read(file, model)


def test_a_file_of_other_weights_is_refused(model, file):
    with torch.no_grad():
        model.up[-1].bias += 1e-6
    with pytest.raises(ValueError, match="model"):
        bits_back.read(file, model)


def test_images_that_do_not_fit_are_refused_and_nothing_is_written(model, images, tmp_path):
    for wrong in (images[:, :, 4:], images[:0], images[0], images.float(), images // 2, torch.cat([images] * 3, 1)):
        with pytest.raises(ValueError, match="images"):
            bits_back.write(tmp_path / "a.vae", model, wrong)
    assert not (tmp_path / "a.vae").exists()


@pytest.mark.parametrize("settings", [{"num_classes": 3}, {"likelihood": "logistic"}])
def test_a_model_that_does_not_fit_is_refused(images, tmp_path, settings):
    with pytest.raises(ValueError, match="model"):
        bits_back.write(tmp_path / "a.vae", vh.ConvVAE((1, 28, 28), 4, **settings), images)


@pytest.fixture(scope="module")
def notebook_09():
    torch.manual_seed(0)
    return defined_in("09", "block", "cnn", "M2", "fit_posterior", "nearest", "visible_log_p", "fill_in", K=10, starts=1,
                      steps=1, here=torch.device("cpu"), model=vh.ConvVAE())


def test_labels_that_do_not_name_every_class_are_refused(notebook_09, digits):
    few = digits.train[:200]
    assert notebook_09["M2"](few).elbo(few.batch()[0][:2].round(), torch.arange(10)).shape == (2, 10)
    for labels in (few.labels + 1, few.labels.clamp(max=8), few.labels - 1):
        with pytest.raises(ValueError, match="labels"):
            notebook_09["M2"](vh.Split(few.images, labels))


def test_all_or_no_pixels_hidden_are_refused(notebook_09, digits):
    x, visible = digits.test[:2].batch()[0], torch.zeros(28, 28, dtype=torch.bool)
    for wrong in (visible, ~visible, visible[:14], visible[None]):
        with pytest.raises(ValueError, match="visible"):
            notebook_09["fill_in"](x, wrong)
    with pytest.raises(ValueError, match="x is"):
        notebook_09["fill_in"](x[..., 4:], visible)
