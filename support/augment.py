"""DiffAugment (color, translation): random changes that D sees on real and generated images alike.

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020. D cannot memorise images that it never
sees twice, and G learns through the augmentation since that is differentiable.
"""

import torch

COLOUR_PROBABILITY = 0.3  # if it were 1, D would never see how bright, saturated and contrasting real images are


def augment(images: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Images (N,3,S,S) in [-1,1], each shifted by up to S/8, some in other colours; differentiable.

    The columns of `u` (N,6), uniform in [0,1), set brightness, saturation, contrast, the shifts down and right, and
    which images keep their colours. What a shift uncovers repeats the pixels of the edge. The paper fills it with grey,
    next to which D does not notice wrong pixels at the edge of a fake. With `u` None the images stay unchanged.
    """
    if u is None:
        return images
    colours = torch.where(u[:, 5:] < COLOUR_PROBABILITY, u[:, :3], 0.5)  # 0.5 changes nothing
    brightness, saturation, contrast = colours.T[:, :, None, None, None]
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    size, largest = images.shape[-1], images.shape[-1] // 8
    shift = (u[:, 3:5] * (2 * largest + 1)).long()
    rows, columns = (shift.T[:, :, None] + torch.arange(size, device=u.device)).unbind()
    padded = torch.nn.functional.pad(images, [largest] * 4, mode="replicate").permute(0, 2, 3, 1)
    index = torch.arange(len(images), device=u.device)[:, None, None]
    return padded[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
