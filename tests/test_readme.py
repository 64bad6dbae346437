"""README.md and tests/README.md: links lead somewhere, and each number of a row or caption stands in the notebook it links.

``python tests/test_readme.py`` copies the pictures that are outputs of notebooks to images/ anew.
"""

import base64
import re

import nbformat
import pytest
from cells import ROOT, path_of

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = re.findall(r"^\|.*notebooks/.*\|$", README[README.index("## Results"):], re.M)
CAPTIONS = re.findall(r"(?s)<td.*?</td>", README)
MAP = re.findall(r"^\| \[(\d\d [^]]+)\]\(([^)]+)\) \|.*\| (.+) \| (.+) / (.+) \|$", README, re.M)
PICTURES = {"levels.png": ("05", "Levels kept from the test image"),  # name in images/ -> notebook, a title in its cell
            "continuations.png": ("09", "Half an image has several continuations")}


def notebook(number):
    return nbformat.read(path_of(number), as_version=4)


def numbers(text):
    """The numbers in ``text`` as they are written, without commas; not those within names such as CIFAR-10."""
    return {number.replace(",", "") for number in re.findall(r"(?<![\w.-])-?\d+(?:,\d{3})*(?:\.\d+)?", text)}


def missing(text):
    """The numbers in ``text`` that no notebook which it links has printed."""
    linked = re.findall(r"notebooks/(\d\d)_", text)
    assert linked, f"no notebook is linked: {text}"
    printed = "\n".join(output.get("text") or output.data.get("text/markdown", "") for number in linked
                        for cell in notebook(number).cells for output in cell.get("outputs", []))
    return numbers(re.sub(r"(?s)\[[^]]*\]\([^)]*\)|<a .*?</a>|<[^>]*>", "", text)) - numbers(printed)


def stored_picture(number, title):
    (cell,) = (cell for cell in notebook(number).cells if cell.cell_type == "code" and title in cell.source)
    (png,) = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return base64.b64decode(png)


def first_cell(result):
    return result.split("|")[1].split("(")[0].strip()


@pytest.mark.parametrize("row", RESULTS, ids=first_cell)
def test_a_result_is_printed_in_its_notebook(row):
    assert not missing(row)


@pytest.mark.parametrize("row", RESULTS, ids=first_cell)
def test_a_result_names_the_machine_that_ran_it(row):
    before = README[:README.index(row)]
    head = before[before.rindex("\n| model |"):]
    assert notebook(re.search(r"notebooks/(\d\d)_", row)[1]).metadata["stored"]["machine"] in head


@pytest.mark.parametrize("caption", CAPTIONS, ids=lambda text: re.search(r"images/([\w.]+)", text)[1])
def test_the_numbers_of_a_caption_are_printed_in_its_notebook(caption):
    assert not missing(caption)


@pytest.mark.parametrize("title, path, reading, standard, full", MAP, ids=[entry[0][:2] for entry in MAP])
def test_the_map_has_the_title_and_the_minutes_of_the_notebook(title, path, reading, standard, full):
    stored = nbformat.read(ROOT / path, as_version=4)
    first = stored.cells[0].source
    said = {name: int(minutes) for name, minutes in re.findall(r"(Reading|Running): (\d+) minute", first)}
    assert first.startswith(f"# {title}")
    assert said == {"Reading": int(reading), "Running": int(standard)}
    assert abs(stored.metadata["stored"]["minutes"] - int(full)) <= 0.5


def test_every_notebook_is_in_the_map():
    assert [path for _, path, *_ in MAP] == [
        f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_links_lead_somewhere_and_pictures_have_a_text(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if not target.startswith(("http", "#")):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), target
    assert not re.search(r'!\[\]|<img(?![^>]*alt="\w)', text), "a picture without alternative text"


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_stored_output_of_its_notebook(name):
    assert (ROOT / "images" / name).read_bytes() == stored_picture(*PICTURES[name]), "run python tests/test_readme.py"


def test_the_page_for_contributors_names_every_test_and_tool():
    page = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    for path in [*(ROOT / "tests").glob("*.py"), *(ROOT / "tests/tools").glob("*.py")]:
        assert f"`{path.name}`" in page, path.name


if __name__ == "__main__":
    for name, place in PICTURES.items():
        (ROOT / "images" / name).write_bytes(stored_picture(*place))
