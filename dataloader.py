"""Crops on disk -> batches of uint8 images (N,3,S,S), and the one place that knows what a pixel is.

    from dataloader import DataGenerater, make_loader, to_float
    dataset = DataGenerater("data/64/train", image_size=64, in_memory=True)
    for batch in make_loader(dataset, batch_size=128, seed=0, epoch=0):
        images = to_float(batch.to(device))         # float32 in [-1,1]

Images stay uint8 until they are on the device: a quarter of the bytes to keep and to copy.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cli import count_cores
from support.devices import can_start_workers
from support.files import printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CHUNK = 128  # images that a decoding process hands over at a time


class BadImage(SystemExit, Exception):
    """One sentence on an image file. Also an Exception: DataLoader brings nothing else out of its processes."""

    def __init__(self, message: str):  # which may be the traceback of such a process
        super().__init__(message.splitlines()[-1].rpartition("BadImage: ")[2])


def find_images(root: str | Path) -> list[Path]:
    """Every image file below `root`, sorted. Raises SystemExit where there is none."""
    root = Path(root)
    if not root.is_dir():
        raise SystemExit(f"error: there is no folder {root}; make the crops with `python preprocess.py PHOTOS`")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise SystemExit(f"error: {root} holds no images; make the crops with `python preprocess.py PHOTOS`")
    return paths


def read_image(path: Path, image_size: int | None = None) -> torch.Tensor:
    """The image at `path`, uint8 (3,H,W), RGB, resized to a square of `image_size` where it has another size.

    Raises BadImage naming the file when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        told = f"error: {printable(path)} cannot be read ({printable(error)})"
        raise BadImage(f"{told}; remove it or run preprocess.py again") from None
    if image_size and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class DataGenerater(Dataset):
    """The images below `root` as uint8 tensors (3,S,S); the spelling of the name is the report's.

    `image_size` None keeps the size of the files, which must then all be alike. With `in_memory`, or after
    decode_all(), all pixels are kept (3 S^2 bytes an image); otherwise files are read as they are asked for.
    Raises SystemExit (of a single file: BadImage) when one is missing, cannot be read or has another size.
    """

    def __init__(self, root: str | Path, image_size: int | None = 64, in_memory: bool = False):
        self.root, self.paths = Path(root), find_images(root)
        self.image_size = image_size or read_image(self.paths[0]).shape[-1]
        self.resize = image_size is not None
        self.images = None
        if in_memory:
            self.decode_all()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.images is not None:
            return self.images[index]
        image = read_image(self.paths[index], self.image_size if self.resize else None)
        if image.shape[1:] != (self.image_size, self.image_size):
            height, width = image.shape[1:]
            raise BadImage(
                f"error: {printable(self.paths[index])} is {width}x{height}, not {self.image_size}x{self.image_size} "
                f"like the first image of {self.root}; give a folder of images of one square size"
            )
        return image

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch at once, uint8 (N,3,S,S)."""
        if self.images is not None:
            return self.images[torch.as_tensor(indices)]
        return torch.stack([self[index] for index in indices])

    def decode_all(self) -> None:
        """Decodes every file once, with all cores, and keeps the pixels from then on."""
        # Processes: Pillow holds the interpreter's lock while it decodes, so that threads take turns.
        several = len(self) > 8 * CHUNK and can_start_workers()
        workers = min(count_cores(), 16) if several else 0
        loader = DataLoader(self, CHUNK, collate_fn=_as_it_is, num_workers=workers)
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)
        with tqdm(total=len(self), desc=f"reading {self.root}", unit="img", leave=False, disable=None) as bar:
            for part, batch in zip(images.split(CHUNK), loader):
                part.copy_(batch)
                bar.update(len(batch))
        self.images = images

    def sha256(self) -> str:
        """SHA-256 (hex) of the data: of all pixels where they are in memory, or else of the files' names and sizes."""
        if self.images is not None:
            return hashlib.sha256(self.images.numpy()).hexdigest()
        files = (f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256("".join(files).encode(errors="surrogateescape")).hexdigest()


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
) -> DataLoader:
    """Shuffled whole batches, uint8 (batch_size / world_size, 3, S, S), of one epoch, from `first_batch` on.

    The order depends on (seed, epoch) alone, so that an epoch can be had again, or gone on with. Images that do not
    fill a batch are left out of this epoch. Each of `world_size` processes gets its own part of every batch.
    `workers` processes read the files; they are of no use, and not started, where the images are in memory, and
    this process reads them where none can be started.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[first_batch:, rank::world_size]
    return DataLoader(
        dataset,
        batch_sampler=batches.tolist(),
        collate_fn=_as_it_is,
        num_workers=workers if dataset.images is None and can_start_workers() else 0,
        pin_memory=pin_memory,
    )


def _as_it_is(batch: torch.Tensor) -> torch.Tensor:
    return batch


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0,255] -> float32 [-1,1], of any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1,1] -> uint8 [0,255], of any shape, rounded to the nearest."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


