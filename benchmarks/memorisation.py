"""Memorisation: are generated faces nearer to training photos than to photos that the training never saw?

    python benchmarks/memorisation.py --params pretrained/generator_64.params --dataroot data_82k --inception tf2015 \
        --dims 768 --json memorisation.json

Takes the flags of evaluate.py. Each face has a nearest photo, by the distance of Inception features, in `valid` and in
each of ten random subsets of `train` that have as many photos as `valid`. A generator that copies nothing is nearer to
the training photos for half of its faces. The photos of `test` are measured like faces, to show what chance gives.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from dataloader import DataGenerater
from generator import choose_params, load_generator
from support.cli import run
from support.devices import full_float32, pick_device
from support.files import atomic_write, check_outputs, git_commit, hash_file

SUBSETS = 10
ROWS = 1024  # of a distance matrix that are in memory at a time


def nearest_distances(x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The distance (N,) of each of `x` (N,D) to the nearest of `others` (M,D)."""
    return torch.cat([torch.cdist(rows, others).amin(1) for rows in x.split(ROWS)])


def compare(x: torch.Tensor, train: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    """Median distances of `x` to the nearest photos, and the share of `x` that is nearer to the training photos."""
    to_valid = nearest_distances(x, valid)
    medians = []
    shares = []
    for subset in range(SUBSETS):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(subset))
        to_train = nearest_distances(x, train[order[: len(valid)]])
        medians.append(to_train.median())
        shares.append((to_train < to_valid).double().mean())
    return {
        "to_train": torch.stack(medians).mean().item(),
        "to_valid": to_valid.median().item(),
        "share_nearer_to_train": torch.stack(shares).mean().item(),
    }


@full_float32()
def main(argv: list[str] | None = None) -> None:
    args = evaluate.parse_args(argv)
    check_outputs({"--json": args.json}, args.overwrite)
    device = pick_device(args.device)
    params = choose_params(args.params)
    netG = load_generator(params, device)
    extractor = evaluate.load_extractor(args, device, netG.image_size)
    features = {}
    for split in ("train", "valid", "test"):
        dataset = DataGenerater(args.dataroot / str(netG.image_size) / split, netG.image_size)
        features[split] = extractor.of_real_images(dataset, len(dataset))["features"]
    n = args.num or len(features["valid"])
    faces = extractor.of_generator(netG, range(args.seed, args.seed + n))["features"]
    result = {"git_commit": git_commit(), "params_sha256": hash_file(params)}
    result |= {f"n_{split}": len(values) for split, values in features.items()}
    for name, x in (("generated", faces), ("test", features["test"])):
        found = compare(x, features["train"], features["valid"])
        result[name] = found | {"n": len(x)}
        print(f"{name}: median distance {found['to_train']:.3f} to the nearest of {len(features['valid']):,} training "
              f"photos, {found['to_valid']:.3f} of others; {found['share_nearer_to_train']:.1%} nearer to training")
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(result, indent=2).encode())


if __name__ == "__main__":
    run(main)
