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
from pathlib import Path

from support.cli import HelpFormatter, int_at_least, npz_path, prepare, run
from support.file_kinds import holds_statistics, require_images_or_statistics, require_pytorch_file
from support.files import OVERWRITE_HELP, PARAMS_REMEDY, TRAINED, UserError, check_outputs, default_params
from support.inception_choices import DEFAULT_RESIZE, LAST_LAYER, RESIZES, URLS, check_weights
from support.sources import find_images, require_images, walk_images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    defaults = ", ".join(f"{resize} for {network}" for network, resize in DEFAULT_RESIZE.items())
    group = parser.add_argument_group("images")
    fake, add = group.add_mutually_exclusive_group(), group.add_argument
    fake.add_argument("--params", type=Path, help=f"generator (default: {TRAINED}, else the pretrained one)")
    fake.add_argument("--images", type=Path, help="images to evaluate, a folder or an .npz of images or statistics")
    add("--real", type=Path, help="real images, in the same forms (default: <dataroot>/<size>/<split>)")
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--split", choices=("test", "valid"), default="test", help="real images: all of test, or --num of valid")
    add("--num", type=int_at_least(2), help="generated images (default: as many as real ones, or all of --images)")
    add("--seed", type=int_at_least(0), default=0, help="seed of the first face; the next faces have the next seeds")
    add = parser.add_argument_group("measurement").add_argument
    add("--inception", choices=URLS, default="torchvision", help="network: the report's, or that of most papers")
    add("--weights", type=Path, help="state dict of the network (default: torch's hub cache, or a download)")
    add("--dims", type=int, choices=LAST_LAYER, default=2048, help="number of features; papers quote 2048")
    add("--resize", choices=RESIZES, help=f"as pytorch-fid, TensorFlow 1 or clean-fid do (default: {defaults})")
    add("--repeats", type=int_at_least(1), default=1, help="draws of --num faces, for a 95 %% interval of FID")
    add("--floor", action=argparse.BooleanOptionalAction, default=True, help="also measure real training images")
    add("--infinity", action="store_true", help="also extrapolate FID to infinitely many faces")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write the result with everything that it depends on")
    add("--save-stats", type=npz_path, metavar="NPZ", help="write the statistics of the real images")
    add("--neighbours", type=Path, metavar="PNG", help="draw faces next to the most similar training images")
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


def check_args(args: argparse.Namespace) -> None:
    """Raise UserError for what main() would refuse, as far as that takes no torch."""
    outputs = {"--save-stats": args.save_stats, "--json": args.json, "--neighbours": args.neighbours}
    check_outputs(outputs, args.overwrite, inputs=(args.params, args.images, args.real, args.weights))
    if not args.images:
        require_pytorch_file(args.params or default_params(), PARAMS_REMEDY)
    elif holds_statistics(args.images) and (args.infinity or args.neighbours or args.num):
        raise UserError(f"{args.images} holds statistics, but --infinity, --neighbours and --num need images")
    for path in filter(None, (args.images, args.real)):
        require_images_or_statistics(path)
    if not args.real and not args.dataroot.is_dir():
        require_images(args.dataroot)
    if args.weights:
        check_weights(args.weights)


if __name__ == "__main__":  # answers --help and refuses bad flags before the imports below, which take seconds
    prepare(parse_args)

import torch

from dataloader import open_images, read_batches
from generator import choose_params, load_generator, sample
from network import Generator
from support import feature_stats
from support.comparison import compare, compare_training_images, draw_neighbours, report, save_result, warn
from support.devices import with_float64
from support.distributed import is_first_rank, joined_ranks, my_share, once_per_machine
from support.inception import find_weights, load_inception, pick_batch_size
from support.metrics import frechet_distance


@dataclass
class Extractor:
    """Turns images into statistics of Inception features: n, mu (D,), sigma (D,D), features (n,D) and metadata.

    `metadata` identifies the measurement, see support/feature_stats.py. `net` is None where all statistics are on disk.
    """

    net: torch.nn.Module | None
    metadata: dict
    batch_size: int
    cache: Path  # folder that keeps the statistics of real images

    def of_generator(self, netG: Generator, seeds: range) -> dict:
        """Statistics of the faces of `seeds`, without writing them to disk."""
        faces = sample(netG, my_share(seeds), self.batch_size)
        return self.metadata | feature_stats.measure(self.net, faces, len(seeds), f"seeds {seeds[0]}-{seeds[-1]}")

    def of_images(self, folder: Path, num: int | None = None) -> dict:
        """Statistics of `num` images in `folder`, or of all. The cache keeps them until the images change."""
        dataset = open_images(folder)
        if num and num > len(dataset):
            raise UserError(f"--num is {num:,}, but {folder} holds {len(dataset):,} images; lower it")
        feature_stats.refuse_mismatch({"resolution": dataset.image_size}, self.metadata, folder)
        indices, split = feature_stats.choose(len(dataset), num), {"split": folder.name}
        paths = [dataset.paths[i] for i in indices]
        path = feature_stats.cache_path(self.cache, paths, dataset.root, self.metadata | split)

        def measure() -> dict:
            batches = read_batches(dataset, my_share(indices), self.batch_size)
            return self.metadata | split | feature_stats.measure(self.net, batches, len(indices), str(folder))

        return feature_stats.cached(path, measure)

    def of_path(self, path: Path, num: int | None = None) -> dict:
        """Statistics of a folder or an .npz file."""
        if holds_statistics(path):
            return feature_stats.load_comparable(path, self.metadata)
        return self.of_images(path, num)


