"""Statistics of Inception features: measure them, keep them in .npz files, and tell whether two are comparable.

    stats = measure_features(net, batches, total=1000, label="faces")     # n, mu (D,), sigma (D,D), features (n,D)
    save_statistics(stats, Path("real.npz"))                              # mu and sigma, as pytorch-fid reads them
    NpzImages(Path("samples.npz"))[7]                                     # uint8 (3,S,S), as guided-diffusion writes
"""

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.colour import NAMES, measure_colour
from support.devices import explain_out_of_memory, with_float64
from support.distributed import gather, is_first_rank, my_share
from support.files import UserError, atomic_write, hash_file, printable
from support.metrics import mean_and_covariance
from support.weights import describe

VERSION = 2  # of the measurement: raised when the same images would give other numbers
READING = 4  # of images: raised when a file would give other pixels or statistics, so that the cache is measured again
# Two sets of statistics are comparable only if these are equal.
IDENTITY = ("network", "dims", "resize", "dtype", "weights_sha256", "version", "resolution")
# The kind of NumPy's dtype and the number of dimensions of each array in a file of statistics.
FIELDS = dict.fromkeys(("network", "resize", "dtype", "weights_sha256", "split"), ("U", 0))
FIELDS |= dict.fromkeys(("dims", "version", "resolution", "n"), ("i", 0))
FIELDS |= {"mu": ("f", 1), "sigma": ("f", 2), "features": ("f", 2), "colour": ("f", 1)}


def measure_features(net: torch.nn.Module, batches: Iterable[torch.Tensor], total: int, label: str) -> dict:
    """Statistics of `total` images in batches uint8 (N,3,S,S), of which each process passes its share.

    Raises UserError for fewer than 2 images and for features that are NaN or infinite.
    """
    device = next(net.parameters()).device
    n = len(my_share(range(total)))
    features = colours = torch.empty(0)
    done = 0
    bar = tqdm(total=n, desc=label, unit="img", disable=None if is_first_rank() else True)
    with bar, explain_out_of_memory("lower --batch-size"):
        for batch in batches:
            images = batch.to(device)
            found = net(images)
            if not done:
                # One tensor for all. Small tensors that stay keep glibc from joining the free memory around them: with
                # a list of them, each batch of 16 images took 13 MB more.
                features = found.new_empty(n, found.shape[1])
                colours = torch.empty(n, len(NAMES), dtype=torch.float64)
            features[done : done + len(batch)] = found
            colours[done : done + len(batch)] = measure_colour(images)
            done += len(batch)
            bar.update(len(batch))
    shares = gather((features.cpu(), colours))
    features, colours = (torch.cat(parts) for parts in zip(*shares))
    if len(features) < 2:
        raise UserError(f"{label}: {len(features)} images have no covariance; give 2 or more, 2,048 to quote FID")
    if not features.isfinite().all():
        raise UserError(f"{label}: the features hold NaN or infinite values; check the images and --weights")
    mu, sigma = mean_and_covariance(features.to(with_float64(device)))
    return {"n": len(features), "mu": mu, "sigma": sigma, "features": features, "colour": colours.mean(0).numpy()}


def choose(total: int, num: int | None) -> list[int]:
    """`num` of `total` indices in rising order, always the same ones; all of them where `num` is None."""
    if num is None or num == total:
        return list(range(total))
    return sorted(np.random.default_rng(0).choice(total, num, replace=False).tolist())


def refuse_mismatch(stats: dict, metadata: dict, path: Path) -> None:
    """Raise UserError when `stats` of `path` were measured in another way than `metadata` says."""
    for name in IDENTITY:
        if name in stats and name in metadata and stats[name] != metadata[name]:
            raise UserError(
                f"{name} is {stats[name]} in {path} and {metadata[name]} on the other side: such a distance means "
                "nothing; measure both sides alike"
            )


