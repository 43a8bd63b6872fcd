"""Random numbers as functions of (seed, step): a resumed training draws the same ones as an uninterrupted one.

    z = latents(range(64))                              # seed 7 is the same face in any batch
    z = step_latents(seed=0, step=1000, n=128)
"""

from collections.abc import Iterable

import numpy as np
import torch


def latents(seeds: Iterable[int], nz: int = 100) -> torch.Tensor:
    """Latents (N,nz,1,1), float32, from N(0,1). Each seed has its own generator."""
    return torch.stack([torch.randn(nz, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A generator whose numbers depend on the arguments alone."""
    mixed = np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def step_latents(seed: int, step: int, n: int, nz: int = 100) -> torch.Tensor:
    """The latents (n,nz,1,1) of training step `step`, float32, from N(0,1)."""
    return torch.randn(n, nz, 1, 1, generator=step_generator(seed, step))
