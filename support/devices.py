"""Devices: which one, in which precision, and how much memory there is.

    device = pick_device("auto")
    precision = pick_precision("auto", device)
"""

import ctypes
import os
import re
import sys
import warnings
from contextlib import contextmanager

import torch

from support.files import UserError, printable
from support.workers import memory_limit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the names that --precision takes


def name_device(name: str) -> str:
    """`auto` is CUDA, else MPS, else the CPU. Raises UserError when torch finds a GPU but cannot use its driver."""
    if name != "auto":
        return name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error below says the same
        if torch.cuda.is_available():
            return "cuda"
    if torch.backends.cuda.is_built():
        try:
            torch.cuda.init()  # says why CUDA is not available
        except RuntimeError as error:
            if not re.search("no NVIDIA driver|No CUDA GPUs|no CUDA-capable|No HIP GPUs", str(error)):
                raise unusable("auto (cuda)", error) from None
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that --device `name` means; of several GPUs, it becomes the current one.

    Raises UserError when torch cannot use it.

    `local_rank` is the number of this process among several on this machine, each of which takes a GPU.

    A GPU can be visible and unusable: its driver is too old, torch has no kernels for its architecture, or another
    process holds it or its memory. `auto` then refuses as well, since a training on the CPU would take days.
    """
    found = name_device(name)
    if local_rank is not None and found.startswith("cuda"):
        found, gpus = f"cuda:{local_rank}", torch.cuda.device_count()
        if 0 < gpus <= local_rank:
            raise UserError(f"this machine has {gpus} GPU(s), fewer than processes; lower --nproc-per-node")
    try:
        device = torch.device(found)
        torch.ones(1, device=device).cpu()  # takes memory, runs a kernel and waits for the result
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # NCCL and CUDA graphs use the current device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch.AcceleratorError is a RuntimeError
        raise unusable(name if name == found else f"{name} ({found})", error) from None
    return device


def unusable(name: str, error: Exception) -> UserError:
    """The UserError for a device that fails."""
    return UserError(f"--device {name} cannot be used: {explain(error)}; mend that, or pass --device cpu")


def explain(error: Exception) -> str:
    """The first sentence of torch's text, which names the cause."""
    return printable(re.split(r"[.;!] |[.!]?\n|[.!]$", str(error), maxsplit=1)[0])[:200]


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 on hardware with bf16 support, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def memory_format(device: torch.device, precision: str) -> torch.memory_format:
    """The layout of weights and images that makes convolutions fast: channels_last, where there are kernels for it.

    GPUs below compute capability 8.0 (V100, T4) have none for fp32, and are slower with it (pytorch issue 44943).
    """
    if precision == "bf16" or device.type == "cpu":
        return torch.channels_last
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return torch.channels_last
    return torch.contiguous_format


def with_float64(device: torch.device) -> torch.device:
    """`device`, or the CPU in the place of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@contextmanager
def full_float32():
    """Switch TF32 off, which rounds the factors of float32 products to ten bits.

    cuDNN uses it for convolutions by default, and NVIDIA's containers switch it on for matrix products too.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def explain_out_of_memory(remedy: str):
    """Turn a device's out-of-memory error into a UserError that ends in `remedy`."""
    try:
        yield
    except RuntimeError as error:  # of torch or CUDA, of the CPU, of cuBLAS
        # An error that ends the recording of a CUDA graph can follow the one that says why.
        if re.search("out of memory|allocate memory|ALLOC_FAILED", f"{error} {error.__context__}"):
            raise UserError(f"the device is out of memory; {remedy}") from None
        raise


def set_up_training(deterministic: bool) -> None:
    """Settings of torch that training wants; `deterministic` gives up some speed on a GPU."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to work
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # tries the algorithms once, since shapes never change


def refuse_missing_compiler(device: torch.device) -> None:
    """Raise UserError when torch.compile does not work on `device`: it needs a C++ compiler, and Triton on a GPU."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, of a missing package, or of torch
        cause = explain(error)
        raise UserError(f"--compile does not work here ({cause}); install a C++ compiler, or leave it out") from None


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that a batch frees. Other C libraries ignore this.

    Otherwise glibc returns large blocks to the system, which zeroes them when the next batch asks for them again. That
    costs up to a tenth of the training time on a CPU, and up to a fifth of Inception's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: allocate every block from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def place_on_device(images: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """`images` on `device`; None where they would take more than a quarter of a GPU's free memory, or are None."""
    if images is None or device.type == "cpu":
        return images
    fits = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    return images.to(device) if fits else None


def fits_in_memory(n: int, image_size: int) -> bool:
    """Whether `n` uint8 images, held by each process of this machine, take less than half of the memory.

    That is what the container allows, else what the machine has, else 8 GiB where the system does not say.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 8 * 2**30
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun on this machine
    return processes * 3 * image_size**2 * n < min(memory, memory_limit()) / 2
