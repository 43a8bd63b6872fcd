"""Where evaluate.py's images come from: a folder or an .npz of images, or an .npz of their statistics.

    holds_statistics(Path("real.npz"))          # True: mu and sigma
    NpzImages(Path("samples.npz"))[7]           # uint8 (3,S,S), from the format of OpenAI's guided-diffusion (ADM)
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from support.file_kinds import PYTORCH, SAMPLES, STATISTICS, describe
from support.files import UserError, printable

SAVEZ = "write its mu and sigma to an .npz with `numpy.savez(FILE, mu=mu, sigma=sigma)`"
# What to do with a file of another kind.
ADVICE = {
    "a NumPy array (.npy)": SAVEZ,
    "a Python pickle": SAVEZ,
    PYTORCH: f"pass a generator to --params; if it holds statistics, {SAVEZ}",
    "a zip of other files": "unzip it and give the folder",
    "a compressed archive": "unpack it and give the folder",
    "an image": "give the folder that holds it",
    "an empty file": "copy or download it again",
    "a git-lfs pointer": "fetch the file with `git lfs pull`",
    "an HTML page": "download the file itself, not the page that links to it",
}


def holds_statistics(path: Path) -> bool:
    """Whether `path` is an .npz of statistics, and not images. Raises UserError, which names the kind of other files.

    The content decides, not the name. Whether the statistics are whole is for load_statistics() to say.
    """
    named_npz = path.suffix.lower() == ".npz"
    if not path.is_file():
        return named_npz and not path.is_dir()
    try:
        kind = describe(path)
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror}); give another") from None
    if kind in (STATISTICS, SAMPLES):
        return kind == STATISTICS
    if named_npz and kind in ("", "an .npz of other arrays"):
        return True
    what = kind or "neither a folder nor an .npz"
    raise UserError(f"{printable(path)} is {what}; {ADVICE.get(kind, 'give a folder of images or an .npz')}")


class NpzImages:
    """The images in the array `arr_0`, uint8 (N,S,S,3), of an .npz, as a dataset like dataloader.DataGenerater.

    All pixels are in memory (3 S^2 bytes an image). Raises UserError when the array has another type or shape.
    """

    def __init__(self, path: Path):
        try:
            with np.load(path, allow_pickle=False) as content:
                images = content["arr_0"]
        except Exception as error:  # zipfile, zlib and numpy raise some ten kinds, depending on the damaged byte
            raise UserError(f"{printable(path)} is damaged ({type(error).__name__}); copy it again") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
            found = f"{images.dtype} {images.shape}"
            raise UserError(f"{printable(path)}: arr_0 is {found}, not images uint8 (N,S,S,3); give another file")
        if not images.size:
            raise UserError(f"{printable(path)} holds no images; give another file")
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.image_size = self.images.shape[-1]
        self.root, self.paths = path.parent, [path] * len(self.images)  # for the fingerprint of the cache

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index].contiguous()  # as a folder gives them, so that the features have the same bits

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([self[index] for index in indices])


@lru_cache(maxsize=2)  # the real and the generated images
def read_npz_images(path: Path, mtime_ns: int) -> NpzImages:
    """The images in the .npz `path`. Reads it once in a run, and again after it has changed at `mtime_ns`."""
    return NpzImages(path)
