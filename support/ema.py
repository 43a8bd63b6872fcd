"""The exponential moving average (EMA) of the generator's weights, which draws better faces than the raw weights.

    update_ema(netG_ema, netG, step, decay=0.999)
    recalibrate_batchnorm(netG_ema, seed, step, batch_size, device)
"""

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from support.seeding import step_latents


@torch.no_grad()
def update_ema(netG_ema: nn.Module, netG: nn.Module, step: int, decay: float) -> None:
    """Move the EMA weights towards G's. The decay grows from 0 to `decay`, so that short trainings profit too."""
    decay = min(decay, step / (step + 10))
    torch._foreach_lerp_(list(netG_ema.parameters()), list(netG.parameters()), 1 - decay)


def recalibrate_batchnorm(netG_ema: nn.Module, seed: int, step: int, batch_size: int, device: torch.device) -> None:
    """Give the EMA weights BatchNorm statistics that fit them, from about 1,024 latents in batches of `batch_size`.

    G's statistics do not fit: averaged weights give activations of a smaller variance (Izmailov et al., "Averaging
    Weights Leads to Wider Optima and Better Generalization", 2018, section 3.2).
    """
    steps = range(step, step + max(1, 1024 // batch_size))
    update_bn((step_latents(seed, i, batch_size, netG_ema.nz) for i in steps), netG_ema, device)
