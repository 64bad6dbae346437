"""Each notebook's outputs come from one full run of exactly its code, says the checksum that tests/tools/store.py wrote."""

import base64
import io
import sys

import nbformat
import numpy as np
import pytest
from cells import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "tests" / "tools"))

from store import code_checksum, is_stored, scrub, smaller, weights

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_come_from_a_full_run_of_this_code(path):
    assert is_stored(nbformat.read(path, as_version=4)), (
        f"the code of {path.name} changed: run tests/tools/store.py {path.name[:2]}")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_rest_on_the_weights_that_are_stored(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata["stored"]["weights"] == weights(notebook), (
        f"weights changed after {path.name} ran: run tests/tools/store.py {path.name[:2]}")


def code(*sources):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])


def test_the_checksum_sees_code_and_cells_and_nothing_else():
    notebook = code("a = 1", "print(a)")
    before = code_checksum(notebook)
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# Title"))
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    assert code_checksum(notebook) == before
    assert len({before, code_checksum(code("a = 2", "print(a)")), code_checksum(code("print(a)", "a = 1")),
                code_checksum(code("a = 1\n\nprint(a)"))}) == 4


def test_pictures_keep_their_pixels_in_fewer_bytes():
    pixels = np.random.default_rng(0).integers(0, 2, (40, 50, 3), dtype=np.uint8) * 255
    Image.fromarray(pixels).save(file := io.BytesIO(), format="PNG", compress_level=0)
    before = base64.b64encode(file.getvalue()).decode()
    after = smaller(before)
    assert len(after) < len(before)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(after)))), pixels)


def test_scrubbing_leaves_what_a_reader_sees(tmp_path):
    new, notebook = nbformat.v4.new_output, code("run()")
    cell = notebook.cells[0]
    cell.id, cell.metadata = "kept", {"tags": ["slow"], "execution": {"iopub.status.busy": "now"}}
    notebook.metadata["widgets"] = {}
    cell.outputs = [
        new("stream", name="stdout", text=f"wrote {ROOT}/images/a.png "), new("stream", name="stdout", text="and b\n"),
        new("stream", name="stderr", text=f"{tmp_path}/cell.py: UserWarning: careful"),
        new("display_data", {"text/plain": ""}),
        new("display_data", {"application/vnd.jupyter.widget-view+json": {}, "image/png": "", "text/plain": "a panel"}),
        new("execute_result", {"text/plain": f"PosixPath('{tmp_path}/checkpoints/run.pt')"})]
    assert "careful" in scrub(notebook, tmp_path)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}
    assert cell.id == "kept" and cell.metadata == {"tags": ["slow"]}
    texts = [output.get("text") or output.data["text/plain"] for output in cell.outputs]
    assert texts == ["wrote images/a.png and b\n", "a panel", "PosixPath('checkpoints/run.pt')"]
    assert not any("widget" in kind for output in cell.outputs for kind in output.get("data", {}))
