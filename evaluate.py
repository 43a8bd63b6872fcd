"""Two sets of images -> Fréchet Inception Distance (FID): how far generated faces are from real ones.

    python evaluate.py                                         # your training, or pretrained/, against data/64/test
    python evaluate.py --params runs/128/generator.params --repeats 5 --neighbours neighbours.png
    python evaluate.py --images faces --real data/64/test      # two folders, or .npz statistics
    python evaluate.py --inception tf2015                      # the network that papers report with
    torchrun --nproc-per-node 4 -- evaluate.py --num 10000     # four GPUs share the images

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) over the means and covariances of Inception features (Heusel et
al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017). Lower is better.
It depends on the number of images, the network and the resize: quote them with it. From the same features: KID,
precision and recall, and the FID of real train images, the floor that a perfect generator would reach.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from tqdm import tqdm

from dataloader import DataGenerater, find_images
from generator import TRAINED, default_params, load_generator, sample
from network import Generator
from support.cli import Formatter, natural
from support.devices import DTYPES
from support.distributed import gather, join_ranks, my_share, rank_and_world_size
from support.files import atomic_write
from support.images import image_grid, save_image
from support.inception import DEFAULT_RESIZE, LAST_LAYER, RESIZES, URLS, find_weights, load_inception
from support.metrics import Moments, fid_at_infinity, frechet_distance, kernel_distance, nearest, precision_and_recall
from support.statistics import (
    FACTS,
    VERSION,
    choose,
    fingerprint,
    load_statistics,
    read_cache,
    refuse_unlike,
    save_statistics,
)

# ---------------------------------------------------------------------------------------------- one side


def measure(batches: Iterable[torch.Tensor], net: torch.nn.Module, total: int, label: str) -> dict:
    """n, mu, sigma and features (n,D) of image batches, uint8 (N,3,S,S), of which each process gives its share."""
    moments, features, device = Moments(), [], next(net.parameters()).device
    mine, hidden = len(my_share(range(total))), rank_and_world_size()[0] > 0
    with tqdm(total=mine, desc=label, unit="img", disable=hidden or None) as bar:
        try:
            for batch in batches:
                features.append(net(batch.to(device)).cpu())
                moments.add(features[-1])
                bar.update(len(batch))
        except torch.OutOfMemoryError:
            raise SystemExit("error: the device is out of memory; lower --batch-size") from None
    shares = gather((moments, features))
    moments, features = Moments(), []
    for theirs, chunks in shares:
        moments, features = moments.merge(theirs), features + chunks
    mu, sigma = moments.mean_and_covariance()
    return {"n": moments.n, "mu": mu, "sigma": sigma, "features": torch.cat(features)}


def read_batches(dataset: DataGenerater, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
    """Images uint8 (N,3,S,S). Threads decode one batch, outside the interpreter's lock, while another is measured."""
    with ThreadPoolExecutor() as pool:
        ready = None
        for start in range(0, len(indices), batch_size):
            coming = pool.map(dataset.__getitem__, indices[start : start + batch_size])
            if ready:
                yield torch.stack(list(ready))
            ready = coming
        if ready:
            yield torch.stack(list(ready))


def side_of_folder(folder: Path, net, facts: dict, args: argparse.Namespace, num: int | None = None) -> dict:
    """Statistics of the images in `folder`, or of `num` of them: computed once, and kept while nothing changes."""
    dataset = DataGenerater(folder, image_size=None)
    if num and num > len(dataset):
        raise SystemExit(f"error: --num is {num:,}, but {folder} holds {len(dataset):,} images; lower it")
    refuse_unlike({"resolution": dataset.image_size}, facts, folder)
    indices = choose(len(dataset), num)
    facts = facts | {"split": folder.name}
    key = json.dumps([fingerprint([dataset.paths[i] for i in indices], folder), facts], sort_keys=True)
    cache = args.dataroot / ".statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    first = rank_and_world_size()[0] == 0
    kept = gather(read_cache(cache) if first else None)[0]
    if kept:
        return kept
    stats = facts | measure(read_batches(dataset, my_share(indices), args.batch_size), net, len(indices), str(folder))
    if first:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            save_statistics(stats, cache)
        except (OSError, SystemExit) as problem:
            print(f"warning: the statistics are not kept for next time ({problem})", file=sys.stderr)
    return stats


