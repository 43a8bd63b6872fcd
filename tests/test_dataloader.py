"""Batches of crops: dataloader.py."""

import shutil

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import dataloader
import preprocess
from dataloader import DataGenerater, find_images, make_loader, read_batches, read_image, to_float, to_uint8
from support.files import UserError
from support.sources import RARE_SUFFIXES, SUFFIXES
from support.splits import crop_name


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


@pytest.mark.parametrize("kind", ["files", "memory", "npz"])
@pytest.mark.parametrize("chunk, started", [(256, 0), (2, 2)])
def test_processes_read_the_batches_of_files(dataroot, tmp_path, monkeypatch, kind, chunk, started):
    """Threads would share one core, since Pillow holds the interpreter's lock while it decodes."""
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=kind == "memory")
    indices = list(range(len(dataset)))[::-1]
    expected = dataset.__getitems__(indices)
    if kind == "npz":
        np.savez(tmp_path / "a.npz", expected.permute(0, 2, 3, 1).numpy())
        dataset, indices = dataloader.open_images(tmp_path / "a.npz"), range(len(dataset))
    workers, load = [], dataloader.load_batches
    monkeypatch.setattr(dataloader, "CHUNK", chunk)
    monkeypatch.setattr(dataloader, "count_cores", lambda: 2)
    monkeypatch.setattr(dataloader, "load_batches", lambda *args: workers.append(args[2]) or load(*args))
    batches = list(read_batches(dataset, indices, 5))
    assert torch.equal(torch.cat(batches), expected) and workers == [started if kind == "files" else 0]


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


# ---------------------------------------------------------------------------------------------- any kind of image


def test_preprocess_and_dataloader_read_the_same_pixels(tmp_path):
    """16-bit grey, transparency, EXIF orientation and each suffix: a crop of the whole image has the pixels read."""
    src, rng = tmp_path / "src", np.random.default_rng(0)
    src.mkdir()
    photo = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    Image.fromarray(rng.integers(0, 65536, (64, 64), np.uint16)).save(src / "deep.png")
    Image.fromarray(rng.integers(0, 256, (64, 64, 4), np.uint8)).save(src / "clear.png")
    photo.quantize(16).save(src / "palette.png", transparency=3)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo.save(src / "turned.jpg", exif=exif)
    for suffix in (*SUFFIXES, *RARE_SUFFIXES):
        kind = {".apng": "png", ".tif": "tiff", ".tiff": "tiff"}.get(suffix, suffix[1:])
        kind = "jpeg" if suffix.startswith(".j") else "ppm" if suffix.startswith(".p") and kind != "png" else kind
        photo.save(src / f"as_{suffix[1:]}{suffix}", kind)
    preprocess.main([str(src), "--dataroot", str(tmp_path), "--sizes", "64", "--workers", "0"])
    paths = find_images(src)
    assert len(paths) == 4 + len(SUFFIXES) + len(RARE_SUFFIXES)
    for path in paths:
        crop = next((tmp_path / "64").rglob(f"{crop_name(path.name)}.png"))
        assert torch.equal(read_image(path), read_image(crop)), path
    assert abs(read_image(src / "deep.png").float().mean() - 127) < 5


# ---------------------------------------------------------------------------------------------- unreadable images


@pytest.mark.parametrize("bad", [1, 2, 5])
def test_all_unreadable_images_are_named_in_one_message(dataroot, tmp_path, bad):
    shutil.copytree(dataroot / "64", tmp_path / "64")
    root = tmp_path / "64" / "train"
    for number in range(bad):
        (root / f"a_{number}.png").write_bytes(b"text" * (number % 2))
    last = find_images(root)[-1]
    last.write_bytes(last.read_bytes()[:-500])
    for use in (lambda: DataGenerater(root, 64), lambda: DataGenerater(root, None)):
        with pytest.raises(UserError) as error:
            use()
        message = str(error.value)
        assert f"{bad + 1} of {len(find_images(root))} images in {root}" in message
        assert "a_0.png cannot be read (an empty file)" in message
        assert (last.name in message) == (bad < 3) and message.endswith("; remove them and run preprocess.py again")


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_all_named_wherever_one_is_met(tmp_path, workers):
    for number in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number:02d}.png")
    dataset = DataGenerater(tmp_path, 8)
    for number in (7, 15):
        (tmp_path / f"{number:02d}.png").write_bytes(b"")
    with pytest.raises(UserError) as error:
        list(make_loader(dataset, 4, 0, 0, workers=workers))
    with pytest.raises(UserError) as other:
        list(read_batches(dataset, range(20), 10))
    for message in (str(error.value), str(other.value)):
        assert "2 of 20" in message and "07.png" in message and "15.png" in message
        assert message.endswith("; remove them")  # preprocess.py did not make this folder


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [1, 5])
def test_images_that_were_removed_during_a_training_are_gone_and_not_damaged(tmp_path, workers, number):
    for index in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index:02d}.png")
    dataset = DataGenerater(tmp_path, 8)
    for index in range(number):
        (tmp_path / f"{index:02d}.png").unlink()
    with pytest.raises(UserError, match=rf"{number} of 20 images in .* are gone \(00.png.*start again") as error:
        list(make_loader(dataset, 4, 0, 0, workers=workers))
    assert "damaged" not in str(error.value) and ("; ..." in str(error.value)) == (number > 3)


@pytest.mark.parametrize("image_size", [64, None])
def test_images_that_are_not_square_are_refused(tmp_path, image_size):
    """train.py would squeeze the photos of CelebA, 178x218."""
    Image.new("RGB", (178, 218)).save(tmp_path / "b.jpg")
    with pytest.raises(UserError, match="b.jpg is 178x218, not square; .*python preprocess.py"):
        DataGenerater(tmp_path, image_size)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="b.jpg is 178x218, not square"):
        DataGenerater(tmp_path, image_size, in_memory=True)
