"""Colour of images: contrast, saturation, and the shares of dark and light pixels. FID says little about them.

    measure_colour(images)                          # float64 (N,4), a row an image, in the order of NAMES
    compare_colour(real, fake)                      # {"contrast": {"real": 60.9, "fake": 49.2, "ratio": 0.81}, ...}
"""

import torch

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
