"""Sets the short budget and a folder of its own for everything that the tests and the notebooks under test write."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("VAE_BUDGET", "quick")
os.environ["VAE_OUT"] = tempfile.mkdtemp(prefix="vae_tests_")


@pytest.fixture(scope="session")
def digits():
    import vae_helpers as vh

    return vh.load_data("digits").binarize_test()


@pytest.fixture
def few(digits):
    """A data set that one epoch of a small model passes in a fraction of a second."""
    import vae_helpers as vh

    return vh.ImageData(digits.train[:300], digits.test[:100], digits.classes, "few", "first digits")
