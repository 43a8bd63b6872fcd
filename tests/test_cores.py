"""CPU cores and memory that a container allows: support/workers.py, and threads: support/cli.py."""

import math
import os

import pytest

from support import cli, workers
from support.workers import count_cores, memory_limit


def write_cgroups(root, own_cgroup, files):
    """/proc/self/cgroup and files below /sys/fs/cgroup, below `root`."""
    if own_cgroup:
        (root / "proc" / "self").mkdir(parents=True)
        (root / "proc" / "self" / "cgroup").write_text(own_cgroup)
    for name, text in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize("own_cgroup, files, expected", [
    ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),  # in a container
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
    ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
    ("0::/a.slice/b.scope\n", {"a.slice/cpu.max": "300000 100000\n", "a.slice/b.scope/cpu.max": "max 100000\n"}, 3),
    ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),  # more than there are
    ("4:memory:/\n3:cpu,cpuacct:/docker/1\n", {"cpu/cpu.cfs_quota_us": "4000", "cpu/cpu.cfs_period_us": "1000"}, 4),
    ("4:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ("not a list\n", {"cpu.max": "200000 100000\n"}, 64),
    (None, {}, 64),
])
def test_limits_of_cgroups_count(tmp_path, monkeypatch, own_cgroup, files, expected):
    monkeypatch.setattr(workers, "count_affinity", lambda: 64)
    write_cgroups(tmp_path, own_cgroup, files)
    assert count_cores(tmp_path) == expected


@pytest.mark.parametrize("own_cgroup, files, expected", [
    ("0::/\n", {"memory.max": "1503238553\n"}, 1503238553),  # in a container
    ("0::/\n", {"memory.max": "max\n"}, math.inf),
    ("0::/a/b\n", {"a/memory.max": "1000\n", "a/b/memory.max": "2000\n"}, 1000),
    ("4:memory:/docker/1\n3:cpu:/\n", {"memory/memory.limit_in_bytes": "4096\n"}, 4096),
    (None, {}, math.inf),
])
def test_limits_of_cgroups_on_memory_count(tmp_path, own_cgroup, files, expected):
    write_cgroups(tmp_path, own_cgroup, files)
    assert memory_limit(tmp_path) == expected


def test_threads_follow_a_limited_number_of_cores_and_the_user(monkeypatch):
    for own, limited, threads in (({}, 2, "2"), ({}, 64, None), ({"OMP_NUM_THREADS": "5"}, 2, "5")):
        monkeypatch.setattr(os, "environ", dict(own))
        monkeypatch.setattr(cli, "count_affinity", lambda: 64)
        monkeypatch.setattr(cli, "count_cores", lambda limited=limited: limited)
        cli.set_up_threads()
        # How long threads wait before they sleep is OpenMP's default: shorter waits cost up to a third of the speed.
        assert os.environ == ({"OMP_NUM_THREADS": threads} if threads else {})
