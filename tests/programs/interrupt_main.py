"""Receive Ctrl-C in main(), after the preparations of a script."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support.cli import end_on_ctrl_c, run  # noqa: E402

end_on_ctrl_c()
run(lambda: signal.raise_signal(signal.SIGINT))
