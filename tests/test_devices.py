"""Memory of the process: support/devices.py."""

import platform

import pytest
from helpers import PROGRAMS, run_python


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept(tmp_path):
    """A block of 64 MiB has 16,384 pages. They cause no page faults when glibc keeps the larger block freed before."""
    done = run_python(PROGRAMS / "freed_memory.py", cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) < 1000, done.stderr
