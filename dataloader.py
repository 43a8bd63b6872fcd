"""Crops on disk -> batches of uint8 images (N,3,S,S), and the one place that knows what a pixel is.

    from dataloader import DataGenerater, make_loader, to_float
    dataset = DataGenerater("data/64/train", image_size=64, in_memory=True)
    for batch in make_loader(dataset, batch_size=128, seed=0, epoch=0):
        images = to_float(batch.to(device))         # float32 in [-1,1]

Images stay uint8 until they are on the device: a quarter of the bytes to keep and to copy.
"""

import hashlib
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from preprocess import atomic_write, count_cores, printable

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


def fingerprint(paths: Sequence[Path], root: str | Path) -> str:
    """SHA-256 (hex) over names below `root`, sizes and modification times: changes when the data does."""
    digest = hashlib.sha256()
    for path in paths:
        info = path.stat()
        digest.update(f"{path.relative_to(root).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return digest.hexdigest()


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


def can_start_workers() -> bool:
    """Whether processes can share memory and locks here: not so in a container without /dev/shm."""
    try:
        torch.zeros(1).share_memory_()
        multiprocessing.Lock()
    except (OSError, RuntimeError):
        return False
    return True


def fits_in_memory(n: int, image_size: int) -> bool:
    """Whether `n` decoded images take less than half of this machine's memory (4 GiB where that is not told)."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        memory = 8 * 2**30
    return 3 * image_size**2 * n < memory / 2


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


def augment(images: torch.Tensor, u: torch.Tensor | None) -> torch.Tensor:
    """Images (N,3,S,S) in [-1,1], each in other colours and shifted by up to an eighth of its side; differentiable.

    `u` (N,5), uniform in [0,1), says how: brightness, saturation, contrast, and the shift down and right, past grey;
    None leaves them as they are. Where D sees real and generated images alike through this, it cannot know the real
    ones by heart (Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", 2020: its colours and
    translation).
    """
    if u is None:
        return images
    brightness, saturation, contrast = u[:, :3].T[:, :, None, None, None]
    images = images + brightness - 0.5
    grey = images.mean(1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean((1, 2, 3), keepdim=True)
    images = (images - mean) * (contrast + 0.5) + mean

    size, most = images.shape[-1], images.shape[-1] // 8
    shift = (u[:, 3:] * (2 * most + 1)).long()
    rows, columns = (shift.T[:, :, None] + torch.arange(size, device=u.device)).unbind()
    padded = torch.nn.functional.pad(images, [most] * 4).permute(0, 2, 3, 1)
    which = torch.arange(len(images), device=u.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [-1,1] -> uint8 [0,255], of any shape, rounded to the nearest."""
    return images.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def image_grid(images: torch.Tensor, columns: int = 8) -> Image.Image:
    """One picture of uint8 images (N,3,H,W), row by row with two black pixels between: pixels as they are."""
    n, _, height, width = images.shape
    columns = min(columns, n)
    grid = Image.new("RGB", (columns * (width + 2) + 2, -(-n // columns) * (height + 2) + 2))
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        grid.paste(Image.fromarray(image), (2 + i % columns * (width + 2), 2 + i // columns * (height + 2)))
    return grid


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Writes `image` to `path`, whole or not at all, in the format of its suffix."""
    with atomic_write(path) as file:
        image.save(file, path.suffix[1:], **options)


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> None:
    """An endless GIF; the last frame stays a second."""
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
