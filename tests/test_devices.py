"""Devices that torch finds and cannot use, and the memory of the process: support/devices.py."""

import platform

import pytest
import torch
from helpers import PROGRAMS, run_python

from support.devices import name_device, pick_device
from support.files import UserError

NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver"
OLD_DRIVER = ("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
              "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx")


@pytest.fixture
def without_gpu(monkeypatch):
    """Sets the RuntimeError of torch.cuda.init() on a machine where torch reports no GPU."""

    def set_error(message):
        def fail():
            raise RuntimeError(message)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
        monkeypatch.setattr(torch.cuda, "init", fail)

    return set_error


@pytest.mark.parametrize("message", [NO_DRIVER, "No CUDA GPUs are available"])
def test_auto_without_a_gpu_is_the_cpu_or_mps(without_gpu, message):
    without_gpu(message)
    assert name_device("auto") in ("cpu", "mps")


@pytest.mark.parametrize("message, cause", [
    (OLD_DRIVER, "The NVIDIA driver on your system is too old (found version 11040)"),
    ("Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices()? "
     "Error 804: forward compatibility was attempted", "Unexpected error from cudaGetDeviceCount()"),
    ("CUDA unknown error - this may be due to an incorrectly set up environment.", "CUDA unknown error"),
])
def test_auto_refuses_a_gpu_whose_driver_does_not_work(without_gpu, message, cause):
    """torch reports such a GPU as absent. A training on the CPU would take days, without a word."""
    without_gpu(message)
    with pytest.raises(UserError) as stop:
        pick_device("auto")
    assert str(stop.value).startswith(f"--device auto (cuda) cannot be used: {cause}")
    assert str(stop.value).endswith("; mend that, or pass --device cpu") and "http" not in str(stop.value)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("kind, message", [
    ("AcceleratorError", "CUDA error: no kernel image is available for execution on the device"),
    ("AcceleratorError", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("OutOfMemoryError", "CUDA out of memory"),
    ("", "CUDA error: out of memory"),
])
def test_a_gpu_that_fails_is_refused_with_its_cause(monkeypatch, name, kind, message):
    """The architecture is not built in, another process has the GPU for itself, or its memory is full."""

    def fail(*_, **__):
        text = f"{message}. Tried to allocate 2 MiB." if kind == "OutOfMemoryError" else f"{message}\nCompile with ..."
        raise type(kind, (RuntimeError,), {})(text) if kind != "OutOfMemoryError" else torch.OutOfMemoryError(text)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(UserError) as stop:
        pick_device(name)
    shown = "auto (cuda)" if name == "auto" else "cuda"
    assert str(stop.value) == f"--device {shown} cannot be used: {message}; mend that, or pass --device cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="has 2 GPU.*lower --nproc-per-node"):
        pick_device("auto", local_rank=2)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept(tmp_path):
    """A block of 64 MiB has 16,384 pages. They cause no page faults when glibc keeps the larger block freed before."""
    done = run_python(PROGRAMS / "freed_memory.py", cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) < 1000, done.stderr