def side_of_path(path: Path, net, facts: dict, args: argparse.Namespace, num: int | None = None) -> dict:
    if path.suffix != ".npz":
        return side_of_folder(path, net, facts, args, num)
    stats = load_statistics(path)
    refuse_unlike(stats, facts, path)
    if "network" not in stats and rank_and_world_size()[0] == 0:
        print(f"note: {path} does not say how it was measured: make sure that it was as below", file=sys.stderr)
    return stats


def resolution_of(path: Path) -> int | None:
    return load_statistics(path).get("resolution") if path.suffix == ".npz" else DataGenerater(path, None).image_size


def train_folder(real: Path) -> Path | None:
    """The train split that belongs to the folder `real`, where there is one."""
    train = real.with_name("train")
    return train if train.is_dir() and real.is_dir() and real.name != "train" else None


def side_of_generator(netG: Generator, seeds: range, net, facts: dict, args: argparse.Namespace) -> dict:
    """Statistics of the faces of `seeds`, which are never written to the disk."""
    faces = sample(netG, my_share(seeds), args.batch_size)
    return facts | measure(faces, net, len(seeds), f"seeds {seeds[0]}-{seeds[-1]}")


def make_scorer(flags: list[str], image_size: int, device: torch.device) -> Callable[[Generator], float]:
    """For use in a training: a function that gives a generator's FID against the test split.

    `flags` are those of this script; of them --num is how many faces, and as many real images, are compared: 1,000
    where it is left out. Raises SystemExit as main() does, before anything is trained.
    """
    args = parse_args(flags)
    folder = args.real or args.dataroot / str(image_size) / "test"
    num = min(args.num or 1000, len(find_images(folder)))
    net, facts = load_net(args, device, image_size)
    real = side_of_folder(folder, net, facts, args, num)

    def score(netG: Generator) -> float:
        fake = side_of_generator(netG, range(args.seed, args.seed + num), net, facts, args)
        return frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])

    return score


def load_net(args: argparse.Namespace, device: torch.device, image_size: int | None) -> tuple[torch.nn.Module, dict]:
    """Inception and the facts that tell its numbers from others; the first process downloads, the others wait."""
    first = rank_and_world_size()[0] == 0
    weights = args.weights or gather(find_weights(args.inception) if first else None)[0]
    net, facts = load_inception(args.inception, args.dims, weights, device, args.resize, args.precision)
    return net, facts | {"version": VERSION} | ({"resolution": image_size} if image_size else {})


# ---------------------------------------------------------------------------------------------- both sides


