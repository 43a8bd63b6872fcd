"""Work spread over processes that end with their parent. Imports no torch.

    crops = map_in_processes(make_crop, photos, workers=8, label="preprocess")
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial

from tqdm import tqdm

from support.files import UserError

MAX_WORKERS = 61  # Windows allows no more


def start_worker() -> None:
    """Leave Ctrl-C to the parent process, and end when the parent ends, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def map_in_processes(work: Callable, items: Sequence, workers: int, label: str) -> list:
    """[work(item) for item in items], in `workers` processes and with a progress bar.

    This process does all the work for fewer than 32 items, and on systems without semaphores (no /dev/shm). Raises
    UserError when a worker process is killed.
    """
    bar, pool = partial(tqdm, unit="img", desc=label, disable=None), None
    if workers > 1 and len(items) >= 32:
        with suppress(OSError):
            pool = ProcessPoolExecutor(min(workers, MAX_WORKERS), initializer=start_worker)
    if pool is None:
        return [work(item) for item in bar(items)]
    try:
        return list(bar(pool.map(work, items, chunksize=8), total=len(items)))
    except BrokenProcessPool:
        raise UserError("a worker process was killed (out of memory?); run the same command again, perhaps with fewer "
                        "--workers: what was written stays") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, the chunks in progress end within a second or so
