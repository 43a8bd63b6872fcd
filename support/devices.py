"""Device, precision, memory."""

import ctypes
import multiprocessing
import os
import sys

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the names that --precision has


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU. Raises SystemExit when the device is not on this machine."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # meta, of which there is none on any machine, fails only here
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SystemExit(f"error: --device {name} is not on this machine; use --device auto or cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """bf16 where `auto` finds units made for it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed: it gives large blocks back, and gets them anew, zeroed, in each step.

    That costs up to a tenth of the time of a CPU. Elsewhere (Windows, macOS, musl) nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def can_start_workers() -> bool:
    """Whether processes can share memory and locks here: not so in a container without /dev/shm."""
    try:
        torch.zeros(1).share_memory_()
        multiprocessing.Lock()
    except (OSError, RuntimeError):
        return False
    return True


def fits_in_memory(n: int, image_size: int) -> bool:
    """Whether `n` decoded images take less than half of this machine's memory (4 GiB where that is not told)."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 8 * 2**30
    return 3 * image_size**2 * n < memory / 2
