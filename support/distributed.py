"""The processes that torchrun starts: ranks, what they exchange, and how they stop together.

    device = join_ranks("auto")
    rank, world_size = rank_and_world_size()            # (0, 1) without torchrun
"""

import os
import re
import signal
from collections.abc import Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep the group's threads alive

from support.devices import pick_device
from support.files import UserError


def join_ranks(name: str) -> torch.device:
    """The device `name` of this process. Under torchrun, also joins the group of all processes.

    Tensors on CUDA travel over NCCL, all others over gloo. Raises UserError as pick_device() does.
    """
    device, several = pick_device(name), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and CUDA graphs use the current device
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def is_joined() -> bool:
    """Whether this process is one of several that torchrun started."""
    return dist.is_initialized()


def leave_ranks() -> None:
    """Leave the group that join_ranks() joined, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_first_rank() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank_and_world_size()[0] == 0


def wait_for_ranks() -> None:
    """Return once all processes have called this."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def explain_lost_rank(remedy: str):
    """Turn the error that the end of another process causes into a UserError that ends in `remedy`."""
    try:
        yield
    except RuntimeError as error:
        if dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            raise UserError(f"another process has ended; {remedy}") from None
        raise


def gather(value: object) -> list:
    """The `value` of each process, by rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


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
    """A list that receives the first SIGINT, SIGTERM or SIGHUP. A second SIGINT or SIGTERM ends the process at once.

    Signals that are ignored stay ignored, such as SIGHUP under `nohup`.
    """
    caught = []
    _, world_size = rank_and_world_size()

    def catch(number: int, _frame) -> None:
        caught.append(number)
        # A closed terminal sends SIGHUP twice, and torchrun repeats what the terminal has sent to each process.
        if world_size == 1 and number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
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
