"""Writes docs/<script>-help.txt, what `python <script>.py --help` prints.

    python docs/write_help.py
"""

import os
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
SCRIPTS = ("preprocess", "train", "generator", "evaluate")


def help_text(script: str) -> str:
    """The output of --help, 100 columns wide."""
    environment = os.environ | {"COLUMNS": "100", "PYTHONUTF8": "1"}
    command = [sys.executable, DOCS.parent / f"{script}.py", "--help"]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True).stdout


if __name__ == "__main__":
    for name in SCRIPTS:
        (DOCS / f"{name}-help.txt").write_text(help_text(name), encoding="utf-8")
