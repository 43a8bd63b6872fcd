"""Two sets of images -> Fréchet Inception Distance (FID): how far generated faces are from real ones.

    python evaluate.py                                         # runs/64/generator.params against data/64/test
    python evaluate.py --params runs/128/generator.params
    python evaluate.py --images faces --real data/64/test      # two folders
    python evaluate.py --inception tf2015                      # the network that papers report with

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) over the means and covariances of Inception features (Heusel et
al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017). Lower is better.
It depends on the number of images, the network and the resize: quote them with it.
"""

import argparse
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from dataloader import DataGenerater, fingerprint
from generator import load_generator, sample
from inception import LAST_LAYER, URLS, load_inception
from network import pick_device
from preprocess import Formatter, atomic_write, natural

FACTS = ("network", "dims", "resize", "weights_sha256", "resolution")  # have to be equal on both sides


class Moments:
    """Count, mean and covariance, float64, of features (N,D) that come in chunks of any size."""

    def __init__(self):
        self.n, self.shift = 0, None

    def add(self, features: torch.Tensor) -> None:
        # On the CPU: MPS has no float64. Less the first row: sums of squares of nearly equal numbers cancel badly.
        features = features.cpu().double()
        if self.shift is None:
            self.shift = features[0].clone()
            self.sum = torch.zeros_like(self.shift)
            self.outer = torch.zeros(len(self.shift), len(self.shift), dtype=torch.float64)
        features = features - self.shift
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and (D,D), unbiased. Raises SystemExit for fewer than two images."""
        if self.n < 2:
            raise SystemExit(f"error: {self.n} images have no covariance; give 2 or more, and 2,048 for a FID to quote")
        covariance = (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)
        return (self.shift + self.sum / self.n).numpy(), covariance.numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Fréchet distance between two normal distributions, never negative (Dowson and Landau, 1982).

    tr (S1 S2)^(1/2) is taken as the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric:
    nothing can become complex, also where a covariance is singular. Raises SystemExit for NaN or infinite input.
    """
    for array in (mu1, sigma1, mu2, sigma2):
        if not np.isfinite(array).all():
            raise SystemExit("error: the features hold NaN or infinite values; check the images and --weights")
    values, vectors = scipy.linalg.eigh(sigma1)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = root @ sigma2 @ root
    trace = np.sqrt(scipy.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def measure(batches: Iterable[torch.Tensor], features: torch.nn.Module, total: int, label: str) -> tuple:
    """(n, mean, covariance) of the features of image batches, uint8 (N,3,S,S)."""
    moments, device = Moments(), next(features.parameters()).device
    with tqdm(total=total, desc=label, unit="img", disable=None) as bar:
        for batch in batches:
            moments.add(features(batch.to(device)))
            bar.update(len(batch))
    return moments.n, *moments.mean_and_covariance()


def read_batches(dataset: DataGenerater, batch_size: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(dataset), batch_size):
        yield dataset.__getitems__(range(start, min(start + batch_size, len(dataset))))


def folder_statistics(folder: Path, features, facts: dict, args: argparse.Namespace, label: str) -> dict:
    """Statistics of the images in `folder`: computed once, and kept in --dataroot while nothing in it changes."""
    dataset = DataGenerater(folder, image_size=None)
    facts = facts | {"resolution": dataset.image_size}
    key = hashlib.sha256(json.dumps([fingerprint(dataset.paths, folder), facts]).encode()).hexdigest()[:16]
    cache = args.dataroot / ".statistics" / f"{key}.npz"
    if cache.is_file():
        return load_statistics(cache)
    n, mu, sigma = measure(read_batches(dataset, args.batch_size), features, len(dataset), label)
    stats = facts | {"n": n, "mu": mu, "sigma": sigma}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_statistics(stats, cache)
    except (OSError, SystemExit) as problem:
        print(f"warning: the statistics are not kept for next time ({problem})", file=sys.stderr)
    return stats


def save_statistics(stats: dict, path: Path) -> None:
    """An .npz of mu and sigma, as pytorch-fid reads it, with the facts beside them."""
    with atomic_write(path) as file:
        np.savez(file, **stats)


def load_statistics(path: Path) -> dict:
    """mu, sigma, and whatever facts an .npz made here, by pytorch-fid or by TTUR has. Raises SystemExit otherwise."""
    try:
        with np.load(path, allow_pickle=False) as content:
            stats = {name: content[name] if name in ("mu", "sigma") else content[name].item() for name in content}
        dims = len(stats["mu"])
        if stats["mu"].shape != (dims,) or stats["sigma"].shape != (dims, dims):
            raise ValueError("mu and sigma do not fit each other")
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise SystemExit(f"error: {path} holds no statistics mu and sigma ({error}); give another --real") from None
    return {"dims": dims} | stats


def generator_statistics(features, facts: dict, num: int, args: argparse.Namespace, device: torch.device) -> dict:
    """Statistics of the faces of seeds 0 to num-1, which are never written to the disk."""
    netG = load_generator(args.params, device)
    faces = sample(netG, range(num), args.batch_size)
    n, mu, sigma = measure(faces, features, num, f"faces of {args.params}")
    return facts | {"resolution": netG.image_size, "n": n, "mu": mu, "sigma": sigma}


def real_statistics(features, facts: dict, args: argparse.Namespace) -> dict:
    if args.real.suffix == ".npz":
        if not args.real.is_file():
            raise SystemExit(f"error: --real {args.real} does not exist; give a folder of images or an .npz")
        return load_statistics(args.real)
    return folder_statistics(args.real, features, facts, args, f"real images of {args.real}")


def compare(real: dict, fake: dict) -> float:
    """The FID of two statistics. Raises SystemExit when they were measured in different ways."""
    for fact in FACTS:
        if fact in real and fact in fake and real[fact] != fake[fact]:
            raise SystemExit(
                f"error: {fact} is {real[fact]} on the real side and {fake[fact]} on the other: "
                "such a distance means nothing; measure both sides alike"
            )
    for side, stats in (("real", real), ("generated", fake)):
        if stats.get("n", 2048) < 2048:
            print(
                f"warning: {stats['n']:,} {side} images are fewer than 2,048: the covariance is rank-deficient and the "
                "FID biased upwards; compare it only with one of equal numbers",
                file=sys.stderr,
            )
    return frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    fake = parser.add_mutually_exclusive_group()
    fake.add_argument("--params", type=Path, default=Path("runs/64/generator.params"), help="generator to evaluate")
    fake.add_argument("--images", type=Path, help="folder of images to evaluate instead")
    add("--real", type=Path, help="folder or .npz statistics (default: <dataroot>/<resolution>/test)")
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--num", type=natural(2), help="faces to generate (default: as many as there are real ones)")
    add("--inception", choices=URLS, default="torchvision", help="the report's network, or the one of most papers")
    add("--weights", type=Path, help="its state dict (default: torch's hub cache, or a download)")
    add("--dims", type=int, choices=LAST_LAYER, default=2048, help="number of features; less is not what papers quote")
    add("--batch-size", type=natural(1), default=32, help="images at a time")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--save-stats", type=Path, metavar="NPZ", help="also write the statistics of the real side")
    add("--json", type=Path, metavar="FILE", help="also write the result with all that it depends on")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in (args.save_stats, args.json):
        if path and path.exists():
            raise SystemExit(f"error: {path} exists; remove it or choose another name")
    device = pick_device(args.device)
    if args.real is None:
        first = DataGenerater(args.images, None) if args.images else load_generator(args.params)
        args.real = args.dataroot / str(first.image_size) / "test"
    features, facts = load_inception(args.inception, args.dims, args.weights, device)
    real = real_statistics(features, facts, args)
    if args.images:
        fake = folder_statistics(args.images, features, facts, args, f"images of {args.images}")
    else:
        fake = generator_statistics(features, facts, args.num or real.get("n", 10_000), args, device)
    fid = compare(real, fake)
    if args.save_stats:
        save_statistics(real, args.save_stats)
    result = {"fid": fid, "n_real": real.get("n"), "n_fake": fake["n"]} | {name: fake[name] for name in FACTS}
    result |= {"real": str(args.real), "fake": str(args.images or args.params)}
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(result, indent=2).encode())
    print(", ".join(f"{name} {str(value)[:24]}" for name, value in result.items() if name != "fid"))
    print(f"Fréchet Inception Distance (FID): {fid:.4f}")


if __name__ == "__main__":
    main()
