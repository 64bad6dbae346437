"""Runs notebooks from top to bottom in ``full`` and stores them with their outputs and a checksum of the code.

    .venv/bin/python tests/tools/store.py 03 notebooks/04_latent_space.ipynb
    .venv/bin/python tests/tools/store.py --check
    .venv/bin/python tests/tools/store.py --budget quick --out /tmp/trial 03

A run begins without checkpoints: all that it writes goes to a folder of its own. Only when every cell has run do its
pictures and weights move to images/ and notebooks/weights/, and last the notebook. When a cell fails the project is as
before; the folder stays, with the notebook as far as it came. ``--out`` leaves the results of a run in that folder and the
project alone; budgets shorter than ``full`` need it. ``--check`` only names the notebooks whose code has changed since
their stored run, and exits with 1 where there is one.
"""

import argparse
import base64
import datetime
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = ("images", "notebooks/weights")  # what a full run replaces in the project


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code_checksum(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the sources of the code cells, in order; where one cell ends and the next begins counts, too."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_cells(notebook)]).encode()).hexdigest()


def weights(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Checksums of the files in notebooks/weights that the code names: one notebook's outputs rest on another's run."""
    code = "".join(cell.source for cell in code_cells(notebook))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            for path in sorted((ROOT / "notebooks/weights").glob("*.pt")) if path.name in code}


def is_stored(notebook: nbformat.NotebookNode) -> bool:
    """Whether the outputs come from a ``full`` run of exactly this code."""
    stored = notebook.metadata.get("stored", {})
    return stored.get("code") == code_checksum(notebook) and stored.get("budget") == "full"


def machine() -> str:
    """The device that trains, in a line: the accelerator's name, or the CPU's with the number of its cores."""
    sys.path.insert(0, str(ROOT))
    import vae_helpers as vh  # isort: skip
    import torch

    if vh.device().type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    name = model[1].strip() if model else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}" + (
        "" if vh.device().type == "cpu" else f", {vh.device()}")


def without_folders(text: str, out: Path) -> str:
    """``text`` without the names of folders that only this machine has."""
    for folder in (out, ROOT, Path(sys.prefix), Path(tempfile.gettempdir()), Path.home()):
        for name in {str(folder), str(folder.resolve())} - {"/"}:
            text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?:/|\b)", "", text)
    return text


def smaller(png: str) -> str:
    """A PNG file in base64, the same pixels in as few bytes as Pillow can; an animation as it is."""
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            return png
        picture.save(file := io.BytesIO(), format="PNG", optimize=True, dpi=picture.info.get("dpi", (72, 72)))
    again = base64.b64encode(file.getvalue()).decode()
    return min(png, again, key=len)


def scrub(notebook: nbformat.NotebookNode, out: Path) -> str:
    """Leaves the outputs that a reader without a kernel can see; returns what cells wrote to stderr, which goes."""
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"}})
    errors = ""
    for cell in code_cells(notebook):
        for name in ("execution", "collapsed", "scrolled", "widgets"):
            cell.metadata.pop(name, None)
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream":
                if output.name == "stderr":
                    errors += output.text
                elif kept and kept[-1].output_type == "stream":
                    kept[-1].text += without_folders(output.text, out)
                else:
                    output.text = without_folders(output.text, out)
                    kept.append(output)
                continue
            for kind in [kind for kind in output.data if "widget" in kind]:
                del output.data[kind]
            for kind, value in output.data.items():
                if kind.startswith("text/"):
                    output.data[kind] = without_folders(value, out)
                elif kind == "image/png" and value:
                    output.data[kind] = smaller(value)
            if any(value != "" for value in output.data.values()):  # a progress line leaves an empty one
                kept.append(output)
        cell.outputs = kept
    return errors


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    beside = path.with_name(path.name + ".tmp")
    nbformat.write(notebook, beside)
    beside.replace(path)


def run(path: Path, budget: str, out: Path, here: Path) -> str:
    """Runs the notebook at ``path``, which writes under ``out``, and stores it in ``here``; returns a line about it."""
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    os.environ.update(VAE_BUDGET=budget, VAE_OUT=str(out))
    start = time.perf_counter()
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False, store_widget_state=False,
                            resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute()
    except CellExecutionError as error:
        write(notebook, out / path.name)
        raise RuntimeError(f"{path.name} failed, see {out / path.name}: {error.ename}: {error.evalue}") from error
    minutes = (time.perf_counter() - start) / 60
    if [cell.source for cell in code_cells(nbformat.read(path, as_version=4))] != [c.source for c in code_cells(notebook)]:
        raise RuntimeError(f"{path.name} was edited while it ran; nothing is stored, the run is in {out}")
    errors = scrub(notebook, out)
    notebook.metadata["stored"] = {
        "code": code_checksum(notebook), "budget": budget,
        "versions": {"python": platform.python_version()} | {
            name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        "machine": machine(), "minutes": round(minutes, 1), "date": datetime.date.today().isoformat()}
    if here == ROOT / "notebooks":
        for name in WRITTEN:
            if (out / name).is_dir():
                shutil.copytree(out / name, ROOT / name, dirs_exist_ok=True)
    notebook.metadata["stored"]["weights"] = weights(notebook)
    write(notebook, here / path.name)
    size = (here / path.name).stat().st_size / 1e6
    return f"{path.name}: {budget}, {minutes:.1f} minutes, {size:.2f} MB" + (
        f"; left out of stderr: {' '.join(errors.split())[:300]}" if errors.strip() else "")


def find(name: str) -> Path:
    """The notebook of a path or a number."""
    found = [Path(name)] if name.endswith(".ipynb") else sorted((ROOT / "notebooks").glob(f"{name}_*.ipynb"))
    if len(found) != 1 or not found[0].is_file():
        raise SystemExit(f"{name} is neither the path nor the number of a notebook")
    return found[0].resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", help="paths, or numbers such as 03")
    parser.add_argument("--check", action="store_true", help="only name the notebooks that must be run again")
    parser.add_argument("--budget", choices=("quick", "standard", "full"), default="full")
    parser.add_argument("--out", type=Path, help="write there, not into the project")
    options = parser.parse_args()
    paths = [find(name) for name in options.notebooks]
    if options.check:
        stale = [path for path in paths or sorted((ROOT / "notebooks").glob("*.ipynb"))
                 if not is_stored(nbformat.read(path, as_version=4))]
        print("\n".join(f"{path.name}: run it, its code is not that of a stored run" for path in stale) or "all are stored")
        sys.exit(bool(stale))
    if not paths:
        parser.error("name at least one notebook, such as 03")
    if options.out is None and options.budget != "full":
        parser.error(f"--budget {options.budget} needs --out: only full runs are stored in the project")
    if options.out and options.out.resolve().is_relative_to(ROOT / "notebooks"):
        parser.error("--out lies in notebooks/; choose a folder outside it")
    for path in paths:
        out = (options.out or Path(tempfile.mkdtemp(prefix=f"store_{path.stem}_"))).resolve()
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of an earlier run into the same --out
        try:
            print(run(path, options.budget, out, out if options.out else ROOT / "notebooks"), flush=True)
        except RuntimeError as error:
            sys.exit(str(error))
        if not options.out:
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
