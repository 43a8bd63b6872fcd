"""Crops on disk -> batches of uint8 images (N,3,S,S). Also the one place that defines what a pixel value means.

    from dataloader import DataGenerater, make_loader, to_float
    dataset = DataGenerater("data/64/train", image_size=64, in_memory=True)
    for batch in make_loader(dataset, batch_size=128, seed=0, epoch=0):
        images = to_float(batch.to(device))         # float32 in [-1,1]

Images stay uint8 until they are on the device: that takes a quarter of the memory and of the transfer.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from support.feature_stats import NpzImages, holds_statistics
from support.files import UserError, printable
from support.photos import Unreadable, read_rgb
from support.sources import find_images, is_crop_folder
from support.workers import count_cores, iterate_in_processes

CHUNK = 128  # images that a decoding process hands over at a time
SHOWN = 3  # files that a message names


def read_image(path: Path, image_size: int | None = None) -> torch.Tensor:
    """The square image at `path`, uint8 (3,S,S), upright, RGB, resized to `image_size` where it has another size.

    Raises Unreadable when it cannot be read, and UserError when it is not square. Both name the file.
    """
    image = read_rgb(path)
    if image.width != image.height:
        raise UserError(f"{printable(path)} is {image.width}x{image.height}, not square; make square crops of photos "
                        "with `python preprocess.py PHOTOS`")
    if image_size and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def explain_unreadable(root: Path, paths: Sequence[Path]) -> str:
    """One sentence that names the files of `paths` below `root` that are gone or cannot be read; "" where all can."""
    gone = []
    damaged = []
    reasons = []
    for path in paths:
        try:
            read_image(path)
        except Unreadable as error:
            is_gone = isinstance(error.__cause__, FileNotFoundError)
            (gone if is_gone else damaged).append(path)
            reasons += [] if is_gone else [str(error)]
        except UserError:
            pass
    if gone:
        names = "; ".join([printable(path.name) for path in gone[:SHOWN]] + ["..."] * (len(gone) > SHOWN))
        return (f"{len(gone):,} of {len(paths):,} images in {printable(root)} are gone ({names}): they were removed or "
                "moved while they were read; put them back, or start again with the images that are there")
    if not damaged:
        return ""
    are_crops = all(is_crop_folder(path.absolute().parent.parent) for path in damaged)
    again = " and run preprocess.py again" if are_crops else ""
    if len(damaged) == 1:
        return f"{reasons[0]}; remove it{again}"
    shown = "; ".join(reasons[:SHOWN] + ["..."] * (len(damaged) > SHOWN))
    return f"{len(damaged):,} of {len(paths):,} images in {printable(root)} are damaged: {shown}; remove them{again}"


class DataGenerater(Dataset):
    """The images below `root` as uint8 tensors (3,S,S). The spelling of the name is the report's.

    The files must be square. `image_size` None keeps their size, which must then be the same for all. With
    `in_memory`, or after decode_all(), all pixels stay in memory (3 S^2 bytes an image); otherwise each file is read
    when asked for. Raises UserError when a file is missing, cannot be read, is not square or has another size. The
    first file is read at once, so that a folder of photos is refused before a training begins.
    """

    def __init__(self, root: str | Path, image_size: int | None = 64, in_memory: bool = False):
        self.root = Path(root)
        self.paths = find_images(root)
        self.resize_to = image_size
        self.images = None
        self.image_size = self.read(0).shape[-1]
        if in_memory:
            self.decode_all()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.images is not None:
            return self.images[index]
        image = self.read(index)
        if image.shape[-1] != self.image_size:
            raise UserError(
                f"{printable(self.paths[index])} is {image.shape[-1]}x{image.shape[-1]}, not "
                f"{self.image_size}x{self.image_size} like the first image of {printable(self.root)}; give a folder "
                "of images of one size"
            )
        return image

    def read(self, index: int) -> torch.Tensor:
        """One image from its file. The UserError for an unreadable file names all unreadable files."""
        try:
            return read_image(self.paths[index], self.resize_to)
        except Unreadable as error:
            raise UserError(explain_unreadable(self.root, self.paths) or f"{error}; try again") from None

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch, uint8 (N,3,S,S)."""
        if self.images is not None:
            return self.images[torch.as_tensor(indices)]
        return torch.stack([self[index] for index in indices])

    def decode_all(self) -> None:
        """Decode every file once, with all cores, and keep the pixels in memory."""
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)
        parts = torch.arange(len(self)).split(CHUNK)
        batches = load_batches(self, [part.tolist() for part in parts], count_decoders(self, len(self)))
        bar = tqdm(total=len(self), desc=f"reading {self.root}", unit="img", leave=False, disable=None)
        with closing(batches), bar:
            for part, batch in zip(images.split(CHUNK), batches):
                part.copy_(batch)
                bar.update(len(batch))
        self.images = images

    def sha256(self) -> str:
        """SHA-256 (hex) of the names of all images, and of the pixels of a thousand of them.

        It is the same in memory and from files, and on machines that write the same pixels as different PNGs.
        """
        names = (path.relative_to(self.root).as_posix() for path in self.paths)
        digest = hashlib.sha256(os.fsencode("\n".join(names)))
        for index in np.unique(np.linspace(0, len(self) - 1, 1000).astype(int)):
            digest.update(self[index].contiguous().numpy())
        return digest.hexdigest()


