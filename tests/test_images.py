"""PNG files and grids: support/images.py."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from support.demo_faces import draw_face
from support.images import encode_png, image_grid


def test_grid_keeps_pixels():
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    grid = np.asarray(image_grid(images, columns=3))
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2, 3)
    assert np.array_equal(grid[10:16, 10:16], images[4].permute(1, 2, 0))


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 1, 3), (3, 200, 3), (200, 3, 3)])
def test_png_has_the_same_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    image = Image.open(io.BytesIO(encode_png(pixels)))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels) and image.info == {}


def test_png_is_hardly_larger_than_pillows():
    faces = [draw_face(0, number).resize((64, 64)) for number in range(20)]
    pillows = [io.BytesIO() for _ in faces]
    for face, file in zip(faces, pillows):
        face.save(file, "PNG", compress_level=1, compress_type=3)
    ours = [encode_png(np.asarray(face)) for face in faces]
    assert sum(map(len, ours)) < 1.15 * sum(len(file.getvalue()) for file in pillows)
