"""What a script does before its imports, which take seconds and need packages. Imports no package itself.

    if __name__ == "__main__":
        prepare()                                   # or prepare("numpy"), for a script that needs fewer packages
"""

import re
import signal
import sys
from importlib import metadata, util
from pathlib import Path

from support.files import UserError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def prepare(*names: str) -> None:
    """Let Ctrl-C end the process silently, and exit with one sentence when one of the packages `names` is missing."""
    end_on_ctrl_c()
    try:
        require_packages(*names)
    except UserError as error:
        sys.exit(f"error: {error}")


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and without a traceback: in a script's imports, until run() is called."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not when a shell has made it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def require_packages(*names: str) -> None:
    """Raise UserError unless the packages `names` are installed in the versions of requirements.txt. Default: all."""
    problems = []
    for line in REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.is_file() else ():
        name, minimum = line.split(">=")
        if not names or name in names:
            problems += name_problem(name, minimum)
    if problems:
        raise UserError(f"needs {', '.join(problems)}: pip install -r requirements.txt")


def name_problem(name: str, minimum: str) -> list[str]:
    """[] when the package `name` is installed in version `minimum` or newer, else what is needed and what is there."""
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        # pillow-simd and the packages of some systems install the module under another name or without a version.
        has_module = util.find_spec({"pillow": "PIL"}.get(name, name)) is not None
        return [] if has_module else [f"{name} {minimum} or newer (not installed)"]
    is_old = major_and_minor(found) < major_and_minor(minimum)
    return [f"{name} {minimum} or newer (this is {found})"] if is_old else []


def major_and_minor(version: str) -> list[int]:
    """[2, 11] of "2.11.0a0+git1234"."""
    return [int(number) for number in re.findall(r"\d+", f"{version}.0")[:2]]
