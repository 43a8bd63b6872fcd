"""Crops on disk -> batches of uint8 images (N,3,S,S). Also the one place that defines what a pixel value means.

    from dataloader import DataGenerater, make_loader, to_float
    dataset = DataGenerater("data/64/train", image_size=64, in_memory=True)
    for batch in make_loader(dataset, batch_size=128, seed=0, epoch=0):
        images = to_float(batch.to(device))         # float32 in [-1,1]

Images stay uint8 until they are on the device: that takes a quarter of the memory and of the transfer.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from support.cli import count_cores
from support.devices import can_start_workers
from support.files import UserError, printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CHUNK = 128  # images that a decoding process hands over at a time


def find_images(root: str | Path) -> list[Path]:
    """Every image file below `root`, sorted. Raises UserError when there is none."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; make the crops with `python preprocess.py PHOTOS`")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{root} holds no images; make the crops with `python preprocess.py PHOTOS`")
    return paths


def read_image(path: Path, image_size: int | None = None) -> torch.Tensor:
    """The image at `path`, uint8 (3,H,W), RGB, resized to a square of `image_size` where it has another size.

    Raises UserError, which names the file, when it cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        message = f"{printable(path)} cannot be read ({printable(error)}); remove it or run preprocess.py again"
        raise UserError(message) from None
    if image_size and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class DataGenerater(Dataset):
    """The images below `root` as uint8 tensors (3,S,S). The spelling of the name is the report's.

    `image_size` None keeps the size of the files, which must then all be squares of one size. With `in_memory`, or
    after decode_all(), all pixels stay in memory (3 S^2 bytes an image); otherwise each file is read when asked for.
    Raises UserError when a file is missing, cannot be read or has another size.
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
            raise UserError(
                f"{printable(self.paths[index])} is {width}x{height}, not {self.image_size}x{self.image_size} like the "
                f"first image of {self.root}; give a folder of images of one square size"
            )
        return image

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        """A whole batch, uint8 (N,3,S,S)."""
        if self.images is not None:
            return self.images[torch.as_tensor(indices)]
        return torch.stack([self[index] for index in indices])

    def decode_all(self) -> None:
        """Decode every file once, with all cores, and keep the pixels in memory."""
        # Processes, not threads: Pillow holds the interpreter's lock while it decodes.
        several = len(self) > 8 * CHUNK and can_start_workers()
        images = torch.empty(len(self), 3, self.image_size, self.image_size, dtype=torch.uint8)
        parts = torch.arange(len(self)).split(CHUNK)
        batches = load_batches(self, [part.tolist() for part in parts], min(count_cores(), 16) if several else 0)
        with tqdm(total=len(self), desc=f"reading {self.root}", unit="img", leave=False, disable=None) as bar:
            for part, batch in zip(images.split(CHUNK), batches):
                part.copy_(batch)
                bar.update(len(batch))
        self.images = images

    def sha256(self) -> str:
        """SHA-256 (hex) of all pixels where they are in memory, or else of the names and sizes of the files."""
        if self.images is not None:
            return hashlib.sha256(self.images.numpy()).hexdigest()
        files = (f"{path.relative_to(self.root).as_posix()}\0{path.stat().st_size}\n" for path in self.paths)
        return hashlib.sha256("".join(files).encode(errors="surrogateescape")).hexdigest()


class ErrorsAsValues(Dataset):
    """Batches of a dataset, or the UserError that reading one raises. DataLoader would turn it into a traceback."""

    def __init__(self, dataset: DataGenerater):
        self.dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor | UserError:
        try:
            return self.dataset.__getitems__(indices)
        except UserError as error:
            return error


def load_batches(dataset: DataGenerater, batches: list, workers: int, pin_memory: bool = False) -> Iterator:
    """The images uint8 (N,3,S,S) of each list of indices in `batches`, read by `workers` processes."""
    options = {"collate_fn": keep_batch, "num_workers": workers, "pin_memory": pin_memory}
    for batch in DataLoader(ErrorsAsValues(dataset), batch_sampler=batches, **options):
        if isinstance(batch, UserError):
            raise batch
        yield batch


def keep_batch(batch: torch.Tensor) -> torch.Tensor:
    """A collate_fn for batches that are tensors already. Not a lambda: worker processes may have to pickle it."""
    return batch


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
) -> Iterator[torch.Tensor]:
    """Shuffled whole batches, uint8 (batch_size / world_size, 3, S, S), of one epoch, from `first_batch` on.

    The order depends on (seed, epoch) alone, so that a resumed training continues with the same batches. An epoch
    leaves out the images that do not fill a batch. Each of `world_size` processes gets its own part of every batch.
    `workers` processes read the files. None starts when the images are in memory or the system cannot start any.
    """
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    batches = order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)[first_batch:, rank::world_size]
    workers = workers if dataset.images is None and can_start_workers() else 0
    return load_batches(dataset, batches.tolist(), workers, pin_memory)


def read_batches(dataset: DataGenerater, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """Images uint8 (N,3,S,S). Threads decode the next batch while the caller measures one."""
    with ThreadPoolExecutor() as pool:
        ready = None
        for start in range(0, len(indices), batch_size):
            coming = pool.map(dataset.__getitem__, indices[start : start + batch_size])
            if ready:
                yield torch.stack(list(ready))
            ready = coming
        if ready:
            yield torch.stack(list(ready))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 [0,255] -> float32 [-1,1], of any shape."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1,1] -> uint8 [0,255], of any shape, rounded to the nearest."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
