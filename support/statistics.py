"""Means and covariances on disk, what they depend on, the cache."""

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from support.files import atomic_write

VERSION = 2  # of the measurement: raised when the same images would give other numbers
FACTS = ("network", "dims", "resize", "dtype", "weights_sha256", "version", "resolution")  # alike on both sides


def refuse_unlike(stats: dict, facts: dict, path: Path) -> None:
    """Raises SystemExit when `stats` of `path` were measured in another way than `facts` say."""
    for fact in FACTS:
        if fact in stats and fact in facts and stats[fact] != facts[fact]:
            raise SystemExit(
                f"error: {fact} is {stats[fact]} in {path} and {facts[fact]} on the other side: such a distance means "
                "nothing; measure both sides alike"
            )


def save_statistics(stats: dict, path: Path) -> None:
    """An .npz of mu and sigma, as pytorch-fid reads it, with the facts beside them."""
    with atomic_write(path) as file:
        np.savez(file, **stats)


def load_statistics(path: Path) -> dict:
    """mu, sigma, and whatever facts an .npz made here, by pytorch-fid or by TTUR has. Raises SystemExit otherwise."""
    if not path.is_file():
        raise SystemExit(f"error: {path} does not exist; give a folder of images or an .npz of statistics")
    try:
        with np.load(path, allow_pickle=False) as content:
            stats = {
                name: content[name] for name in content if name in (*FACTS, "mu", "sigma", "features", "n", "split")
            }
        stats = {name: value.item() if value.ndim == 0 else value for name, value in stats.items()}
        mu, sigma = stats["mu"].astype(np.float64), stats["sigma"].astype(np.float64)
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError("mu and sigma do not fit each other")
        n = stats.get("n", 2)
        if not isinstance(n, int) or "features" in stats and stats["features"].shape != (n, len(mu)):
            raise ValueError("n, mu and the features do not fit each other")
    except Exception as error:  # zipfile, zlib and numpy raise some ten kinds, by the byte at which a file is damaged
        raise SystemExit(
            f"error: {path} holds no statistics mu and sigma ({' '.join(str(error).split())}); give another file"
        ) from None
    if "features" in stats:
        stats["features"] = torch.from_numpy(stats["features"])
    return {"dims": len(mu)} | stats | {"mu": mu, "sigma": sigma}


def read_cache(path: Path) -> dict | None:
    try:
        return load_statistics(path) if path.is_file() else None
    except SystemExit as problem:
        print(f"warning: measured again, since {str(problem).removeprefix('error: ')}", file=sys.stderr)
        return None


def choose(total: int, num: int | None) -> list[int]:
    """`num` of `total` indices, in rising order and always the same; all of them where num is None."""
    if num is None or num == total:
        return list(range(total))
    return sorted(np.random.default_rng(0).choice(total, num, replace=False).tolist())


def fingerprint(paths: Sequence[Path], root: str | Path) -> str:
    """SHA-256 (hex) over names below `root`, sizes and modification times: changes when the data does."""
    digest = hashlib.sha256()
    for path in paths:
        info = path.stat()
        digest.update(f"{path.relative_to(root).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
    return digest.hexdigest()
