"""What the command lines of all scripts share. Imports no torch.

    if __name__ == "__main__":
        prepare(parse_args)                         # answers --help before the imports that take seconds
    ...
    parser.add_argument("--epochs", type=int_at_least(1))
    parser.add_argument("--mask", type=existing_path("give an image"))
    run(main)                                       # UserError becomes "error: ..." and exit code 1
"""

import argparse
import errno
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TextIO

from support.files import UserError, printable
from support.workers import count_affinity, count_cores

LARGEST = 2**48  # flags are added and multiplied, and must stay within the 64 bits of torch's seeds
REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"


def int_at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `minimum` and below 2**48."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if number >= LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return number

    parse.metavar = "N"
    return parse


def float_below(limit: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a number from 0 to below `limit`. NaN and infinity are refused."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number < limit:
            raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below {limit:g}")
        return number

    parse.metavar = "X"
    return parse


def user_path(text: str) -> Path:
    """An argparse type: a path, where ~ is the user's home. Shells do not replace the ~ of `--dataroot=~/faces`."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser raises for a user that does not exist)


user_path.metavar = "PATH"


def existing_path(remedy: str) -> Callable[[str], Path]:
    """An argparse type: the path of a file or folder that exists. `remedy` is what to do where it does not."""

    def parse(text: str) -> Path:
        path = user_path(text)
        if not path.exists():
            raise argparse.ArgumentTypeError(f"{printable(path)} does not exist; {remedy}")
        return path

    parse.metavar = "PATH"
    return parse


def npz_path(text: str) -> Path:
    """An argparse type: a path that ends in .npz. numpy.load and this repository know the format by that name."""
    path = user_path(text)
    return path if path.suffix.lower() == ".npz" else path.with_name(f"{path.name}.npz")


def parse_seeds(text: str) -> list[int]:
    """An argparse type: `0-63`, `7` or `1,5,10-12` as a list of seeds, each once."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 10_000_000:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-63 or 1,5,10-12")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def parse_terms(text: str) -> list[tuple[int, list[int]]]:
    """An argparse type: `1,2,3 - 4,5,6 + 7` as [(1, [1, 2, 3]), (-1, [4, 5, 6]), (1, [7])]."""
    signs_and_groups = re.split(r"\s([+-])\s", f" + {text}")[1:]
    try:
        groups = [parse_seeds(group) for group in signs_and_groups[1::2]]
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f'{error}; a sum is "1,2,3 - 4,5,6 + 7,8,9", with spaces') from None
    return [(1 if sign == "+" else -1, group) for sign, group in zip(signs_and_groups[::2], groups)]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a script's docstring unchanged, and the default value of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False or action.default == ""
        return action.help if no_default else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        metavar = "PATH" if action.type is Path else super()._get_default_metavar_for_optional(action)
        return getattr(action.type, "metavar", metavar)


def set_up_streams() -> None:
    """Make stdout and stderr safe to print to: no encoding, no closed stream and no lost reader ends a script.

    A stream that was closed (`2>&-`) becomes os.devnull. Characters outside an encoding become backslash escapes.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # in the order of their numbers, which no other file gets then
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError):  # a stream that somebody has replaced
            stream.reconfigure(errors="backslashreplace")
            stream.write = partial(write_or_drop, stream, stream.write)
            stream.flush = partial(write_or_drop, stream, stream.flush)


def write_or_drop(stream: TextIO, write: Callable, *arguments: str) -> object:
    """Call `write` of `stream`, which drops everything once its reader has gone (`| head`, a closed terminal).

    Another error of stdout, such as a full disk, raises UserError.
    """
    try:
        return write(*arguments)
    except OSError as error:
        with open(os.devnull, "wb") as devnull:  # takes what is still in the buffer, also at exit
            os.dup2(devnull.fileno(), stream.fileno())
        is_lost = error.errno in (errno.EPIPE, errno.EIO, errno.EINVAL)  # EINVAL: a pipe on Windows
        if stream is sys.stdout and not is_lost:
            raise UserError(f"cannot write the output: {error.strerror}; send it elsewhere") from None


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end this process at once and without a traceback: in a script's imports, until run() is called."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not when a shell has made it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(main: Callable[[], None]) -> None:
    """Call a script's main(). A UserError prints one line and exits with 1, Ctrl-C exits with 130, silently."""
    set_up_streams()
    try:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            main()
        finally:
            sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {printable(error)}")
    except KeyboardInterrupt:
        end_on_ctrl_c()  # a second Ctrl-C while threads end
        sys.exit(130)


def prepare(parse_args: Callable[[], argparse.Namespace] | None = None, packages: Sequence[str] = ()) -> None:
    """Answer --help, and refuse flags of the wrong type and missing `packages` (default: all), before slow imports.

    Afterwards, Ctrl-C ends the process silently until run() is called.
    """
    set_up_threads()
    run(partial(require_packages, *packages))
    if parse_args:
        run(parse_args)
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
        if names and name not in names:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name} {minimum} or newer (not installed)")
        else:
            if major_and_minor(found) < major_and_minor(minimum):
                problems.append(f"{name} {minimum} or newer (this is {found})")
    if problems:
        raise UserError(f"needs {', '.join(problems)}: pip install -r requirements.txt")


def major_and_minor(version: str) -> list[int]:
    """[2, 11] of "2.11.0a0+git1234"."""
    return [int(number) for number in re.findall(r"\d+", f"{version}.0")[:2]]
