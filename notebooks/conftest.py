"""The settings of the whole test run for `pytest notebooks/one.ipynb`, which does not load tests/conftest.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import settings  # noqa: F401
