"""Classes and functions that the cells of a notebook define, for tests of them."""

import ast
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def path_of(number: str) -> Path:
    """The notebook of a number such as "03"."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return path


def defined_in(number: str, *names: str, **given) -> dict:
    """The classes and functions ``names`` of a notebook, with its imports; ``given`` are the other names that they read."""
    path = path_of(number)
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            tree = ast.parse(cell.source)
            tree.body = [part for part in tree.body if isinstance(part, ast.Import | ast.ImportFrom)
                         or getattr(part, "name", None) in names]
            exec(compile(tree, path.name, "exec"), given)
    assert given.keys() >= set(names), f"{path.name} does not define all of {names}"
    return given
