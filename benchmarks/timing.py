"""Timing helpers of the benchmarks."""

import statistics
import time
from collections.abc import Callable

import torch


def items_per_sec(count: int, function: Callable, *arguments) -> float:
    """Items per second of one call of `function` that handles `count` items."""
    start = time.perf_counter()
    function(*arguments)
    return count / (time.perf_counter() - start)


def medians_in_turn(rounds: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of each measure over `rounds`. The measures run in turn, so that background load affects all."""
    values = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return {name: statistics.median(found) for name, found in values.items()}


def synchronize(device: torch.device) -> None:
    """Waits until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable, *arguments, **options) -> tuple:
    """(result, seconds) of one call."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start
