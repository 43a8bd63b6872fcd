"""Random numbers as functions of (seed, step)."""

import argparse
from collections.abc import Iterable

import numpy as np
import torch


def latents(seeds: Iterable[int], nz: int = 100) -> torch.Tensor:
    """Latents (N,nz,1,1), float32, from N(0,1): one generator per seed, so seed 7 is the same face in any batch."""
    rows = [torch.randn(nz, 1, 1, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """Random numbers of training step `step`, a function of the arguments: a resumed training has them again."""
    mixed = np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(mixed[0]))


def step_latents(seed: int, step: int, n: int, nz: int = 100) -> torch.Tensor:
    """The latents (n,nz,1,1) of training step `step`."""
    return torch.randn(n, nz, 1, 1, generator=step_generator(seed, step))


def augmentation(args: argparse.Namespace, step: int) -> torch.Tensor:
    """What augment() is told in a step (3,N,5): a function of (seed, step), as the latents are."""
    return torch.rand(3, args.batch_size, 5, generator=step_generator(args.seed, step, 1))
