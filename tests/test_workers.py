"""Processes that share work: support/workers.py, and reading images in them."""

import os
import signal
from functools import partial

import numpy as np
import pytest
from helpers import PROGRAMS, SMALL

from dataloader import DataGenerater, load_batches
from support.files import UserError
from support.workers import iterate_in_processes

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def square(x):
    return x * x


def large(x):
    """More bytes than a pipe holds."""
    return np.full(10**6, x)


def fail(error, x):
    if x == 3:
        raise error
    return x


def die(how, x):
    if x == 3:
        how()
    return x


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def exit_this_process():
    os._exit(0)


def run_out_of_memory():
    raise MemoryError


def iterate(work, items, workers=2, **options):
    return iterate_in_processes(work, items, workers, "do this", **options)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ahead", [1, 4, 99])
def test_results_are_in_order(workers, ahead):
    assert list(iterate(square, range(20), workers, ahead=ahead)) == [x * x for x in range(20)]
    assert list(iterate(square, [], workers)) == []


def test_results_that_exceed_a_pipe():
    for x, result in enumerate(iterate(large, range(8))):
        assert (result == x).all()


def test_an_unfinished_iterator_ends_its_workers():
    results = iterate(large, range(100))
    next(results)
    results.close()


@pytest.mark.parametrize("error, kind, words", [
    (UserError("mend it"), UserError, "^mend it$"), (ValueError("a fault"), ValueError, "a fault"),
])
def test_errors_reach_the_parent(error, kind, words):
    with pytest.raises(kind, match=words):
        list(iterate(partial(fail, error), range(8)))


@posix
@pytest.mark.parametrize("how", [kill_this_process, exit_this_process, run_out_of_memory])
def test_the_death_of_a_worker_is_one_error(how):
    """Whatever it died of, and at once: the other workers and this process do not wait for it."""
    with pytest.raises(UserError, match="a worker process was killed .*; do this"):
        list(iterate(partial(die, how), range(8)))


@posix
def test_a_worker_that_is_killed_while_it_reads_images(dataroot):
    dataset = DyingDataset(dataroot / "64" / "train", 64)
    with pytest.raises(UserError, match="a worker process was killed"):
        list(load_batches(dataset, [[0, 1], [2, 3], [4, 5]], workers=2))


class DyingDataset(DataGenerater):
    """Reading image 3 kills the process, as the system does when memory is short."""

    def __getitem__(self, index):
        if index == 3:
            kill_this_process()
        return super().__getitem__(index)


@pytest.mark.parametrize("in_memory", [True, False])
def test_training_with_little_shared_memory(dataroot, tmp_path, run_with_shared_memory, in_memory):
    """A /dev/shm of 64 KiB. Docker's default of 64 MB is as small for larger images."""
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", "run", "--epochs", 1, "--workers", 2]
    done = run_with_shared_memory("size=64k", PROGRAMS / "train_small_chunks.py", in_memory, *flags)
    assert done.returncode == 0 and (tmp_path / "run" / "generator.params").exists(), done.stderr


class Heavy:
    """Work that says how often it was pickled, as work would be that holds the paths of 200,000 images."""

    pickled = 0

    def __call__(self, x):
        return x * x

    def __getstate__(self):
        Heavy.pickled += 1
        return {}


def test_work_travels_once_to_each_worker():
    assert list(iterate(Heavy(), range(50), workers=2, ahead=4)) == [x * x for x in range(50)]
    assert Heavy.pickled <= 2
