"""Runs every notebook in the budget of VAE_BUDGET and prints, for each, the minutes it took and its peak memory.

    .venv/bin/python tests/tools/time_notebooks.py [notebooks/03*.ipynb ...]

Runs in a folder of its own, without checkpoints of earlier runs, one notebook after the other. Needs Linux or macOS.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    notebooks = [Path(name).resolve() for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    print(f"| notebook, {os.environ.get('VAE_BUDGET') or 'standard'} | minutes | peak memory, GB |", flush=True)
    print("| --- | --- | --- |", flush=True)
    for notebook in notebooks:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run = subprocess.Popen(
                [sys.executable, "-m", "nbconvert", "--execute", "--to", "notebook", "--output-dir", folder, "--log-level",
                 "ERROR", str(notebook)], cwd=ROOT, env={**os.environ, "VAE_OUT": folder})
            _, status, usage = os.wait4(run.pid, 0)  # the usage of its kernel is counted in: it waited for that
        if status:
            sys.exit(f"{notebook.name} failed")
        minutes = (time.perf_counter() - start) / 60
        print(f"| {notebook.name} | {minutes:.1f} | {usage.ru_maxrss / unit:.1f} |", flush=True)


if __name__ == "__main__":
    main()
