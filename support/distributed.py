"""Processes that torchrun starts: ranks, means over ranks, signals."""

import os
import signal
from collections.abc import Sequence

import torch
import torch.distributed as dist

from support.devices import pick_device


def join_ranks(name: str) -> torch.device:
    """The device `name` of this process, alone or among those that torchrun started, which it joins.

    They talk over NCCL about tensors on CUDA and over gloo about all others. Raises SystemExit as pick_device does.
    """
    device, several = pick_device(name), int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and CUDA graphs go by the current one
    if several:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def rank_and_world_size() -> tuple[int, int]:
    """Number of this process and of all of them; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(value: object) -> list:
    """`value` of each process, in their order."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def my_share(items: Sequence) -> Sequence:
    """This process's part of `items`; the parts of all, in their order, are `items` again."""
    rank, world_size = rank_and_world_size()
    return items[len(items) * rank // world_size : len(items) * (rank + 1) // world_size]


def average_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Mean of each tensor over the processes of torchrun, in place; nothing to do in a single one."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def catch_signals(world: int) -> list[int]:
    """A list that the first SIGINT or SIGTERM is put into; a second one ends the process at once."""
    caught = []

    def catch(number: int, _frame) -> None:
        caught.append(number)
        if world == 1:  # torchrun hands on what the terminal has sent to each process already
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def agree_on_signal(caught: list[int]) -> int:
    """A signal that any process of torchrun has caught, so that all stop after the same step; 0 where none has."""
    number = torch.tensor(caught[:1] or [0])
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)
