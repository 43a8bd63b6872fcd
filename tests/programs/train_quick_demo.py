"""Run train.py, whose --demo draws 48 faces, and which waits only 20 seconds for another machine."""

import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import preprocess  # noqa: E402
import train  # noqa: E402
from support import distributed  # noqa: E402
from support.cli import run  # noqa: E402

draw = preprocess.main
preprocess.main = lambda flags: draw(["--demo", "48", *flags[2:], "--workers", "0"])
distributed.TIMEOUT = timedelta(seconds=20)
run(train.main)
