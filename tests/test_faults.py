"""What a reader sees when the machine fails: a full disk, a read-only tree, a cut download, two runs of one checkpoint."""

import http.server
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from models import TinyVAE

import vae_helpers as vh

TRAIN = """
import sys, torch
torch.set_num_threads(1)  # several of these run at once
sys.path[:0] = [{root!r}, {tests!r}]
import vae_helpers as vh
from models import TinyVAE
digits = vh.load_data("digits").binarize_test()
few = vh.ImageData(digits.train[:300], digits.test[:100], digits.classes, "few", "first digits")
torch.manual_seed(0)
model = TinyVAE()
vh.fit(model, few, epochs={epochs}, transform=torch.bernoulli, checkpoint={checkpoint!r}, progress=False)
torch.save(model.state_dict(), {weights!r})
"""


def train_command(checkpoint, weights, epochs=30):
    code = TRAIN.format(root=str(vh.ROOT), tests=str(vh.ROOT / "tests"), epochs=epochs, checkpoint=str(checkpoint),
                        weights=str(weights))
    return [sys.executable, "-c", code]


@contextmanager
def mounted(folder, options):
    """A small file system of its own at ``folder``; the test is skipped where this user may not mount one."""
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_spares_the_checkpoint_of_the_last_epoch(few, tmp_path):
    with mounted(tmp_path / "small", "size=256k") as disk:
        model = TinyVAE()
        vh.fit(model, few, epochs=1, transform=torch.bernoulli, checkpoint=disk / "run.pt", progress=False)
        before = (disk / "run.pt").read_bytes()
        (disk / "rest").write_bytes(bytes(256 * 1024 - len(before) - 8192))
        with pytest.raises(OSError, match="cannot write .*run.pt.*Free some space.*unharmed"):
            vh._write(disk / "run.pt", lambda file: file.write(before))
        assert (disk / "run.pt").read_bytes() == before and {file.name for file in disk.iterdir()} == {"rest", "run.pt"}
        (disk / "rest").unlink()
        vh.fit(TinyVAE(), few, epochs=1, transform=torch.bernoulli, checkpoint=disk / "run.pt", progress=False)


def test_a_read_only_tree_is_named_before_any_work(few, tmp_path, monkeypatch):
    with mounted(tmp_path / "fixed", "size=64k,ro") as disk:
        monkeypatch.setenv("VAE_OUT", str(disk))
        with pytest.raises(OSError, match="cannot make .*checkpoints.*VAE_OUT"):
            vh.output_dir("checkpoints")
        seen = []
        with pytest.raises(OSError, match="cannot write .*run.pt"):
            vh.fit(TinyVAE(), few, epochs=1, transform=lambda x: seen.append(len(x)) or x.round(),
                   checkpoint=disk / "run.pt", progress=False)
        assert len(seen) == 1, "only the trial of one batch may come before"


class Cut(http.server.BaseHTTPRequestHandler):
    """Promises a file and breaks off in the middle of it."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(50_000))

    def log_message(self, *arguments):
        pass


class Nonsense(Cut):
    """Answers what is no HTTP at all."""

    def do_GET(self):
        self.wfile.write(b"sign in first\r\n")


@pytest.mark.parametrize("answer", [Cut, Nonsense])
def test_a_download_that_fails(tmp_path, monkeypatch, answer):
    with http.server.HTTPServer(("127.0.0.1", 0), answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(vh.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for _ in range(2):  # what the first attempt left behind must not be taken for the data by the second
            with pytest.warns(UserWarning, match="MNIST is not under .* could not be downloaded.*stand-in 'digits'"):
                assert vh.load_data("mnist", root=tmp_path).source.endswith("in place of MNIST")
        server.shutdown()


def test_two_runs_at_once_of_one_checkpoint_end_alike_and_leave_it_whole(tmp_path):
    runs = [subprocess.Popen(train_command(tmp_path / checkpoint, tmp_path / name), stderr=subprocess.PIPE, text=True)
            for checkpoint, name in (("alone.pt", "alone"), ("run.pt", "first"), ("run.pt", "second"))]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error
    assert subprocess.run(train_command(tmp_path / "run.pt", tmp_path / "again"), capture_output=True).returncode == 0
    expected = torch.load(tmp_path / "alone", weights_only=True)
    for name in ("first", "second", "again"):
        weights = torch.load(tmp_path / name, weights_only=True)
        assert all(torch.equal(weights[key], value) for key, value in expected.items()), name


def test_a_folder_for_output_that_cannot_be_made_is_named(monkeypatch):
    monkeypatch.setenv("VAE_OUT", "/proc/nowhere")
    with pytest.raises(OSError, match="cannot make /proc/nowhere.*Set VAE_OUT"):
        vh.output_dir("checkpoints")
