"""DiffAugment (color and translation): support/augment.py."""

import torch

from support.augment import augment, augmentation_parameters, draw_augmentations


def augmented(images, *u):
    """The images with one row of six numbers in [0,1) each."""
    return augment(images, augmentation_parameters(torch.tensor(u), images.shape[-1]))


def test_augment_by_hand():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    same = [0.5, 0.5, 0.5, 0.5, 0.5, 0.0]
    down = [0.5, 0.5, 0.5, 0.0, 0.5, 0.0]  # two pixels, an eighth; the rows that enter at the top repeat the first one
    bright = [0.75, 0.5, 0.5, 0.5, 0.5, 0.0]
    out = augmented(images, same, down, bright)
    assert (out[0] - images[0]).abs().max() < 1e-6
    assert (out[1, :, 2:] - images[1, :, :14]).abs().max() < 1e-6 and (out[1, :, :2] == out[1, :, 2:3]).all()
    assert (out[2] - images[2] - 0.25).abs().max() < 1e-6
    grey = augmented(images, *[[0.5, 0.0, 0.5, 0.5, 0.5, 0.0]] * 3)
    assert (grey - images.mean(1, keepdim=True)).abs().max() < 1e-6
    flat = augmented(images, *[[0.5, 0.5, -0.5, 0.5, 0.5, 0.0]] * 3)  # contrast 0
    assert (flat - images.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-6
    assert augment(images, None) is images


def test_colours_equal_the_three_steps_of_the_paper():
    images = torch.rand(50, 3, 16, 16) * 2 - 1
    u = torch.rand(50, 6)
    u[:, 3:5], u[:, 5] = 0.5, 0.0  # no shift, and all images get other colours
    expected = images + u[:, :1, None, None] - 0.5
    grey = expected.mean(1, keepdim=True)
    expected = (expected - grey) * 2 * u[:, 1:2, None, None] + grey
    mean = expected.mean((1, 2, 3), keepdim=True)
    expected = (expected - mean) * (u[:, 2:3, None, None] + 0.5) + mean
    assert (augment(images, augmentation_parameters(u, 16)) - expected).abs().max() < 1e-6


def test_augment_has_the_correct_gradient(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    u = torch.rand(2, 6, dtype=torch.float64)
    u[:, 5] = 0.0  # both images get other colours
    parameters = augmentation_parameters(u, 8)
    assert torch.autograd.gradcheck(lambda images: augment(images, parameters), images)


def test_three_images_in_ten_get_other_colours_and_all_are_shifted():
    images = torch.rand(1, 3, 16, 16).expand(2000, -1, -1, -1)
    parameters = torch.cat([draw_augmentations(0, step, 100, 16)[step % 3] for step in range(20)])
    shifts = parameters.clone()
    shifts[:, :4] = torch.tensor([1, 0, 0, 0])
    changed = (augment(images, parameters) - augment(images, shifts)).abs().amax((1, 2, 3)) > 1e-6
    assert 0.27 < changed.float().mean() < 0.33
    assert parameters[:, 4:].unique(dim=0).shape == (25, 2) and parameters[:, 4:].abs().max() == 2
