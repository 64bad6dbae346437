"""Runs the tests with the oldest and the newest packages that requirements.txt admits, each in a clean environment.

    .venv/bin/pip install uv && .venv/bin/python tests/versions.py [--end lowest] [3.10 3.13 ...]

For each Python named, or 3.10 to 3.13: uv makes the environment (it fetches a Python that the machine lacks) and
installs the lowest and then the highest versions that come built for it, or those of one --end only. Prints a table;
exits with 1 when tests fail. An environment takes several GB of disk and about ten minutes on two cores.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from planted_errors import copy_project

ENDS = {"lowest": "lowest-direct", "highest": "highest"}  # name -> uv's
PRINT = "import sys, torch, torchvision, numpy; print(sys.version.split()[0], torch.__version__, torchvision.__version__, " \
        "numpy.__version__, sep=' | ')"


def tested(python: str, end: str) -> tuple[str, bool]:
    """A row of the table, and whether the tests passed or there is no such Python here."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        uv, inside = [sys.executable, "-m", "uv"], Path(folder) / ".venv/bin/python"
        if subprocess.run([*uv, "venv", "-q", "--python", python, Path(folder) / ".venv"], capture_output=True).returncode:
            return f"| {python} | {end} | | | | no such Python here |", True
        installed = subprocess.run([
            *uv, "pip", "install", "-q", "--python", inside, "--resolution", ENDS[end], "--only-binary", ":all:", "-r",
            "requirements.txt"], cwd=folder, capture_output=True, text=True)
        if installed.returncode:
            return f"| {python} | {end} | | | | not installed: {installed.stderr.strip().splitlines()[-1]} |", False
        versions = subprocess.run([inside, "-c", PRINT], capture_output=True, text=True, check=True).stdout.strip()
        run = subprocess.run([inside, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=folder, capture_output=True,
                             text=True, env={**os.environ, "VAE_BUDGET": "quick"})
        summary = re.findall(r"\d+ (?:failed|passed|skipped|error)[^,]*", run.stdout.splitlines()[-1])
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
        python, rest = versions.split(" | ", 1)
        return f"| {python} | {end} | {rest} | {', '.join(summary)} {' '.join(failed[:5])}|", not run.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--end", choices=ENDS)
    options = parser.parse_args()
    print("| Python | packages | torch | torchvision | numpy | tests |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    passed = True
    for python in options.pythons:
        for end in [options.end] if options.end else ENDS:
            row, good = tested(python, end)
            print(row, flush=True)
            passed = passed and good
    sys.exit(not passed)


if __name__ == "__main__":
    main()