def compare(real: dict, fakes: list[dict], infinity: bool) -> dict:
    """What the features say about the real side and the fake one; FID is the mean over `fakes`, draws of it."""
    fids = [frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"]) for fake in fakes]
    result = {"fid": float(np.mean(fids)), "n_real": real.get("n"), "n_fake": fakes[0].get("n")}
    if len(fids) > 1:
        half = scipy.stats.t.ppf(0.975, len(fids) - 1) * np.std(fids, ddof=1) / len(fids) ** 0.5
        result |= {"fids": fids, "n_repeats": len(fids), "fid_95": [result["fid"] - half, result["fid"] + half]}
    if infinity:
        result["fid_infinity"] = fid_at_infinity(fakes[0]["features"], real["mu"], real["sigma"])
    if "features" in real and "features" in fakes[0]:
        result["kid"], result["kid_std"] = kernel_distance(fakes[0]["features"], real["features"])
        result["precision"], result["recall"] = precision_and_recall(fakes[0]["features"], real["features"])
    return result


def measure_floor(real: dict, train: dict, n: int) -> dict:
    """The FID of `n` train images, or of all there are, against the real side: a perfect generator would get it."""
    some = train["features"][choose(train["n"], min(n, train["n"]))]
    fid = frechet_distance(real["mu"], real["sigma"], *Moments().add(some).mean_and_covariance())
    return {"floor": fid, "n_floor": len(some)}


def draw_neighbours(fakes: torch.Tensor, features: torch.Tensor, train: dict, folder: Path, path: Path) -> None:
    """A picture: in each row a fake and the 7 train images that are nearest to it in feature space."""
    dataset, rows = DataGenerater(folder, image_size=None), []
    for fake, indices in zip(fakes, nearest(features[: len(fakes)], train["features"], 7)):
        rows.append(torch.cat([fake[None], dataset.__getitems__(indices.tolist())]))
    save_image(image_grid(torch.cat(rows), columns=len(rows[0])), path)


def first_images(folder: Path, num: int | None) -> torch.Tensor:
    dataset = DataGenerater(folder, image_size=None)
    return dataset.__getitems__(choose(len(dataset), num)[:8])


def warn(n_real: int | None, n_fake: int | None) -> None:
    for side, n in (("real", n_real), ("generated", n_fake)):
        if n and n < 2048:
            print(
                f"warning: {n:,} {side} images are fewer than 2,048: the covariance is rank-deficient at 2,048 dims, "
                "and the FID biased upwards; compare it only with one of equal numbers",
                file=sys.stderr,
            )
    if n_real and n_fake and max(n_real, n_fake) > 1.25 * min(n_real, n_fake):
        print(
            f"warning: {n_real:,} real and {n_fake:,} generated images: their biases differ; set --num", file=sys.stderr
        )


def report(result: dict) -> str:
    """The result in words, n, network and resize included; its last line is the one to look for."""
    name = "FID" if result["dims"] == 2048 else f"FID-{result['dims']}"
    lines = [
        "{real}: {n_real} real images; {fake}: {n_fake} generated ones; both {resolution}x{resolution}",
        "{network}, {dims} features, resize {resize}, {dtype}, weights of SHA-256 {weights_sha256:.16}...",
    ]
    if "fid_95" in result:
        lines.append(
            name + " {fid:.4f} is the mean of {n_repeats} draws; its 95 % interval {fid_95[0]:.4f} to {fid_95[1]:.4f}"
        )
    if "fid_infinity" in result:
        lines.append(name + " {fid_infinity:.4f} extrapolated to infinitely many generated images")
    if "floor" in result:
        lines.append(
            name + " {floor:.4f} of {n_floor} real train images: the floor, which a perfect generator would reach"
        )
    if "kid" in result:
        lines.append("KID {kid:.6f}, standard deviation {kid_std:.6f} over subsets")
        lines.append("improved precision {precision:.4f}, recall {recall:.4f}, in Inception features")
    return "\n".join([*lines, "Fréchet Inception Distance (FID): {fid:.4f}"]).format(**result)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    defaults = ", ".join(f"{resize} for {network}" for network, resize in DEFAULT_RESIZE.items())
    fake = parser.add_mutually_exclusive_group()
    fake.add_argument("--params", type=Path, help=f"generator (default: {TRAINED}, else the pretrained one)")
    fake.add_argument("--images", type=Path, help="folder of images or .npz statistics to evaluate instead")
    add("--real", type=Path, help="folder or .npz statistics (default: <dataroot>/<resolution>/test)")
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--num", type=natural(2), help="generated images (default: as many as real ones, or all of --images)")
    add("--seed", type=natural(0), default=0, help="of the first face; the others follow")
    add("--repeats", type=natural(1), default=1, help="draws of --num faces, for an interval of the FID")
    add("--inception", choices=URLS, default="torchvision", help="the report's network, or the one of most papers")
    add("--weights", type=Path, help="its state dict (default: torch's hub cache, or a download)")
    add("--dims", type=int, choices=LAST_LAYER, default=2048, help="number of features; less is not what papers quote")
    add("--resize", choices=RESIZES, help=f"as pytorch-fid, TensorFlow 1 or clean-fid do (default: {defaults})")
    add("--precision", choices=DTYPES, default="fp32", help="bf16 is faster where the hardware is made for it")
    add("--floor", action=argparse.BooleanOptionalAction, default=True, help="also the FID of real train images")
    add("--infinity", action="store_true", help="also the FID extrapolated to infinitely many faces")
    add("--neighbours", type=Path, metavar="PNG", help="draw faces beside the train images nearest to them")
    add("--batch-size", type=natural(1), default=16, help="images at a time; 64 and more suit a GPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--save-stats", type=Path, metavar="NPZ", help="also write the statistics of the real side")
    add("--json", type=Path, metavar="FILE", help="also write the result with all that it depends on")
    args = parser.parse_args(argv)
    if args.neighbours and args.neighbours.suffix != ".png":
        parser.error("--neighbours draws a .png")
    if args.images and args.repeats > 1:
        parser.error("--repeats draws faces: it goes with --params, not with --images")
    if args.images and args.images.suffix == ".npz" and (args.infinity or args.neighbours or args.num):
        parser.error("--infinity, --neighbours and --num need images, which an .npz does not hold")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for path in filter(None, (args.save_stats, args.json, args.neighbours)):
        if path.exists():
            raise SystemExit(f"error: {path} exists; remove it or choose another name")
        if not path.parent.is_dir():
            raise SystemExit(f"error: there is no folder {path.parent} for {path.name}; make it or choose another")
    device = join_ranks(args.device)
    first = rank_and_world_size()[0] == 0
    netG = None
    if not args.images:
        args.params = args.params or default_params()
        netG = load_generator(args.params, device)
    size = netG.image_size if netG else resolution_of(args.images)
    real_path = args.real or args.dataroot / str(size) / "test"
    train_path = train_folder(real_path)
    if args.neighbours and not train_path:
        raise SystemExit(f"error: --neighbours needs a folder train beside {real_path}; give another --real")
    if real_path.suffix != ".npz":
        find_images(real_path)  # whoever has none yet should not wait for a download to be told so
    net, facts = None, {}
    if any(path is None or path.suffix != ".npz" for path in (real_path, args.images)):
        net, facts = load_net(args, device, size)

    real = side_of_path(real_path, net, facts, args)
    num = args.num or real.get("n", 10_000)
    if args.images:
        fakes = [side_of_path(args.images, net, facts, args, args.num)]
        refuse_unlike(fakes[0], real, args.images)
    else:
        starts = range(args.seed, args.seed + num * args.repeats, num)
        fakes = [side_of_generator(netG, range(start, start + num), net, facts, args) for start in starts]
    n = fakes[0].get("n", num)
    if train_path and (args.floor or args.neighbours):
        n_train = None if args.neighbours else min(n, len(find_images(train_path)))
        train = side_of_folder(train_path, net, facts, args, n_train)
    if not first:
        return

    result = {fact: fakes[0].get(fact, real.get(fact, "unknown")) for fact in FACTS}
    result |= {"real": str(real_path), "fake": str(args.images or args.params)} | compare(real, fakes, args.infinity)
    if train_path and args.floor:
        result |= measure_floor(real, train, n)
    warn(result["n_real"], result["n_fake"])
    if args.save_stats:
        save_statistics({name: value for name, value in real.items() if name != "features"}, args.save_stats)
    if args.neighbours:
        shown = next(sample(netG, range(args.seed, args.seed + 8))) if netG else first_images(args.images, args.num)
        draw_neighbours(shown, fakes[0]["features"], train, train_path, args.neighbours)
    if args.json:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        with atomic_write(args.json) as file:
            file.write(json.dumps(result | {"versions": versions, "flags": flags}, indent=2).encode())
    print(report(result))


if __name__ == "__main__":
    main()
