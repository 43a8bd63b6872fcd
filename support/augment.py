"""DiffAugment."""

import torch


def augment(images: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Images (N,3,S,S) in [-1,1], each in other colours and shifted by up to an eighth of its side; differentiable.

    `u` (N,5), uniform in [0,1), says how: brightness, saturation, contrast, and the shift down and right, past grey;
    None leaves them as they are. Where D sees real and generated images alike through this, it cannot know the real
    ones by heart (Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020: its colours and
    translation).
    """
    if u is None:
        return images
    brightness, saturation, contrast = u[:, :3].T[:, :, None, None, None]
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    size, most = images.shape[-1], images.shape[-1] // 8
    shift = (u[:, 3:] * (2 * most + 1)).long()
    rows, columns = (shift.T[:, :, None] + torch.arange(size, device=u.device)).unbind()
    padded = torch.nn.functional.pad(images, [most] * 4).permute(0, 2, 3, 1)
    which = torch.arange(len(images), device=u.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