def note_unknown(known: Iterable[tuple[dict, Path]]) -> None:
    """Say which of the files of statistics, pairs (statistics, path), do not say how they were measured."""
    for stats, path in known:
        if "network" not in stats and is_first_rank():
            message = f"{path} does not say how it was measured: make sure that both sides were measured alike"
            print(f"note: {message}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- .npz of statistics


def holds_statistics(path: Path) -> bool:
    """Whether the file `path` is an .npz of statistics, and not of images. False for a folder.

    The content decides, not the name. Raises UserError for other files. Whether the arrays are whole is for
    load_statistics() and NpzImages to say.
    """
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read ({error.strerror}); give another") from None
    except Exception:  # zipfile raises many kinds on damaged files
        kind, advice = describe(path)
        raise UserError(f"{printable(path)} is {kind or 'neither a folder nor a whole .npz'}; "
                        f"{advice or 'give a folder of images, or an .npz of images or of mu and sigma'}") from None
    if {"mu.npy", "sigma.npy"} <= names:
        return True
    if "arr_0.npy" in names:
        return False
    raise UserError(f"{printable(path)} holds neither statistics (mu and sigma) nor images (arr_0); give a folder of "
                    "images, unzipped, or an .npz of these")


def save_statistics(stats: dict, path: Path) -> None:
    """Write an .npz of mu and sigma with their metadata. Raises UserError."""
    with atomic_write(path) as file:
        np.savez(file, **stats)


def load_statistics(path: Path) -> dict:
    """mu (D,) and sigma (D,D), float64, and the metadata that the file has. Raises UserError.

    Reads files of this repository, pytorch-fid and TTUR. The others have no metadata.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            stats = {name: content[name] for name in content if name in FIELDS}
        stats |= {name: stats[name].astype(np.float64) for name in ("mu", "sigma")}
        check_statistics(stats)
    except Exception as error:  # zipfile, zlib and numpy raise some ten kinds, depending on the byte that is damaged
        why = "Python objects" if "allow_pickle" in str(error) else " ".join(str(error).split())
        raise UserError(f"{path} holds no statistics mu and sigma ({why}); give another file") from None
    stats = {name: value.item() if value.ndim == 0 else value for name, value in stats.items()}
    if "features" in stats:
        stats["features"] = torch.from_numpy(stats["features"])
    return {"dims": len(stats["mu"])} | stats


def check_statistics(stats: dict[str, np.ndarray]) -> None:
    """Raise ValueError when an array is of another type, does not fit the others, or is not finite."""
    for name, value in stats.items():
        if (value.dtype.kind, value.ndim) != FIELDS[name]:
            raise ValueError(f"{name} is {value.dtype} with {value.ndim} dimensions")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")
    dims = len(stats["mu"])
    shapes = {"sigma": (dims, dims), "features": (int(stats.get("n", 0)), dims), "colour": (len(NAMES),)}
    for name, shape in shapes.items():
        if name in stats and stats[name].shape != shape:
            raise ValueError(f"{name} has shape {stats[name].shape}, not {shape}")
    if stats.get("dims", dims) != dims:
        raise ValueError("dims does not fit mu")


# ---------------------------------------------------------------------------------------------- the cache


def cached(folder: Path, paths: Sequence[Path], metadata: dict, measure: Callable[[], dict]) -> dict:
    """The statistics of the images in the files `paths`, which the cache `folder` keeps, or what measure() returns.

    The cache knows files by their whole content, and the measurement by its `metadata`.
    """
    stats = None
    if is_first_rank():
        try:
            contents = [hash_file(path) for path in dict.fromkeys(paths)]
        except OSError as error:
            raise UserError(f"{printable(error.filename)} cannot be read ({error.strerror}); remove it") from None
        key = json.dumps([contents, len(paths), metadata, READING], sort_keys=True)
        cache = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
        stats = read_cache(cache)
    stats = gather(stats)[0]
    if not stats:
        stats = measure()
        if is_first_rank():
            write_cache(stats, cache)
    return stats


def read_cache(path: Path) -> dict | None:
    """The statistics in the cache file `path`. None, with a warning, when the file is damaged."""
    try:
        return load_statistics(path) if path.is_file() else None
    except UserError as problem:
        print(f"warning: measured again, since {problem}", file=sys.stderr)
        return None


def write_cache(stats: dict, path: Path) -> None:
    """Keep `stats` for the next run. A folder that cannot be written is a warning, not an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(stats, path)
    except (OSError, UserError) as problem:
        print(f"warning: the statistics are not kept for next time ({problem})", file=sys.stderr)


# ---------------------------------------------------------------------------------------------- .npz of images


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
        self.root = path
        self.paths = [path] * len(images)  # of the file of each image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index].contiguous()  # as a folder gives them, so that the features have the same bits

    def __getitems__(self, indices: Sequence[int]) -> torch.Tensor:
        return torch.stack([self[index] for index in indices])
