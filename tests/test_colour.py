"""Contrast, saturation, dark and light pixels: support/colour.py."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from support.colour import compare_colour, measure_colour


def picture(left, right):
    """An image uint8 (1,3,8,8) of two colours."""
    image = torch.empty(1, 3, 8, 8, dtype=torch.uint8)
    image[..., :4], image[..., 4:] = (torch.tensor(c, dtype=torch.uint8)[:, None, None] for c in (left, right))
    return image


@pytest.mark.parametrize("left, right, expected", [
    ((90, 90, 90), (90, 90, 90), [0, 0, 0, 0]),
    ((4, 4, 4), (251, 251, 255), [123.728, 2, 0.5, 0.5]),
    ((5, 4, 4), (250, 255, 255), [124.603, 3, 0, 0]),
    ((200, 100, 50), (200, 100, 50), [0, 150, 0, 0]),
])
def test_colour_of_two_tones(left, right, expected):
    measured = measure_colour(picture(left, right))
    assert measured.shape == (1, 4) and measured.dtype == torch.float64
    assert measured[0].tolist() == pytest.approx(expected, abs=1e-2)


def test_ratios():
    result = compare_colour([60, 40, 0.02, 0], [30, 40, 0.04, 0.1])
    assert [values["ratio"] for values in result.values()] == [0.5, 1, 2, None]


def test_evaluate_reports_the_colour(run_evaluate, dataroot, tmp_path):
    """Half as much contrast and saturation: all pixels are halfway to grey. A second run takes the cache."""
    (tmp_path / "pale").mkdir()
    for path in (dataroot / "64" / "train").glob("*.png"):
        pixels = np.asarray(Image.open(path)).astype(float)
        Image.fromarray((pixels / 2 + 64).round().astype(np.uint8)).save(tmp_path / "pale" / path.name)
    flags = ["--images", tmp_path / "pale", "--real", dataroot / "64" / "train", "--no-floor"]
    for _ in range(2):
        out = run_evaluate(*flags, "--json", tmp_path / "r.json", "--overwrite").out
        assert "relative to the real images: contrast 0.50, saturation 0.50, dark" in out
    colour = json.loads((tmp_path / "r.json").read_text())["colour"]
    assert colour["contrast"]["fake"] == pytest.approx(colour["contrast"]["real"] / 2, rel=0.02)
