"""What a script does before the imports that take seconds. Imports no package itself.

    if __name__ == "__main__":
        prepare(parse_args, check_args)             # or prepare(packages=("numpy",)), for a script that needs fewer
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path

from support.cli import end_on_ctrl_c, run
from support.cores import count_affinity, count_cores
from support.files import UserError

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def prepare(
    parse_args: Callable[[], argparse.Namespace] | None = None,
    check_args: Callable[[argparse.Namespace], None] | None = None,
    packages: Sequence[str] = (),
) -> None:
    """Answer --help, and exit with one sentence for missing `packages` (all by default) and for refused flags.

    Afterwards, Ctrl-C ends the process silently until run() is called.
    """
    set_up_threads()

    def answer() -> None:
        require_packages(*packages)
        args = parse_args() if parse_args else None
        # Processes of torchrun check in main(), when they have found each other and can end together.
        if check_args and os.environ.get("WORLD_SIZE", "1") == "1":
            check_args(args)

    run(answer)
    end_on_ctrl_c()


def set_up_threads() -> None:
    """Limit the threads that torch starts later to the cores of a container, which OpenMP does not know.

    A value that the user has set in the environment stays.
    """
    if count_cores() < count_affinity():
        os.environ.setdefault("OMP_NUM_THREADS", str(count_cores()))


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
