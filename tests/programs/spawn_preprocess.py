"""Run preprocess.py with spawned worker processes, the way Windows and macOS start them."""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import preprocess  # noqa: E402
from support.cli import run  # noqa: E402

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    run(preprocess.main)
