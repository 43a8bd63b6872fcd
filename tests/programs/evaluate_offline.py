"""Run evaluate.py on a machine without network: every connection fails."""

import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import evaluate  # noqa: E402
from support.cli import run  # noqa: E402


def fail(*_, **__):
    raise OSError("offline")


socket.create_connection = fail
run(evaluate.main)
