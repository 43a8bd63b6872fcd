"""The processes that torchrun starts: ranks, what they exchange, and how they stop together.

    with joined_ranks("auto") as device:
        rank, world_size = rank_and_world_size()        # (0, 1) without torchrun
"""

import io
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: its default arguments would keep the group's threads alive

from support.devices import keep_freed_memory, pick_device
from support.files import UserError, printable

STEP_TIMEOUT = timedelta(seconds=45)  # a machine without power or network is noticed after this time
step_group = None  # the processes again, as a gloo group with this timeout; None before the first step has ended


@contextmanager
def joined_ranks(name: str) -> Iterator[torch.device]:
    """The device `name` of this process. Under torchrun, the block runs in the group of all processes.

    Tensors on CUDA travel over NCCL, all others over gloo. Raises UserError as pick_device() does, when the processes
    cannot connect to each other, and when another one has ended or its machine cannot be reached.
    """
    missing = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys()
    if missing and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(f"WORLD_SIZE is set and {min(missing)} is not; start with torchrun, or unset WORLD_SIZE")
    device = pick_device(name, None if missing else int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL and CUDA graphs use the current device
    elif device.type == "cpu":
        keep_freed_memory()
    if not missing:
        connect_ranks("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with explain_lost_rank():
            yield device
    finally:
        leave_ranks()


def connect_ranks(backend: str) -> None:
    """Make the group of all processes. Raises UserError when one cannot be reached."""
    try:
        dist.init_process_group(backend)
    except RuntimeError as error:
        cause = printable(str(error).splitlines()[0])[:200]
        raise UserError(f"the processes cannot connect: {cause}; see docs/training.md") from None


@contextmanager
def explain_lost_rank() -> Iterator[None]:
    """Turn the error that follows the end of another process, or of its machine, into a UserError."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or re.search("gloo|NCCL|[Cc]onnection", str(error))
        if dist.is_initialized() and lost:
            raise UserError("another process has ended or cannot be reached; read its output, then start all processes "
                            "again, train.py with --resume") from None
        raise


def leave_ranks() -> None:
    """Leave the group of all processes, if any."""
    global step_group
    step_group = None
    if dist.is_initialized():
        # The group's threads free the tensors that they sent last, and need Python's lock for that. The next line
        # holds the lock while it waits for these threads: without the pause, some processes never ended.
        time.sleep(0.2)
        dist.destroy_process_group()


def is_joined() -> bool:
    """Whether this process is one of several that torchrun started."""
    return dist.is_initialized()


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
    """Return once all processes have called this, which may take half an hour."""
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
    """Call write() in the first process while the others wait, however long it takes, unless its machine is lost.

    Meanwhile a thread of the first process answers every 10 seconds: 0 while write() runs. The last answer is 1.
    """
    answer, written = torch.zeros(1), threading.Event()
    if not dist.is_initialized():
        write()
        return
    if not is_first_rank():
        while not answer:
            dist.all_reduce(answer, group=step_group)
        return

    def answer_others() -> None:
        while not written.wait(10):
            with suppress(RuntimeError):  # of a lost machine; the last answer fails as well
                dist.all_reduce(torch.zeros(1), group=step_group)

    thread = threading.Thread(target=answer_others, daemon=True)
    thread.start()
    try:
        write()
    finally:
        written.set()
        thread.join()
    dist.all_reduce(torch.ones(1), group=step_group)


def from_first_rank(read: Callable[[], object]) -> object:
    """What read() returns in the first process: plain data and tensors, which all processes get.

    A UserError of read() is raised in all processes. The data travel as torch.save writes them, so that they are data
    on arrival too.
    """
    if not dist.is_initialized():
        return read()
    file, content = io.BytesIO(), {}
    if is_first_rank():
        try:
            content = {"value": read()}
        except UserError as error:
            content = {"error": str(error)}
        torch.save(content, file)
    size = gather(file.tell())[0]
    data = torch.frombuffer(bytearray(file.getvalue() or size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    content = torch.load(io.BytesIO(data.numpy()), weights_only=True)
    if "error" in content:
        raise UserError(content["error"])
    return content["value"]


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
        dist.all_reduce(flat, group=None if flat.is_cuda else step_group)
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
    """A signal that any process has caught, or 0. All processes get the same, and so stop after the same step.

    The first step may take minutes, with torch.compile. From its end on, no process waits in a step for longer than
    STEP_TIMEOUT. Longer work of the first process goes through first_rank_writes().
    """
    global step_group
    number = torch.tensor(caught[:1] or [0])
    if dist.is_initialized():
        dist.all_reduce(number, dist.ReduceOp.MAX, group=step_group)
        if step_group is None:
            step_group = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT)
    return int(number)
