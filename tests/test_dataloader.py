import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
from dataloader import DataGenerater, find_images, make_loader, to_float, to_uint8
from support.augment import augment
from support.images import image_grid
from support.statistics import fingerprint


def test_pixel_convention_goes_both_ways():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert to_float(pixels).dtype == torch.float32
    assert to_float(pixels)[[0, 255]].tolist() == [-1, 1]
    assert torch.equal(to_uint8(to_float(pixels)), pixels)
    assert to_uint8(torch.tensor([-1.2, 1.2, 0.001])).tolist() == [0, 255, 128]


@pytest.mark.parametrize("in_memory", [True, False])
def test_items_are_the_files(dataroot, in_memory):
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory)
    assert len(dataset) == len(list((dataroot / "64" / "train").iterdir()))
    pixels = np.asarray(Image.open(dataset.paths[3]).convert("RGB"))
    assert dataset[3].dtype == torch.uint8 and np.array_equal(dataset[3].permute(1, 2, 0), pixels)
    assert torch.equal(dataset.__getitems__([5, 3])[1], dataset[3])


def test_resizes_to_the_size_asked_for(dataroot):
    assert DataGenerater(dataroot / "128" / "train", 64)[0].shape == (3, 64, 64)
    assert DataGenerater(dataroot / "128" / "train", None).image_size == 128


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 0), (False, 2)])
def test_an_epoch_has_each_image_once_and_can_be_had_again(dataroot, in_memory, workers):
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory)
    whole = len(dataset) // 8 * 8

    def epoch(*numbers, **more):
        return torch.cat(list(make_loader(dataset, 8, *numbers, workers=workers, **more)))

    first = epoch(0, 0)
    assert first.shape == (whole, 3, 64, 64) and len(first.flatten(1).unique(dim=0)) == whole
    assert torch.equal(first, epoch(0, 0))
    assert torch.equal(first[16:], epoch(0, 0, first_batch=2))
    assert not torch.equal(first, epoch(0, 1)) and not torch.equal(first, epoch(1, 0))
    halves = [epoch(0, 0, rank=rank, world_size=2).unflatten(0, (-1, 4)) for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 2).flatten(0, 2), first)


def test_fingerprint_sees_a_change(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    paths = find_images(tmp_path)
    before = fingerprint(paths, tmp_path)
    assert before == fingerprint(paths, tmp_path)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    assert fingerprint(paths, tmp_path) != before != fingerprint(paths[:1], tmp_path)


@pytest.mark.parametrize("chunk", [256, 2])
def test_decoding_keeps_the_order(dataroot, monkeypatch, chunk):
    """In this process, and in several: those start where there are more than 8 chunks."""
    monkeypatch.setattr(dataloader, "CHUNK", chunk)
    files, memory = (DataGenerater(dataroot / "64" / "train", 64, in_memory=keep) for keep in (False, True))
    assert memory.images.shape == (len(files), 3, 64, 64)
    for index in range(len(files)):
        assert torch.equal(files[index], memory[index])


def test_grid_keeps_pixels():
    images = torch.randint(0, 256, (5, 3, 6, 6), dtype=torch.uint8)
    grid = np.asarray(image_grid(images, columns=3))
    assert grid.shape == (2 * 8 + 2, 3 * 8 + 2, 3)
    assert np.array_equal(grid[10:16, 10:16], images[4].permute(1, 2, 0))


def test_bad_images(tmp_path):
    with pytest.raises(SystemExit, match="preprocess.py"):
        find_images(tmp_path / "none")
    with pytest.raises(SystemExit, match="no images"):
        find_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(SystemExit, match="b.png is 8x9"):
        DataGenerater(tmp_path, None)[1]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(SystemExit, match="b.png cannot be read"):
        DataGenerater(tmp_path, 8, in_memory=True)


def test_augment_by_hand():
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    same = torch.full((5,), 0.5)
    down = same.clone()
    down[3] = 0.0  # two pixels, an eighth: what comes in above is grey
    bright = same.clone()
    bright[0] = 0.75
    out = augment(images, torch.stack([same, down, bright]))
    assert (out[0] - images[0]).abs().max() < 1e-6
    assert (out[1, :, 2:] - images[1, :, :14]).abs().max() < 1e-6 and (out[1, :, :2] == 0).all()
    assert (out[2] - images[2] - 0.25).abs().max() < 1e-6
    grey = augment(images, torch.tensor([[0.5, 0.0, 0.5, 0.5, 0.5]] * 3))
    assert (grey - images.mean(1, keepdim=True)).abs().max() < 1e-6
    flat = augment(images, torch.tensor([[0.5, 0.5, -0.5, 0.5, 0.5]] * 3))  # a contrast of 0
    assert (flat - images.mean((1, 2, 3), keepdim=True)).abs().max() < 1e-6
    assert augment(images, None) is images


def test_augment_has_the_right_gradient():
    images = (torch.rand(2, 3, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    u = torch.rand(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda images: augment(images, u), images)
