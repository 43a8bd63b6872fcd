"""Command lines: types of flags, the look of --help, the number of cores."""

import argparse
import math
import os


def natural(minimum: int):
    """An argparse type: a whole number of at least `minimum`."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if int(text) >= 2**48:  # torch's seeds have 64 bits, and some flags are added up or multiplied
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return int(text)

    return number


def real(below: float = math.inf):
    """An argparse type: a number of at least 0 and less than `below`."""

    def number(text: str) -> float:
        if not 0 <= float(text) < below:  # so NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below {below:g}")
        return float(text)

    return number


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
