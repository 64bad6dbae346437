"""Settings of every test run, that of a single notebook among them: each conftest.py imports this before torch is loaded."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "notebooks")]
os.environ.setdefault("VAE_BUDGET", "quick")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # equal bits are promised for the CPU alone
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers of pytest-xdist share the cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["VAE_OUT"] = tempfile.mkdtemp(prefix="vae_tests_")  # one for each process, so for each worker
atexit.register(shutil.rmtree, os.environ["VAE_OUT"], ignore_errors=True)
