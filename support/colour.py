"""Colour of images: contrast, saturation, and the shares of dark and light pixels. FID says little about them.

    measure_colour(images)                          # float64 (N,4), a row an image, in the order of NAMES
    compare_colour(real, fake)                      # {"contrast": {"real": 60.9, "fake": 49.2, "ratio": 0.81}, ...}
    errG = errG + 3 * colour_loss(real, fake)       # a loss of G
"""

import torch
from torch.nn.functional import avg_pool2d, softshrink

NAMES = ("contrast", "saturation", "dark", "light")
LEVELS = 127.5  # steps of an 8-bit image between 0 and 1, in images in [-1,1]


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
    return torch.stack([luma.std((1, 2), correction=0), *(part.mean((1, 2)) for part in parts)], 1).cpu().double()


def compare_colour(real: list[float], fake: list[float]) -> dict[str, dict]:
    """The means over real and over generated images, and their ratio; None where the real images have none."""
    sides = zip(NAMES, map(float, real), map(float, fake))
    return {name: {"real": a, "fake": b, "ratio": b / a if a else None} for name, a, b in sides}


def colour_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Energy distance of the colour_moments() of real and of generated images, both (N,3,S,S), N >= 2; differentiable.

    It is twice the mean distance between a real and a generated image, less the mean distance between two real and that
    between two generated images (Szekely and Rizzo, "Energy statistics", 2013). So it compares how colours vary, too.
    It is written in few operations, since a GPU waits for the launch of each.
    """
    n = len(real)
    moments = colour_moments(to_levels(torch.cat([real, fake])))
    # Euclidean distances (2N,2N). At 0 the gradient is 0. torch.cdist has no gradient on MPS in older versions.
    distances = torch.linalg.vector_norm(moments[:, None] - moments, dim=2)
    weights = torch.full_like(distances, 1 / n**2 / LEVELS)  # between a real and a generated image, or the reverse
    weights[:n, :n] = -1 / (n * (n - 1)) / LEVELS
    weights[n:, n:] = -1 / (n * (n - 1)) / LEVELS
    return (weights * distances).sum()


def to_levels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1,1] as the values of 8-bit images, from -127.5 to 127.5 in steps of 1.

    Rounding alone makes colour checkerboards, so that real images can be compared only with rounded fakes. The gradient
    ignores the rounding.
    """
    levels = images * LEVELS
    rounded = (levels.detach() + 0.5).round() - 0.5
    return levels + (rounded - levels.detach())


def colour_moments(levels: torch.Tensor) -> torch.Tensor:
    """Fifty-nine numbers (N,59) for each image of to_levels() (N,3,S,S), S a multiple of 4; differentiable.

    For each channel a thumbnail of 4x4 pixels (divided by 4, so that all 16 weigh as much as one mean), the standard
    deviation, and 30 times (so that it weighs as much as a mean) the mean excess over 0.9 and below -0.9 of the range,
    as difference and sum of both, divided by the square root of 2. For all channels the saturation (the mean of the
    largest minus the smallest channel) and 30 times the strength of colour checkerboards of 2x2 pixels, which G's
    transposed convolutions leave in fakes.
    """
    side = levels.shape[-1] // 4
    thumbnail = avg_pool2d(levels, side, divisor_override=4 * side**2).flatten(1)
    channels = levels.flatten(2)
    # Without the constant, a flat image would have an infinite gradient.
    deviation = (channels.var(2) + 1e-4 * LEVELS**2).sqrt()
    excess = softshrink(channels, 0.9 * LEVELS)
    light_and_dark = torch.cat([excess, excess.abs()], 1).mean(2) * (30 / 2**0.5)
    smallest, largest = channels.aminmax(dim=1)
    saturation = (largest - smallest).mean(1, keepdim=True)
    checkerboard = levels.diff(dim=2).diff(dim=3)  # of whole numbers, so that equal colours give 0 and no gradient
    checkerboard = checkerboard - checkerboard.mean(1, keepdim=True)
    checkerboard = 30 * checkerboard.abs().mean((1, 2, 3))[:, None]
    return torch.cat([thumbnail, deviation, light_and_dark, saturation, checkerboard], 1)
