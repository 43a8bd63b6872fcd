"""Batches of crops: dataloader.py."""

import numpy as np
import pytest
import torch
from PIL import Image

import dataloader
from dataloader import DataGenerater, find_images, make_loader, to_float, to_uint8
from support.files import UserError


def test_pixel_convention_in_both_directions():
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


def test_resizes_to_the_requested_size(dataroot):
    assert DataGenerater(dataroot / "128" / "train", 64)[0].shape == (3, 64, 64)
    assert DataGenerater(dataroot / "128" / "train", None).image_size == 128


@pytest.mark.parametrize("in_memory, workers", [(True, 0), (False, 0), (False, 2)])
def test_an_epoch_has_each_image_once_and_is_reproducible(dataroot, in_memory, workers):
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


@pytest.mark.parametrize("chunk", [256, 2])
def test_decoding_into_memory_keeps_the_order(dataroot, monkeypatch, chunk):
    """In this process, and in worker processes, which start for more than 8 chunks."""
    monkeypatch.setattr(dataloader, "CHUNK", chunk)
    files, memory = (DataGenerater(dataroot / "64" / "train", 64, in_memory=keep) for keep in (False, True))
    assert memory.images.shape == (len(files), 3, 64, 64)
    for index in range(len(files)):
        assert torch.equal(files[index], memory[index])


def test_missing_and_damaged_images_are_refused(tmp_path):
    with pytest.raises(UserError, match="preprocess.py"):
        find_images(tmp_path / "none")
    with pytest.raises(UserError, match="no images"):
        find_images(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="b.png is 8x9"):
        DataGenerater(tmp_path, None)[1]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match="b.png cannot be read"):
        DataGenerater(tmp_path, 8, in_memory=True)
