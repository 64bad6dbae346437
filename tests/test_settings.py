"""The environment variables, folders to write to, random numbers and devices; what `import vae_helpers` sets and loads."""

import ast
import json
import os
import shutil
import subprocess
import sys

import vae_helpers as vh  # isort: skip  # first: it sets how torch's threads wait

import nbformat
import pytest
import torch


@pytest.mark.parametrize("name, value", [("quick", 1), ("standard", 2), ("full", 3), ("", 2), (None, 2)])
def test_budget(monkeypatch, name, value):
    monkeypatch.delenv("VAE_BUDGET") if name is None else monkeypatch.setenv("VAE_BUDGET", name)
    assert vh.budget(quick=1, standard=2, full=3) == value


def test_an_unknown_budget(monkeypatch):
    monkeypatch.setenv("VAE_BUDGET", "fast")
    with pytest.raises(ValueError, match="VAE_BUDGET.*fast.*quick, standard, full"):
        vh.budget(1, 2, 3)


def test_device_is_usable():
    assert torch.ones(2, device=vh.device()).sum() == 2


# folders to write to


@pytest.mark.parametrize("name", ["images", "notebooks/weights"])
def test_only_full_writes_what_is_shipped(monkeypatch, tmp_path, name):
    monkeypatch.setenv("VAE_OUT", str(tmp_path))
    for budget in ("quick", "standard"):
        monkeypatch.setenv("VAE_BUDGET", budget)
        assert vh.output_dir(name) == tmp_path / "runs" / name and (tmp_path / "runs" / name).is_dir()
        assert vh.output_dir("checkpoints") == tmp_path / "checkpoints" and (tmp_path / "checkpoints").is_dir()
    assert not (tmp_path / name).exists()
    monkeypatch.setenv("VAE_BUDGET", "full")
    assert vh.output_dir(name) == tmp_path / name and (tmp_path / name).is_dir()
    assert vh.output_dir("checkpoints") == tmp_path / "checkpoints"


@pytest.mark.parametrize("value", [None, ""])
def test_without_vae_out_output_lies_in_the_project(monkeypatch, tmp_path, value):
    monkeypatch.delenv("VAE_OUT") if value is None else monkeypatch.setenv("VAE_OUT", value)
    monkeypatch.setattr(vh, "ROOT", tmp_path / "project")
    assert vh.output_dir("checkpoints") == tmp_path / "project/checkpoints"


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("VAE_OUT", "~/out")
    assert vh.output_dir("checkpoints") == tmp_path / "home/out/checkpoints"
    assert not (tmp_path / "~").exists()


def test_a_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VAE_OUT", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file.checkpoints.*VAE_OUT"):
        vh.output_dir("checkpoints")


def test_a_read_only_tree(monkeypatch, mount):
    monkeypatch.setenv("VAE_OUT", str(mount("size=64k,ro")))
    with pytest.raises(OSError, match="mounted.*checkpoints.*VAE_OUT"):
        vh.output_dir("checkpoints")


# random numbers


def test_seeded_leaves_the_random_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with vh.seeded(1):
        inside = torch.rand(3)
    with vh.seeded(1):
        assert torch.equal(inside, torch.rand(3))
    with vh.seeded(2):
        assert not torch.equal(inside, torch.rand(3))
    assert torch.equal(before, torch.get_rng_state())


def test_seeded_leaves_the_random_state_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt), vh.seeded(1):
        torch.rand(3)
        raise KeyboardInterrupt
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_seeded_holds_on_cuda():
    before = torch.cuda.get_rng_state()
    with vh.seeded(1):
        inside = torch.rand(3, device="cuda")
    with vh.seeded(1):
        assert torch.equal(inside, torch.rand(3, device="cuda"))
    assert torch.equal(before, torch.cuda.get_rng_state())


# import vae_helpers

IMPORTS = """
import json, os, sys, types


class Stop(BaseException):
    pass


class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise Stop


def policy_when_torch_is_loaded(before):
    os.environ.pop("OMP_WAIT_POLICY", None)
    os.environ.update(before)
    try:
        import vae_helpers
    except Stop:
        return os.environ.get("OMP_WAIT_POLICY")


sys.meta_path.insert(0, Watch())
seen = [policy_when_torch_is_loaded({}), policy_when_torch_is_loaded({"OMP_WAIT_POLICY": "ACTIVE"})]
sys.modules["torch"] = types.ModuleType("torch")
sys.modules["torch"].__path__ = []  # a package, whose parts the import asks for next
seen.append(policy_when_torch_is_loaded({}))
sys.version_info = (3, 9, 18, "final", 0)
try:
    import vae_helpers
except ImportError as error:
    seen.append(str(error))
print(json.dumps(seen))
"""


def test_what_import_does_before_torch_is_loaded():
    """The import is stopped where it asks for torch; the third time torch is there, then Python is an old one."""
    out = subprocess.run([sys.executable, "-c", IMPORTS], cwd=vh.ROOT, capture_output=True, text=True, check=True).stdout
    alone, set_by_the_reader, after_torch, on_old_python = json.loads(out)
    assert (alone, set_by_the_reader, after_torch) == ("PASSIVE", "ACTIVE", None)
    assert "Python 3.10" in on_old_python


def test_an_older_python_can_read_the_file_as_far_as_its_message():
    ast.parse((vh.ROOT / "vae_helpers.py").read_text(encoding="utf-8"), feature_version=(3, 9))


def test_import_loads_no_widgets():
    code = "import sys, vae_helpers; print([name for name in sys.modules if name.startswith(('ipywidgets', 'explorer'))])"
    out = subprocess.run([sys.executable, "-c", code], cwd=vh.ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


# the settings of a test run

CELL = """
import json, os, pathlib
seen = {name: os.environ.get(name) for name in ("VAE_BUDGET", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "VAE_OUT")}
seen["made"] = os.path.isdir(os.environ["VAE_OUT"])
pathlib.Path("../seen.json").write_text(json.dumps(seen))
"""


def test_a_notebook_alone_runs_under_the_settings_of_the_whole_run(tmp_path):
    """In a worker of pytest-xdist, which has a folder of its own; that of the process that started it is gone as well."""
    for name in ("pyproject.toml", "tests/settings.py", "notebooks/conftest.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(vh.ROOT / name, tmp_path / name)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbformat.write(notebook, tmp_path / "notebooks/one.ipynb")
    ours = ("VAE_BUDGET", "VAE_OUT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in ours} | {"TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "1", "notebooks/one.ipynb"], cwd=tmp_path, env=env,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    seen = json.loads((tmp_path / "seen.json").read_text())
    out = seen.pop("VAE_OUT")
    assert seen == {"VAE_BUDGET": "quick", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "made": True}
    assert out.startswith(f"{tmp_path}{os.sep}") and not list(tmp_path.glob("vae_tests_*"))
