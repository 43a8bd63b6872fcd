"""DiffAugment (color and translation): support/augment.py."""

import torch

from support.augment import augment
from support.seeding import step_augmentations


def test_augment_by_hand():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    same = torch.full((6,), 0.5)
    same[5] = 0.0  # not among the images that keep their colours
    down = same.clone()
    down[3] = 0.0  # two pixels, an eighth of the height; the rows that enter at the top repeat the first one
    bright = same.clone()
    bright[0] = 0.75
    out = augment(images, torch.stack([same, down, bright]))
    assert (out[0] - images[0]).abs().max() < 1e-6
    assert (out[1, :, 2:] - images[1, :, :14]).abs().max() < 1e-6 and (out[1, :, :2] == out[1, :, 2:3]).all()
    assert (out[2] - images[2] - 0.25).abs().max() < 1e-6
    grey = augment(images, torch.tensor([[0.5, 0.0, 0.5, 0.5, 0.5, 0.0]] * 3))
    assert (grey - images.mean(1, keepdim=True)).abs().max() < 1e-6
    flat = augment(images, torch.tensor([[0.5, 0.5, -0.5, 0.5, 0.5, 0.0]] * 3))  # contrast 0
    assert (flat - images.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-6
    assert augment(images, None) is images


def test_augment_has_the_correct_gradient():
    images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    u = torch.rand(2, 6, dtype=torch.float64)
    u[:, 5] = 0.0  # both images get other colours
    assert torch.autograd.gradcheck(lambda images: augment(images, u), images)


def test_three_images_in_ten_get_other_colours_and_all_are_shifted():
    images = torch.rand(1, 3, 16, 16).expand(2000, -1, -1, -1)
    u = torch.cat([step_augmentations(0, step, 100)[step % 3] for step in range(20)])
    other_colours = u[:, 5] < 0.3
    assert 0.27 < other_colours.float().mean() < 0.33 and abs(u.mean() - 0.5) < 0.01

    shifts = u.clone()
    shifts[:, :3] = 0.5
    changed = (augment(images, u) - augment(images, shifts)).abs().amax((1, 2, 3)) > 1e-6
    assert torch.equal(changed, other_colours)
    assert ((u[:, 3:5] * 5).long().unique(dim=0)).shape == (25, 2)  # down and right by -2 to 2 pixels