def load_extractor(args: argparse.Namespace, device: torch.device, image_size: int | None) -> Extractor:
    """The Extractor that the flags describe. One process on each machine downloads the weights."""
    weights = args.weights or once_per_machine(lambda: find_weights(args.inception))
    net, metadata = load_inception(args.inception, args.dims, weights, device, args.resize, args.precision)
    metadata |= {"version": feature_stats.VERSION} | ({"resolution": image_size} if image_size else {})
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
    num = min(num, len(open_images(folder)))
    if is_first_rank():
        print(f"--eval-every measures the FID of {num:,} faces and {num:,} images of {folder}, {args.dims} features")
        warn(num, num, args.dims)
    extractor = load_extractor(args, device, image_size)
    real = extractor.of_images(folder, num)

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


@dataclass
class Inputs:
    """What is compared: a generator or a path against real images, with the training images next to them, if any."""

    netG: Generator | None
    fake: Path
    real: Path
    train: Path | None
    resolution: int | None


def find_inputs(args: argparse.Namespace, device: torch.device) -> Inputs:
    """Load the generator and find the images. Raises UserError for anything that would fail after the measurement."""
    check_args(args)
    args.params = None if args.images else choose_params(args.params)
    netG = None if args.images else load_generator(args.params, device)
    if netG:
        resolution = netG.image_size
    elif holds_statistics(args.images):
        resolution = feature_stats.load_statistics(args.images).get("resolution")
    else:
        resolution = open_images(args.images).image_size
    real = args.real or args.dataroot / str(resolution) / args.split
    train = real.with_name("train")
    train = train if train.is_dir() and real.is_dir() and real.name != "train" else None
    if args.neighbours and not train:
        raise UserError(f"--neighbours needs a folder train next to {real}; give another --real")
    if not holds_statistics(real):
        open_images(real)  # before anything is downloaded
    return Inputs(netG, args.images or args.params, real, train, resolution)


def measure(inputs: Inputs, args: argparse.Namespace, device: torch.device) -> tuple[dict, list[dict], dict | None]:
    """Statistics of the real images, of each draw of generated images, and of training images, if they are needed."""
    if not inputs.netG and holds_statistics(inputs.real) and holds_statistics(inputs.fake):
        extractor = Extractor(None, {}, 0, args.dataroot)
    else:
        extractor = load_extractor(args, device, inputs.resolution)
    real, train = extractor.of_path(inputs.real, args.num if args.split == "valid" else None), None
    num = args.num or (real.get("n", 10_000) if inputs.netG else None)
    if args.infinity and (n := num or len(open_images(args.images))) < 2 * args.dims:
        raise UserError(f"--infinity needs {2 * args.dims:,} generated images at --dims {args.dims}, not {n:,}")
    if inputs.netG:
        starts = range(args.seed, args.seed + num * args.repeats, num)
        fakes = [extractor.of_generator(inputs.netG, range(start, start + num)) for start in starts]
    else:
        fakes = [extractor.of_path(args.images, num)]
        feature_stats.refuse_mismatch(fakes[0], real, args.images)
    if inputs.train and (args.floor or args.neighbours):
        n_train = None if args.neighbours else min(fakes[0].get("n", 10_000), len(find_images(inputs.train)))
        train = extractor.of_images(inputs.train, n_train)
    return real, fakes, train


def write_outputs(result: dict, inputs: Inputs, args: argparse.Namespace, real: dict, fake: dict, train: dict) -> None:
    """The files that --save-stats, --neighbours and --json ask for."""
    if args.save_stats:
        stats = {name: value for name, value in real.items() if name != "features"}
        feature_stats.save_statistics(stats, args.save_stats)
    if args.neighbours:
        if inputs.netG:
            shown = next(sample(inputs.netG, range(args.seed, args.seed + 8)))
        else:
            dataset = open_images(args.images)
            shown = dataset.__getitems__(feature_stats.choose(len(dataset), args.num)[:8])
        draw_neighbours(shown, fake["features"], train["features"], open_images(inputs.train), args.neighbours)
    if args.json:
        save_result(result, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with joined_ranks(args.device) as device:
        inputs = find_inputs(args, device)
        real, fakes, train = measure(inputs, args, device)
        if not is_first_rank():
            return
    result = {name: fakes[0].get(name, real.get(name)) for name in feature_stats.IDENTITY}
    result |= {"real": str(inputs.real), "fake": str(inputs.fake)}
    result |= compare(real, fakes, args.infinity, with_float64(device))
    if train and args.floor:
        result |= compare_training_images(real, train, result["n_fake"] or train["n"])
    warn(result["n_real"], result["n_fake"], result["dims"])
    write_outputs(result, inputs, args, real, fakes[0], train)
    print(report(result))


if __name__ == "__main__":
    run(main)
