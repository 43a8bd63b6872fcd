"""Run a script, and send Ctrl-C to it when it imports a module: interrupt_imports.py MODULE SCRIPT FLAGS"""

import importlib.abc
import runpy
import signal
import sys
from pathlib import Path


class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == module:
            signal.raise_signal(signal.SIGINT)


_, module, *sys.argv = sys.argv
script = Path(sys.argv[0])
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
sys.path.insert(0, str(script.parent))
sys.meta_path.insert(0, Interrupt())
runpy.run_path(str(script), run_name="__main__")
