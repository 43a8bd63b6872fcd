"""What the command lines of all scripts share. Imports no torch.

    parser.add_argument("--epochs", type=int_at_least(1))
    run(main)                                       # UserError becomes "error: ..." and exit code 1
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from support.files import UserError

LARGEST = 2**48  # flags are added and multiplied, and must stay within the 64 bits of torch's seeds


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Prints a script's docstring unchanged, and the default value of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        no_default = action.default is None or action.default is False or action.default == ""
        return action.help if no_default else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        metavar = "PATH" if action.type is Path else super()._get_default_metavar_for_optional(action)
        return getattr(action.type, "metavar", metavar)


def count_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(main: Callable[[], None]) -> None:
    """Call a script's main(). A UserError prints one line and exits with 1, Ctrl-C exits with 130."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
