"""Work spread over processes that end with their parent, and how many a container allows. Imports no torch.

    crops = map_in_processes(make_crop, photos, workers=count_cores(), label="preprocess")
    for batch in iterate_in_processes(read_batch, batches, workers=8, remedy="lower --workers"): ...

Items and results travel as bytes through pipes. That needs no shared memory, which containers limit.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from functools import partial
from operator import length_hint
from pathlib import Path

from support.files import UserError

MAX_WORKERS = 61  # Windows allows no more
CHUNK = 8  # items that a worker of map_in_processes() gets at a time

worker_work: Callable | None = None  # in a worker process: what it does with an item


def start_worker(work: Callable) -> None:
    """Keep `work`, leave what a terminal sends to the parent, and end when the parent ends, even by kill -9."""
    global worker_work
    worker_work = work
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_in_processes(work: Callable, items: Sequence, workers: int, label: str) -> list:
    """[work(item) for item in items], in `workers` processes and with a progress bar.

    This process does all the work for fewer than 32 items. Raises UserError when a worker process dies.
    """
    from tqdm import tqdm  # a script counts the cores before it knows whether its packages are installed

    workers = workers if workers > 1 and len(items) >= 32 else 0
    size = CHUNK if workers else 1
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    remedy = "run the same command again, perhaps with fewer --workers: what was written stays"
    parts = iterate_in_processes(partial(work_on_chunk, work), chunks, workers, remedy)
    results = []
    with closing(parts), tqdm(total=len(items), unit="img", desc=label, disable=None) as bar:
        for part in parts:
            results += part
            bar.update(len(part))
    return results


def work_on_chunk(work: Callable, chunk: Sequence) -> list:
    return [work(item) for item in chunk]


def work_on(item: object) -> object:
    """In a worker process: the result for `item`."""
    return worker_work(item)


def iterate_in_processes(
    work: Callable, items: Iterable, workers: int, remedy: str, ahead: int | None = None
) -> Iterator:
    """Yield work(item) of each item, in order. `workers` processes compute up to `ahead` results in advance.

    This process does the work when `workers` is 0, and on systems without semaphores (no /dev/shm). Each worker process
    gets `work` once, since that may hold the paths of all images. Raises the errors of work(), and a UserError that
    ends in `remedy` when a worker process dies.
    """
    pool, coming = None, deque()
    if workers and items:
        with suppress(OSError):
            number = min(workers, length_hint(items, workers), MAX_WORKERS)
            pool = ProcessPoolExecutor(number, initializer=start_worker, initargs=(work,))
    if pool is None:
        yield from map(work, items)
        return
    try:
        for item in items:
            coming.append(pool.submit(work_on, item))
            if ahead and len(coming) > ahead:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    except (BrokenProcessPool, MemoryError):
        raise UserError(f"a worker process was killed (out of memory?); {remedy}") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, the items in progress end within a second or so


def count_cores(root: Path = Path("/")) -> int:
    """Number of CPU cores that this process may use, by its affinity and the limits of its cgroups below `root`."""
    return math.ceil(min(count_affinity(), *cgroup_limits(root, "cpu", read_limit)))


def count_affinity() -> int:
    """Number of CPU cores on which the system may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_limits(root: Path, controller: str, read: Callable[[Path], float]) -> list[float]:
    """What read() finds in the folder of each cgroup of this process and of each parent, with infinity first."""
    limits = [math.inf]
    with suppress(OSError, ValueError):  # no Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/a/b" (version 2) or "3:cpu,cpuacct:/a/b" (version 1)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / "sys/fs/cgroup" / (controller if controllers else "")
            group = Path(path.lstrip("/"))
            # In a container, the path may be the one outside of it. The container's own cgroup is then at the top.
            limits += [read(top / folder) for folder in (group, *group.parents)]
    return limits


def read_limit(cgroup: Path) -> float:
    """How many CPUs' time the processes in the folder `cgroup` may use together."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # versions 2 and 1
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())  # not "max"
            if quota > 0:  # -1: no limit
                return quota / period
    return math.inf


def memory_limit(root: Path = Path("/")) -> float:
    """Bytes of memory that the cgroups of this process below `root` allow; infinite without a limit."""
    return min(cgroup_limits(root, "memory", read_memory_limit))


def read_memory_limit(cgroup: Path) -> float:
    """Bytes of memory that the processes in the folder `cgroup` may use together."""
    for name in ("memory.max", "memory.limit_in_bytes"):  # versions 2 and 1
        with suppress(OSError, ValueError):
            return int((cgroup / name).read_text())  # not "max"
    return math.inf
