"""Grids of images: support/images.py."""

import numpy as np
import torch

from support.images import image_grid


def test_grid_keeps_pixels():
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    grid = np.asarray(image_grid(images, columns=3))
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2, 3)
    assert np.array_equal(grid[10:16, 10:16], images[4].permute(1, 2, 0))
