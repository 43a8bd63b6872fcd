"""How many CPU cores this process may use. Imports no torch.

    count_cores()           # 2 in a container that is limited to 2 CPUs, on a machine of 64 cores
"""

import math
import os
from contextlib import suppress
from pathlib import Path


def count_cores(root: Path = Path("/")) -> int:
    """Number of CPU cores that this process may use, by its affinity and the limits of its cgroups below `root`."""
    return math.ceil(min(count_affinity(), *cgroup_limits(root)))


def count_affinity() -> int:
    """Number of CPU cores on which the system may run this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cgroup_limits(root: Path) -> list[float]:
    """How many CPUs' time each cgroup of this process and each parent of it may use, infinite where it has no limit."""
    limits = [math.inf]
    with suppress(OSError, ValueError):  # no Linux
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/a/b" (version 2) or "3:cpu,cpuacct:/a/b" (version 1)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top, group = root / "sys/fs/cgroup" / ("cpu" if controllers else ""), Path(path.lstrip("/"))
            # In a container, the path may be the one outside of it. The container's own cgroup is then at the top.
            limits += [read_limit(top / folder) for folder in (group, *group.parents)]
    return limits


def read_limit(cgroup: Path) -> float:
    """How many CPUs' time the processes in the folder `cgroup` may use together."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):  # versions 2 and 1
        with suppress(OSError, ValueError):
            quota, period = map(int, " ".join((cgroup / name).read_text() for name in names).split())  # not "max"
            if quota > 0:  # -1: no limit
                return quota / period
    return math.inf