def open_images(path: Path) -> DataGenerater | NpzImages:
    """The images in a folder or an .npz file. Raises UserError for other files, and for statistics."""
    if holds_statistics(path):
        raise UserError(f"{path} holds statistics; give a folder or an .npz of images")
    return NpzImages(path) if path.is_file() else DataGenerater(path, image_size=None)


def read_pixels(dataset: DataGenerater, indices: Sequence[int]) -> np.ndarray:
    """The images uint8 (N,3,S,S) of `indices`. It computes in NumPy, since torch's threads do not survive a fork."""
    pixels = np.empty((len(indices), 3, dataset.image_size, dataset.image_size), np.uint8)
    return np.stack([dataset[index].numpy() for index in indices], out=pixels)


def load_batches(dataset: DataGenerater | NpzImages, batches: list, workers: int, pin_memory: bool = False) -> Iterator:
    """The images uint8 (N,3,S,S) of each list of indices in `batches`, read by `workers` processes.

    Raises the UserErrors of `dataset`, and one when a worker process dies.
    """
    if workers:
        remedy = "free some memory and run the same command again; train.py goes on by --resume"
        read = iterate_in_processes(partial(read_pixels, dataset), batches, workers, remedy, ahead=2 * workers)
        images = map(torch.from_numpy, read)
    else:
        images = map(dataset.__getitems__, batches)
    for batch in images:
        yield batch.pin_memory() if pin_memory else batch


def make_loader(
    dataset: DataGenerater,
    batch_size: int,
    seed: int,
    epoch: int,
    first_batch: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    rank: int = 0,
    world_size: int = 1,
    as_indices: bool = False,
) -> Iterator[torch.Tensor]:
    """Shuffled whole batches, uint8 (batch_size / world_size, 3, S, S), of one epoch, from `first_batch` on.

    The order depends on (seed, epoch) alone, so that a resumed training continues with the same batches. An epoch
    leaves out the images that do not fill a batch. Each of `world_size` processes gets its own part of every batch.
    `workers` processes read the files. None starts when the images are in memory. With `as_indices`, batches are the
    indices int64 (batch_size / world_size,) of the images, for a caller that has the images on its device.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[first_batch:, rank::world_size]
    if as_indices:
        return iter(torch.from_numpy(batches).contiguous())
    return load_batches(dataset, batches.tolist(), workers if dataset.images is None else 0, pin_memory)


def read_batches(dataset: DataGenerater | NpzImages, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """The images uint8 (N,3,S,S) of `indices`, in their order. Processes decode while the caller measures."""
    batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    return load_batches(dataset, batches, count_decoders(dataset, len(indices)))


def count_decoders(dataset: DataGenerater | NpzImages, n: int) -> int:
    """How many processes should decode `n` images: none for images in memory, or for few.

    Processes, not threads: Pillow holds the interpreter's lock while it decodes, so that threads share one core.
    """
    return min(count_cores(), 16) if dataset.images is None and n > 8 * CHUNK else 0


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0,255] -> float32 [-1,1], of any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1,1] -> uint8 [0,255], of any shape, rounded to the nearest."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
