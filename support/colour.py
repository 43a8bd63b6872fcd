"""Colour of images: contrast, saturation, and the shares of dark and light pixels. FID says little about them.

    measure_colour(images)                          # float64 (N,4), a row an image, in the order of NAMES
    compare_colour(real, fake)                      # {"contrast": {"real": 60.9, "fake": 49.2, "ratio": 0.81}, ...}
    errG = errG + 3 * colour_loss(real, fake)       # a loss of G
"""

import torch
from torch.nn.functional import avg_pool2d

NAMES = ("contrast", "saturation", "dark", "light")


def measure_colour(images: torch.Tensor) -> torch.Tensor:
    """Four numbers (N,4), float64, on the CPU, for each of `images` uint8 (N,3,H,W).

    Contrast is the standard deviation of the luma (ITU-R BT.601) over the pixels. Saturation is the mean of the largest
    minus the smallest channel. Both are in steps of 1/255. Dark is the share of pixels whose channels are all below 5,
    light that of pixels whose channels are all above 250.
    """
    images = images.float()
    luma = (images * torch.tensor([0.299, 0.587, 0.114], device=images.device)[:, None, None]).sum(1)
    largest, smallest = images.amax(1), images.amin(1)
    parts = ((largest - smallest), (largest < 5).float(), (smallest > 250).float())
    return torch.stack([luma.std((1, 2), correction=0), *(part.mean((1, 2)) for part in parts)], 1).double().cpu()


def compare_colour(real: list[float], fake: list[float]) -> dict[str, dict]:
    """The means over real and over generated images, and their ratio; None where the real images have none."""
    sides = zip(NAMES, map(float, real), map(float, fake))
    return {name: {"real": a, "fake": b, "ratio": b / a if a else None} for name, a, b in sides}


def colour_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Energy distance of the colour_moments() of real and of generated images (N,3,S,S), N >= 2; differentiable.

    It is twice the mean distance between a real and a generated image, less the mean distance between two real and that
    between two generated images (Szekely and Rizzo, "Energy statistics", 2013). So it compares how colours vary, too.
    """
    real, fake = colour_moments(real), colour_moments(fake)
    within = (distances(x, x).sum() / (len(x) * (len(x) - 1)) for x in (real, fake))
    return 2 * distances(real, fake).mean() - sum(within)


def distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Euclidean distances (N,M) between the rows of `x` (N,D) and of `y` (M,D). At 0 the gradient is 0.

    torch.cdist has no gradient on MPS in older versions of PyTorch.
    """
    return torch.linalg.vector_norm(x[:, None] - y, dim=2)


def colour_moments(images: torch.Tensor) -> torch.Tensor:
    """Fifty-nine numbers (N,59) for each of `images` (N,3,S,S) in [-1,1], S a multiple of 4; differentiable.

    For each channel a thumbnail of 4x4 pixels (divided by 4, so that all 16 weigh as much as one mean), the standard
    deviation, and the mean excess over 0.9 and below -0.9, times 30 so that it weighs as much as a mean. For all
    channels the saturation (the mean of the largest minus the smallest channel) and 30 times the strength of colour
    checkerboards of 2x2 pixels, which G's transposed convolutions leave in fakes.
    """
    thumbnail = avg_pool2d(images, images.shape[-1] // 4).flatten(1) / 4
    channels = images.flatten(2)
    deviation = (channels.var(2) + 1e-4).sqrt()  # without the 1e-4, a flat image would have an infinite gradient
    light, dark = (30 * (sign * channels - 0.9).relu().mean(2) for sign in (1, -1))
    saturation = (channels.amax(1) - channels.amin(1)).mean(1, keepdim=True)
    colour = images - images.mean(1, keepdim=True)
    checkerboard = 30 * colour.diff(dim=2).diff(dim=3).abs().mean((1, 2, 3))[:, None]
    return torch.cat([thumbnail, deviation, light, dark, saturation, checkerboard], 1)
