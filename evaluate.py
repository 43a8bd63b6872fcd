"""Two sets of images -> Fréchet Inception Distance (FID): how far generated faces are from real ones.

    python evaluate.py                                         # your generator, or a pretrained one, and data/64/test
    python evaluate.py --params runs/128/generator.params --repeats 5 --neighbours neighbours.png
    python evaluate.py --images faces --real data/64/test      # two folders, or .npz of images or statistics
    python evaluate.py --inception tf2015                      # the network that most papers use
    torchrun --nproc-per-node 4 -- evaluate.py --num 10000     # four GPUs share the images

FID = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of the means and covariances of Inception features (Heusel et al.,
"GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017). Lower is better. It depends
on the number of images, the network and the resize, so quote them with it. The same features give KID, precision and
recall, and the FID of real training images, which a perfect generator would reach.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.cli import HelpFormatter, existing_path, int_at_least, npz_path, prepare, run, user_path
from support.files import OVERWRITE_HELP, PARAMS_REMEDY, TRAINED, UserError, check_outputs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    params = existing_path(PARAMS_REMEDY)
    images = existing_path("give a folder of images, or an .npz of images or statistics")
    weights = existing_path("give a state dict of Inception-v3")
    group = parser.add_argument_group("images")
    fake = group.add_mutually_exclusive_group()
    fake.add_argument("--params", type=params, help=f"generator (default: {TRAINED}, else the pretrained one)")
    fake.add_argument("--images", type=images, help="images to evaluate, a folder or an .npz of images or statistics")
    add = group.add_argument
    add("--real", type=images, help="real images, in the same forms (default: <dataroot>/<size>/<split>)")
    add("--dataroot", type=user_path, default=Path("data"), help="folder that preprocess.py made")
    add("--split", choices=("test", "valid"), default="test", help="real images: all of test, or --num of valid")
    add("--num", type=int_at_least(2), help="generated images (default: as many as real ones, or all of --images)")
    add("--seed", type=int_at_least(0), default=0, help="seed of the first face; the next faces have the next seeds")
    add = parser.add_argument_group("measurement").add_argument
    add("--inception", choices=("torchvision", "tf2015"), default="torchvision", help="network: the report's, or that "
        "of most papers")
    add("--weights", type=weights, help="state dict of the network (default: torch's hub cache, or a download)")
    add("--dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="number of features; papers quote 2048")
    add("--resize", choices=("bilinear", "tf", "clean"), help="as pytorch-fid, TensorFlow 1 or clean-fid do (default: "
        "bilinear for torchvision, tf for tf2015)")
    add("--repeats", type=int_at_least(1), default=1, help="draws of --num faces, for a 95 %% interval of FID")
    add("--floor", action=argparse.BooleanOptionalAction, default=True, help="also measure real training images")
    add("--infinity", action="store_true", help="also extrapolate FID to infinitely many faces")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=user_path, metavar="FILE", help="write the result with everything that it depends on")
    add("--save-stats", type=npz_path, metavar="NPZ", help="write the statistics of the real images")
    add("--neighbours", type=user_path, metavar="PNG", help="draw faces next to the most similar training images")
    add("--overwrite", action="store_true", help=OVERWRITE_HELP)
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is faster on hardware with bf16 support")
    add("--batch-size", type=int_at_least(1), help="images to measure at a time (default: what suits the device)")
    args = parser.parse_args(argv)
    if args.neighbours and args.neighbours.suffix.lower() != ".png":
        parser.error("--neighbours draws a .png")
    if args.images and args.repeats > 1:
        parser.error("--repeats draws faces: it goes with --params, not with --images")
    return args


if __name__ == "__main__":  # answers --help and refuses mistyped flags before the imports below, which take seconds
    prepare(parse_args)

import torch

from dataloader import DataGenerater, open_images, read_batches
from generator import choose_params, load_generator, sample
from network import Generator
from support import feature_stats
from support.comparison import compare, compare_training_images, draw_neighbours, report, save_result, warn
from support.devices import full_float32, with_float64
from support.distributed import is_first_rank, joined_ranks, my_share, once_per_machine
from support.feature_stats import NpzImages, choose, measure_features, refuse_mismatch
from support.inception import find_weights, load_inception, pick_batch_size
from support.metrics import frechet_distance
from support.sources import walk_images

Images = DataGenerater | NpzImages


@dataclass
class Extractor:
    """Turns images into statistics of Inception features: n, mu (D,), sigma (D,D), features (n,D) and metadata.

    `metadata` identifies the measurement, see support/feature_stats.py.
    """

    net: torch.nn.Module
    metadata: dict
    batch_size: int
    cache: Path  # folder that keeps the statistics of real images

    def of_generator(self, netG: Generator, seeds: range) -> dict:
        """Statistics of the faces of `seeds`, without writing them to disk."""
        faces = sample(netG, my_share(seeds), self.batch_size)
        return self.metadata | measure_features(self.net, faces, len(seeds), f"seeds {seeds[0]}-{seeds[-1]}")

    def of_images(self, dataset: Images, num: int) -> dict:
        """Statistics of `num` images of `dataset`."""
        indices = choose(len(dataset), num)
        batches = read_batches(dataset, my_share(indices), self.batch_size)
        stats = measure_features(self.net, batches, num, str(dataset.root))
        return self.metadata | {"split": dataset.root.name} | stats

    def of_real_images(self, dataset: Images, num: int) -> dict:
        """The same, from the cache, which keeps them until the content of the files changes."""
        paths = [dataset.paths[index] for index in choose(len(dataset), num)]
        metadata = self.metadata | {"split": dataset.root.name}
        return feature_stats.cached(self.cache, paths, metadata, partial(self.of_images, dataset, num))


def load_extractor(args: argparse.Namespace, device: torch.device, image_size: int | None) -> Extractor:
    """The Extractor that the flags describe. One process on each machine downloads the weights."""
    weights = args.weights or once_per_machine(lambda: find_weights(args.inception))
    net, metadata = load_inception(args.inception, args.dims, weights, device, args.resize, args.precision)
    metadata["version"] = feature_stats.VERSION
    if image_size:
        metadata["resolution"] = image_size
    return Extractor(net, metadata, args.batch_size or pick_batch_size(device), args.dataroot / ".statistics")


def make_scorer(flags: list[str], image_size: int, device: torch.device) -> Callable[[Generator], float]:
    """For a training: a function that measures a generator's FID against the valid split.

    `flags` are those of this script. --num faces and as many real images are compared, by default 1,000 and their 768
    features: of more features, the covariance would be rank-deficient. The test split takes the place of a valid split
    that has fewer images. Raises UserError as main() does, before anything is trained.
    """
    args = parse_args(["--dims", "768", "--split", "valid", *flags])
    num = args.num or 1000
    folder = args.real or choose_split(args.dataroot / str(image_size), args.split, num)
    dataset = open_images(folder)
    refuse_mismatch({"resolution": dataset.image_size}, {"resolution": image_size}, folder)
    num = min(num, len(dataset))
    if is_first_rank():
        print(f"--eval-every measures the FID of {num:,} faces and {num:,} images of {folder}, {args.dims} features")
        warn(num, num, args.dims)
    extractor = load_extractor(args, device, image_size)
    real = extractor.of_real_images(dataset, num)

    def score(netG: Generator) -> float:
        fake = extractor.of_generator(netG, range(args.seed, args.seed + num))
        return frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"])

    return score


def choose_split(crops: Path, split: str, num: int) -> Path:
    """The folder `split` of `crops`, or test, with a note, where `split` has fewer than `num` images."""
    folder = crops / split
    n = sum(1 for _ in walk_images(folder)) if folder.is_dir() else 0
    if split == "test" or n >= num:
        return folder
    if is_first_rank():
        print(f"note: {folder} holds {n:,} images, fewer than {num:,}: the FID is measured on {crops / 'test'}, so do "
              "not choose by it what you report on it", file=sys.stderr)
    return crops / "test"


@dataclass(eq=False)
class Side:
    """One side of the comparison: a generator, images, or statistics (a dictionary) that were measured before."""

    source: Generator | Images | dict
    path: Path
    n: int | None  # images to draw or to choose; None for statistics that do not say how many they are of

    def resolution(self) -> dict[str, int]:
        """{"resolution": side of the images in pixels}, or nothing where statistics do not say it."""
        known = self.source if isinstance(self.source, dict) else {"resolution": self.source.image_size}
        return {name: known[name] for name in known if name == "resolution"}

    def first_images(self, seed: int) -> torch.Tensor:
        """The first 8 of the images that are measured, uint8 (8,3,S,S)."""
        if isinstance(self.source, Generator):
            return next(sample(self.source, range(seed, seed + 8)))
        return self.source.__getitems__(choose(len(self.source), self.n)[:8])


def open_side(path: Path, num: int | None) -> Side:
    """`num` images of a folder or an .npz, or all, or the statistics in an .npz. Raises UserError."""
    if feature_stats.holds_statistics(path):
        stats = feature_stats.load_statistics(path)
        return Side(stats, path, stats.get("n"))
    dataset = open_images(path)
    if num and num > len(dataset):
        raise UserError(f"--num is {num:,}, but {path} holds {len(dataset):,} images; lower it")
    return Side(dataset, path, num or len(dataset))


def find_inputs(args: argparse.Namespace, device: torch.device) -> tuple[Side, Side, DataGenerater | None]:
    """The generated and the real side, and the training images next to the real ones, if they are to be measured.

    Raises UserError for everything that would fail after the measurement.
    """
    outputs = {"--save-stats": args.save_stats, "--json": args.json, "--neighbours": args.neighbours}
    check_outputs(outputs, args.overwrite, inputs=(args.params, args.images, args.real, args.weights))
    if args.images:
        fake = open_side(args.images, args.num)
    else:
        args.params = choose_params(args.params)
        fake = Side(load_generator(args.params, device), args.params, args.num)
    if isinstance(fake.source, dict) and (args.infinity or args.neighbours or args.num):
        raise UserError(f"{fake.path} holds statistics, but --infinity, --neighbours and --num need images")
    resolution = fake.resolution()
    if not (args.real or resolution):
        raise UserError(f"{fake.path} does not say the size of its images; give the real ones to --real")
    real_path = args.real or args.dataroot / str(resolution["resolution"]) / args.split
    real = open_side(real_path, args.num if args.split == "valid" else None)
    refuse_mismatch(real.resolution(), resolution, real_path)
    if isinstance(fake.source, Generator):
        fake.n = fake.n or real.n or 10_000
    if args.infinity and fake.n < 2 * args.dims:
        raise UserError(f"--infinity needs {2 * args.dims:,} generated images at --dims {args.dims}, not {fake.n:,}")
    folder = real_path.with_name("train")
    train = None
    if (args.floor or args.neighbours) and folder.is_dir() and real_path.is_dir() and real_path != folder:
        train = open_images(folder)
        refuse_mismatch({"resolution": train.image_size}, resolution, folder)
    if args.neighbours and train is None:
        raise UserError(f"--neighbours needs a folder train next to {real_path}; give another --real")
    return fake, real, train


def measure_sides(
    fake: Side, real: Side, train: DataGenerater | None, args: argparse.Namespace, device: torch.device
) -> tuple[list[dict], dict, dict | None]:
    """Statistics of each draw of generated images, of the real images, and of training images, if any."""
    known = [side for side in (fake, real) if isinstance(side.source, dict)]
    feature_stats.note_unknown((side.source, side.path) for side in known)
    if len(known) == 2:
        refuse_mismatch(fake.source, real.source, fake.path)
        return [fake.source], real.source, None
    extractor = load_extractor(args, device, fake.resolution().get("resolution"))
    for side in known:
        refuse_mismatch(side.source, extractor.metadata, side.path)
    real_stats = real.source if real in known else extractor.of_real_images(real.source, real.n)
    if isinstance(fake.source, Generator):
        starts = range(args.seed, args.seed + fake.n * args.repeats, fake.n)
        fake_stats = [extractor.of_generator(fake.source, range(start, start + fake.n)) for start in starts]
    else:
        fake_stats = [fake.source if fake in known else extractor.of_images(fake.source, fake.n)]
    train_stats = None
    if train is not None:
        n = len(train) if args.neighbours else min(fake.n or 10_000, len(train))
        train_stats = extractor.of_real_images(train, n)
    return fake_stats, real_stats, train_stats


@full_float32()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with joined_ranks(args.device) as device:
        fake, real, train = find_inputs(args, device)
        fakes, real_stats, train_stats = measure_sides(fake, real, train, args, device)
        if not is_first_rank():
            return
    result = {name: fakes[0].get(name, real_stats.get(name)) for name in feature_stats.IDENTITY}
    result |= {"real": str(real.path), "fake": str(fake.path)}
    result |= compare(real_stats, fakes, args.infinity, with_float64(device))
    if train and args.floor:
        result |= compare_training_images(real_stats, train_stats, result["n_fake"] or train_stats["n"])
    warn(result["n_real"], result["n_fake"], result["dims"])
    if args.save_stats:
        stats = {name: value for name, value in real_stats.items() if name != "features"}
        feature_stats.save_statistics(stats, args.save_stats)
    if args.neighbours:
        shown = fake.first_images(args.seed)
        draw_neighbours(shown, fakes[0]["features"], train_stats["features"], train, args.neighbours)
    if args.json:
        save_result(result, args)
    print(report(result))


if __name__ == "__main__":
    run(main)
