"""Images in an .npz, the format of OpenAI's guided-diffusion (ADM).

    NpzImages(Path("samples.npz"))[7]           # uint8 (3,S,S)
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from support.files import UserError, printable


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
