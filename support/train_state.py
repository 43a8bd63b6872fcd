"""What a training holds in memory: the state that its steps change, and the setup that they share."""

import argparse
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
from torch import nn
from torch.utils.data import Dataset

from support.files import UserError, name_last_checkpoint


@dataclass
class TrainState:
    """All that a training step changes, and the weight of its colour_loss().

    `totals` (4,) sums loss_d, loss_g, D(x) and D(G(z)) since the last log row.
    """

    netG: nn.Module
    netD: nn.Module
    netG_ema: nn.Module
    optG: torch.optim.Optimizer
    optD: torch.optim.Optimizer
    totals: torch.Tensor
    colour_weight: float
    step: int = 0
    memory_format: torch.memory_format = torch.channels_last  # of the weights, and so of real images

    def parts(self) -> dict:
        """Networks and optimisers by their names in a checkpoint, where the EMA weights are called "average"."""
        parts = {"netG": self.netG, "netD": self.netD, "average": self.netG_ema}
        return parts | {"optG": self.optG, "optD": self.optD}

    def refuse_divergence(self, outdir: Path) -> None:
        """Raise UserError when a loss is NaN or infinite."""
        if not self.totals.isfinite().all():
            raise UserError(
                f"a loss is NaN or infinite near step {self.step}: training has diverged; "
                f"{name_last_checkpoint(outdir)}; start again in another --outdir with another --seed or a lower --lr"
            )


class Throughput:
    """Training speed in images per second, measured between calls and without pauses."""

    def __init__(self, step: int):
        self.step, self.start = step, time.perf_counter()

    def images_per_sec(self, step: int, batch_size: int) -> float:
        """Speed since the last call, or since this object was made."""
        now = time.perf_counter()
        speed = (step - self.step) * batch_size / (now - self.start)
        self.step, self.start = step, now
        return speed

    @contextmanager
    def paused(self):
        """Leave out the time that the block takes."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


@dataclass
class Setup:
    """What all steps of a training share. `log` is None in all processes but the first; `score` gives G's FID."""

    args: argparse.Namespace
    device: torch.device
    dataset: Dataset
    images: torch.Tensor | None  # all training images, on the device; None where they do not fit there
    launch: Callable  # train_step() of step_inputs()
    log: TextIO | None
    score: Callable[[nn.Module], float] | None
    autocast: torch.autocast
    signals: list[int]
    throughput: Throughput
