"""DiffAugment (color and translation): support/augment.py."""

import torch

from support.augment import augment
from support.seeding import step_augmentations


def test_augment_by_hand():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    same = torch.full((5,), 0.5)
    down = same.clone()
    down[3] = 0.0  # two pixels, an eighth of the height; the rows that enter at the top are grey
    bright = same.clone()
    bright[0] = 0.75
    out = augment(images, torch.stack([same, down, bright]))
    assert (out[0] - images[0]).abs().max() < 1e-6
    assert (out[1, :, 2:] - images[1, :, :14]).abs().max() < 1e-6 and (out[1, :, :2] == 0).all()
    assert (out[2] - images[2] - 0.25).abs().max() < 1e-6
    grey = augment(images, torch.tensor([[0.5, 0.0, 0.5, 0.5, 0.5]] * 3))
    assert (grey - images.mean(1, keepdim=True)).abs().max() < 1e-6
    flat = augment(images, torch.tensor([[0.5, 0.5, -0.5, 0.5, 0.5]] * 3))  # contrast 0
    assert (flat - images.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-6
    assert augment(images, None) is images


def test_augment_has_the_correct_gradient():
    images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    u = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda images: augment(images, u), images)


def test_three_images_in_ten_get_other_colours_and_all_are_shifted():
    u = torch.cat([step_augmentations(0, step, 100) for step in range(20)])
    colours, shifts = u[..., :3], u[..., 3:]
    changed = (colours != 0.5).any(-1)
    assert 0.28 < changed.float().mean() < 0.32 and (colours[~changed] == 0.5).all()
    assert abs(colours[changed].mean() - 0.5) < 0.02 and (colours[changed] != 0.5).all()
    assert abs(shifts.mean() - 0.5) < 0.01 and (shifts != 0.5).all()
