"""Devices that torch finds and cannot use, and the memory of the process: support/devices.py."""

import contextlib
import math
import platform
from types import SimpleNamespace

import pytest
import torch
from helpers import PROGRAMS, ROOT, SMALL, run_python, run_training, small_args

import train
from support import devices
from support.cuda_graph import as_cuda_graph
from support.devices import explain_out_of_memory, fits_in_memory, memory_format, name_device, pick_device
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


def test_the_chosen_gpu_is_the_current_one(monkeypatch):
    """CUDA graphs are recorded on the current device, also in benchmarks/."""
    chosen = []
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") == chosen[0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_kept(tmp_path):
    """A block of 64 MiB has 16,384 pages. They cause no page faults when glibc keeps the larger block freed before."""
    done = run_python(PROGRAMS / "freed_memory.py", cwd=tmp_path)
    assert done.returncode == 0 and int(done.stdout) < 1000, done.stderr


@pytest.mark.parametrize("device, capability, precision, layout", [
    ("cpu", None, "fp32", torch.channels_last),
    ("cuda", (7, 5), "fp32", torch.contiguous_format),  # T4
    ("cuda", (7, 0), "bf16", torch.channels_last),
    ("cuda", (8, 0), "fp32", torch.channels_last),
    ("mps", None, "fp32", torch.contiguous_format),
])
def test_channels_last_where_it_is_fast(monkeypatch, device, capability, precision, layout):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert memory_format(torch.device(device), precision) is layout


def test_networks_and_real_images_have_the_layout_of_the_device(monkeypatch):
    monkeypatch.setattr(train, "memory_format", lambda *_: torch.contiguous_format)
    args = small_args()
    state = train.make_state(args, torch.device("cpu"))
    assert state.netD.main[0].weight.is_contiguous()
    monkeypatch.setattr(train, "update_networks", lambda state, autocast, colour_weight, real, *_: seen.append(real))
    seen, images = [], torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    train.make_step(state, args, images)(train.step_inputs(args, 0, torch.arange(8)))
    assert seen[0].is_contiguous()


@pytest.mark.parametrize("limit, processes, fits", [(math.inf, "", True), (5e6, "", False), (5e6, "1", False),
                                                    (8e6, "1", True), (8e6, "2", False), (16e6, "2", True)])
def test_images_must_fit_in_what_a_container_allows_all_processes(monkeypatch, limit, processes, fits):
    """300 images of 64x64 take 3.7 MB, and half of the memory is for the rest."""
    monkeypatch.setattr(devices, "memory_limit", lambda: limit)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert fits_in_memory(300, 64) == fits


def test_the_hosts_copy_of_the_images_goes(dataroot, tmp_path, monkeypatch):
    opened, open_dataset = [], train.open_dataset
    monkeypatch.setattr(train, "open_dataset", lambda args: opened.append(open_dataset(args)) or opened[0])
    run_training(dataroot, tmp_path / "run", "--epochs", 1)
    assert opened[0].images is None


def test_compile_without_a_compiler_is_one_sentence(dataroot, tmp_path, refused):
    """Nothing is written, so that the same --outdir can be used without --compile."""
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run", "--compile"]
    cache = str(tmp_path / "cache")  # an earlier test may have compiled the same function
    done = run_python(ROOT / "train.py", *flags, cwd=tmp_path, CXX="/missing", TORCHINDUCTOR_CACHE_DIR=cache)
    refused(done, "--compile does not work here", "install a C++ compiler")
    assert not (tmp_path / "run").exists()


def test_an_error_that_follows_out_of_memory_is_out_of_memory():
    """The end of the recording of a CUDA graph fails after the allocation that failed in it."""
    with pytest.raises(UserError, match="out of memory; lower it"), explain_out_of_memory("lower it"):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_warm_up_and_recording_use_one_stream(monkeypatch):
    """Libraries make a handle for each stream, which is an error during a recording (hipBLASLt, pytorch issue 187745).

    The streams wait for each other around each step of the warm-up. The graph is reset at the end.
    """
    calls = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on_stream(stream):
        calls.append(f"on {stream.name}")
        yield

    def make_graph():
        return SimpleNamespace(replay=lambda: calls.append("replay"), reset=lambda: calls.append("reset"))

    fakes = {"Stream": lambda device: Stream(), "current_stream": lambda device: Stream("main"), "stream": on_stream}
    fakes |= {"CUDAGraph": make_graph, "graph": lambda graph, stream, capture_error_mode: on_stream(stream)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: torch.zeros(tensor.shape))
    step = lambda inputs: calls.append(f"step {inputs.batch.item():.0f}")  # noqa: E731
    with as_cuda_graph(step, [], SimpleNamespace(type="cuda")) as launch:
        for number in range(5):
            launch(train.StepInputs(torch.tensor([float(number)]), torch.zeros(1), torch.zeros(()), None))
    warm_up = [["side waits for main", "on side", f"step {number}", "main waits for side"] for number in range(3)]
    assert calls == [*sum(warm_up, []), "on side", "step 3", "replay", "replay", "reset"]
