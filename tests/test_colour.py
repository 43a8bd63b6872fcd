"""Contrast, saturation, dark and light pixels: support/colour.py."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from support.augment import augment, draw_augmentations
from support.colour import LEVELS, colour_loss, colour_moments, compare_colour, measure_colour


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


def moments(image):
    """colour_moments() of one image in [-1,1], which may lie between the values of 8-bit images."""
    return (colour_moments(image * LEVELS) / LEVELS)[0]


def test_colour_moments_by_hand():
    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, :2], image[0, 1, :1] = 0.95, -0.98  # red in the upper half, no green in the upper quarter
    red, green = (16 / 15 * 0.25 * 0.95**2) ** 0.5, (16 / 15 * 3 / 16 * 0.98**2) ** 0.5
    light, dark = 30 / 2 * 0.05 / 2**0.5, 30 / 4 * 0.08 / 2**0.5
    saturation = 0.25 * (0.95 + 0.98) + 0.25 * 0.95
    thumbnail = [0.95 / 4] * 8 + [0] * 8 + [-0.98 / 4] * 4 + [0] * 12 + [0] * 16
    expected = [*thumbnail, red, green, 0.01, light, -dark, 0, light, dark, 0, saturation, 0]
    assert moments(image).tolist() == pytest.approx(expected, abs=2e-4)

    image = torch.zeros(1, 3, 4, 4)
    image[0, 0, 1, 1] = 0.9  # it lies in four of the nine squares of 2x2 pixels
    assert moments(image)[-1].item() == pytest.approx(30 * 4 / 9 * (0.6 + 0.3 + 0.3) / 3)

    image = torch.zeros(1, 3, 8, 8)
    image[0, 2, 0, 2:4] = 0.8  # in blue, half of the second of the 4x4 squares of 2x2 pixels
    assert moments(image)[:48].tolist() == pytest.approx([0] * 33 + [0.4 / 4] + [0] * 14)


def test_colour_loss_by_hand():
    """Grey against red, both flat: the mean of red and the saturation are 64 levels apart. No gradient is infinite."""
    levels = torch.full((2, 4, 3, 8, 8), 128.0)
    levels[1, :, 0] += 64
    real, fake = levels / 127.5 - 1
    fake.requires_grad_()
    loss = colour_loss(real, fake)
    loss.backward()
    assert loss.item() == pytest.approx(2 * 2**0.5 * 64 / 127.5)
    assert fake.grad.isfinite().all() and (fake.grad[:, 0] > 0).all()
    assert colour_loss(fake, fake).item() == 0


def test_colour_loss_rounds_fakes_to_8_bits_as_real_images_are():
    """Faint colours, which rounding changes: the loss is that of the rounded images, and its gradient is not 0."""
    torch.manual_seed(0)
    real = torch.randint(0, 256, (4, 3, 8, 8)) / 127.5 - 1
    fake = (torch.randn(4, 3, 8, 8) / 300).requires_grad_()
    rounded = ((fake.detach() + 1) * 127.5).round() / 127.5 - 1
    assert (moments(rounded) - moments(fake)).abs().max() > 0.01
    loss = colour_loss(real, fake)
    assert loss.item() == pytest.approx(colour_loss(real, rounded).item(), abs=1e-5)
    assert (torch.autograd.grad(loss, fake)[0] != 0).all()


VIEWS = "view|_unsafe_view|unsqueeze|squeeze|expand|slice|select|permute|unbind|detach|alias|t|transpose|split|diagonal"


class CountOperations(TorchDispatchMode):
    """Counts the operations that write memory: on a GPU, each is the launch of a kernel."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += re.fullmatch(rf"aten\.({VIEWS})", str(operation.overloadpacket)) is None
        return operation(*args, **(kwargs or {}))


def test_colour_loss_and_augmentation_take_few_operations():
    """With their gradients. A GPU takes longer to launch them than to compute them: they were 138 and 88."""
    real, fake = torch.rand(4, 3, 64, 64), torch.rand(4, 3, 64, 64).requires_grad_()
    one = torch.ones(())
    with CountOperations() as colour:
        colour_loss(real, fake).backward(one)
    assert colour.count <= 90
    parameters = draw_augmentations(0, 0, 4, 64)
    with CountOperations() as augmentation:
        augment(real, parameters[0])
        augment(fake.detach(), parameters[1])
        augment(fake, parameters[2]).sum().backward()
    assert augmentation.count <= 55


def test_colour_loss_compares_how_colours_vary():
    """Of fakes with the right mean, those that vary as real images do cost nothing on average, and all others more."""
    torch.manual_seed(0)

    def greys(spread):
        return (spread * torch.randn(4000, 1, 1, 1)).clamp(-0.9, 0.9).expand(-1, 3, 4, 4)

    def loss(spread):
        batches = zip(greys(0.2).split(16), greys(spread).split(16))
        return sum(colour_loss(*batch) for batch in batches).item() / 250

    assert abs(loss(0.2)) < 0.01
    assert loss(0.1) > 0.03 and loss(0.4) > 0.03


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
