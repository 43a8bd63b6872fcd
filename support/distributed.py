"""The processes that torchrun starts: ranks, what they exchange, and how they stop together.

    with joined_ranks("auto") as device:
        rank, world_size = rank_and_world_size()        # (0, 1) without torchrun
"""

import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep the group's threads alive

from support.devices import keep_freed_memory, pick_device
from support.files import UserError, printable

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
TIMEOUT = timedelta(minutes=10)  # a machine without power or network is noticed after this time


@contextmanager
def joined_ranks(name: str) -> Iterator[torch.device]:
    """The device `name` of this process. Under torchrun, the block runs in the group of all processes.

    Tensors on CUDA travel over NCCL, all others over gloo. Raises UserError as pick_device() does, and when the
    processes cannot connect to each other. Ends this process when another one is lost, see end_on_lost_rank().
    """
    missing = [variable for variable in VARIABLES if not os.environ.get(variable)]
    if missing and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not; start with torchrun, or unset WORLD_SIZE")
    device = pick_device(name, None if missing else int(os.environ["LOCAL_RANK"]))
    if device.type == "cpu":
        keep_freed_memory()
    if not missing:
        connect_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with end_on_lost_rank():
            yield device
    finally:
        leave_ranks()


def connect_ranks(backend: str) -> None:
    """Make the group of all processes. Raises UserError when one cannot be reached."""
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except RuntimeError as error:
        raise UserError(f"the processes cannot connect: {first_line(str(error))}; see docs/training.md") from None


@contextmanager
def end_on_lost_rank() -> Iterator[None]:
    """Print one sentence and end this process at once when another process, or its machine, is lost.

    Nothing is cleaned up: with NCCL, leaving the group would wait for kernels that wait for the lost process.
    """
    try:
        yield
    except RuntimeError as error:
        message = explain_group_error(error) if dist.is_initialized() else None
        if message is None:
            raise
        try:
            print(f"error: {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
        finally:
            os._exit(1)


def explain_group_error(error: RuntimeError) -> str | None:
    """One sentence for an error of gloo or NCCL, with its cause; None for other errors."""
    text = str(error)  # of NCCL, it ends with "Last error:" and a line that names the cause
    if not (isinstance(error, dist.DistError) or re.search("gloo|NCCL|[Cc]onnection", text)):
        return None
    cause = first_line(text.partition("Last error:")[2].strip() or text)
    if "NCCL error" in text and "ncclRemoteError" not in text:  # of this process: a small /dev/shm, another network
        return f"NCCL cannot connect the GPUs: {cause}; see docs/training.md"
    return (f"another process has ended or cannot be reached ({cause}); read its output, then start all processes "
            "again, train.py with --resume")


def first_line(text: str) -> str:
    """The first line of an error's text without the place in torch's sources, at most 200 characters."""
    return printable(re.sub(r"^\[\S+\] ", "", text.splitlines()[0]))[:200]


def leave_ranks() -> None:
    """Leave the group of all processes, if any."""
    if dist.is_initialized():
        # The group's threads free the tensors that they sent last, and need Python's lock for that. The next line
        # holds the lock while it waits for these threads: without the pause, some processes never ended.
        time.sleep(0.2)
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_rank() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank_and_world_size()[0] == 0


def is_first_on_machine() -> bool:
    """Whether this is the process that makes files which each machine needs."""
    return not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"


def wait_for_ranks() -> None:
    """Return once all processes have called this, which may take as long as TIMEOUT."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # over gloo; dist.barrier() would keep the GPUs busy


def gather(value: object) -> list:
    """The `value` of each process, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def once_per_machine(make: Callable[[], object]) -> object:
    """What make() returns: one process on each machine calls it first, so that the others find the file it makes."""
    if is_first_on_machine():
        result = make()
    wait_for_ranks()
    return result if is_first_on_machine() else make()


def first_rank_writes(write: Callable[[], None]) -> None:
    """Call write() in the first process while the others wait."""
    if is_first_rank():
        write()
    wait_for_ranks()


def from_first_rank(read: Callable[[], object]) -> object:
    """What read() returns in the first process: plain data and tensors, which all processes get.

    A UserError of read() is raised in all processes.
    """
    content = problem = None
    if is_first_rank():
        try:
            content = read()
        except UserError as error:
            problem = str(error)
    content, problem = gather((content, problem))[0]
    if problem:
        raise UserError(problem)
    return content


def refuse_differences(settings: dict, remedies: dict[str, str]) -> None:
    """Raise UserError, in all processes, when one of them has other `settings` than the first.

    The message names the flag --name and both values, unless `remedies` has a sentence for that name.
    """
    (first, host), *others = gather((settings, platform.node()))
    for rank, (other, other_host) in enumerate(others, 1):
        for name in (name for name in first if first[name] != other[name]):
            places = f"process 0 ({host})", f"process {rank} ({other_host})"
            message = "--{} is {} in {} and {} in {}; give the same flags on all machines"
            message = message.format(name.replace("_", "-"), first[name], places[0], other[name], places[1])
            raise UserError(remedies[name].format(*places) if name in remedies else message)


def my_share(items: Sequence) -> Sequence:
    """This process's part of `items`. The parts, by rank, make up `items`."""
    rank, world_size = rank_and_world_size()
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def average_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its mean over all processes."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def catch_signals() -> list[int]:
    """A list that receives the first SIGINT, SIGTERM, SIGHUP or SIGUSR1, which SLURM's --signal sends.

    A second SIGINT or SIGTERM ends the process at once. Signals that are ignored stay ignored, such as SIGHUP under
    `nohup`.
    """
    caught = []
    _, world_size = rank_and_world_size()

    def catch(number: int, _frame) -> None:
        caught.append(number)
        # A closed terminal sends SIGHUP twice, and torchrun repeats what the terminal has sent to each process.
        if world_size == 1 and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):  # Windows has neither of the last two
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, catch)
    return caught


def agree_on_signal(caught: list[int]) -> int:
    """A signal that any process has caught, or 0. All processes get the same, and so stop after the same step."""
    number = torch.tensor(caught[:1] or [0])
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)
