"""The settings of a test run, before torch is loaded, and what several files of tests use."""

import shutil
import subprocess

import pytest
import settings  # noqa: F401


@pytest.fixture(scope="session")
def digits():
    import vae_helpers as vh

    return vh.load_data("digits").binarize_test()


@pytest.fixture
def few(digits):
    """A data set that one epoch of a small model passes in a fraction of a second."""
    import vae_helpers as vh

    return vh.ImageData(digits.train[:300], digits.test[:100], digits.classes, "few", "first digits")


@pytest.fixture
def mount(tmp_path):
    """A function of mount's options that gives a small file system of its own; skips where this user may not mount one."""
    folder = tmp_path / "mounted"

    def mount_with(options):
        folder.mkdir()
        if shutil.which("mount") is None or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        return folder

    yield mount_with
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)
