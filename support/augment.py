"""DiffAugment (color, translation): random changes that D sees on real and generated images alike.

    parameters = draw_augmentations(seed=0, step=1000, n=16, image_size=64)     # (3,16,6), on the CPU
    logits = netD(augment(real, parameters[0].to(device)), logits=True)

Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020. D cannot memorise images that it never
sees twice, and G learns through the augmentation since that is differentiable.
"""

import torch

from support.seeding import step_generator

STREAM = 1  # of step_generator(); the latents use stream 0
COLOUR_PROBABILITY = 0.3  # if it were 1, D would never see how bright, saturated and contrasting real images are


def draw_augmentations(seed: int, step: int, n: int, image_size: int) -> torch.Tensor:
    """The parameters (3,n,6) of augment() in training step `step`, float32, for images of `image_size` pixels.

    The first of the three is for real images, the second for fakes in D's step, the third for fakes in G's step.
    """
    return augmentation_parameters(torch.rand(3, n, 6, generator=step_generator(seed, step, STREAM)), image_size)


def augmentation_parameters(u: torch.Tensor, image_size: int) -> torch.Tensor:
    """The parameters (...,6) of augment() for random numbers `u` (...,6), uniform in [0,1).

    `u` decides on the brightness, the saturation, the contrast, the shifts up and left (down and right below 0.5) by up
    to an eighth of the image, and whether an image gets other colours at all. The paper adds a brightness b to the
    pixels x, multiplies their distances to the grey g of the pixel by a saturation s, then their distances to the mean
    m of the image by a contrast c. That is c s x + c (1 - s) g + (1 - c) m + b. The parameters are these three factors,
    b and the shifts in pixels.
    """
    has_other_colours = u[..., 5] < COLOUR_PROBABILITY
    brightness = torch.where(has_other_colours, u[..., 0] - 0.5, 0)
    saturation = torch.where(has_other_colours, u[..., 1] * 2, 1)
    contrast = torch.where(has_other_colours, u[..., 2] + 0.5, 1)
    largest = image_size // 8
    shifts = (u[..., 3:5] * (2 * largest + 1)).floor() - largest
    factors = [contrast * saturation, contrast * (1 - saturation), 1 - contrast, brightness]
    return torch.cat([torch.stack(factors, -1), shifts], -1)


def augment(images: torch.Tensor, parameters: torch.Tensor | None) -> torch.Tensor:
    """Images (N,3,S,S) in [-1,1], shifted and in other colours, float32; differentiable.

    `parameters` (N,6) are those of augmentation_parameters(). What a shift uncovers repeats the pixels of the edge. The
    paper fills it with grey, next to which D does not notice wrong pixels at the edge of a fake. With `parameters` None
    the images stay unchanged.
    """
    if parameters is None:
        return images
    images = images.float()
    of_pixel, of_grey, of_mean, brightness = parameters.T[:4, :, None, None, None]
    grey = images.mean(1, keepdim=True)
    constant = torch.addcmul(brightness, of_mean, grey.mean((2, 3), keepdim=True))
    images = torch.addcmul(torch.addcmul(constant, of_grey, grey), of_pixel, images)

    size = images.shape[-1]
    pixels = torch.arange(size, device=images.device)
    rows, columns = (pixels + parameters.T[4:, :, None].long()).clamp(0, size - 1)
    index = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
