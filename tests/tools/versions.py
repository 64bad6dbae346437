"""Runs the tests with the oldest and the newest packages that requirements.txt admits, each in a clean environment.

    .venv/bin/pip install uv && .venv/bin/python tests/tools/versions.py [--end lowest] [3.10 3.13 ...]

For each Python named, or 3.10 to 3.13: uv makes the environment (it fetches a Python that the machine lacks) and
installs the lowest and then the highest versions that come built for it, or those of one --end only. Then ``pytest`` runs
there as the README has it. Prints a table; exits with 1 when tests fail. An environment takes several GB of disk and
about ten minutes on two cores.
"""

import argparse
import importlib.util
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


def summary(output: str) -> str:
    """The counts and the minutes in the last line of pytest, with or without its frame."""
    last = (output.strip().splitlines() or [""])[-1]
    seconds = re.search(r"in ([\d.]+)s", last)
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)\b", last)
    return ", ".join([*counts, f"{float(seconds[1]) / 60:.1f} minutes"]) if counts and seconds else last or "no output"


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
        env = {name: value for name, value in os.environ.items() if not name.startswith(("VAE_", "PYTEST_"))}
        run = subprocess.run([Path(folder) / ".venv/bin/pytest"], cwd=folder, capture_output=True, text=True, env=env)
        failed = [f"`{test}`" for test in re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)]
        python, rest = versions.split(" | ", 1)
        return f"| {python} | {end} | {rest} | {' '.join([summary(run.stdout), *failed[:5]])} |", not run.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--end", choices=ENDS)
    options = parser.parse_args()
    if importlib.util.find_spec("uv") is None:
        parser.error("uv is not installed: .venv/bin/pip install uv")
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
