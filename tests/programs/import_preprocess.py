"""Import preprocess.py. The exit code is 1 when that has imported torch, else 0."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import preprocess  # noqa: E402, F401

sys.exit("torch" in sys.modules)
