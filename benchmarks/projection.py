"""How well generator.py --project finds latents: the table of docs/latent_space.md.

    python benchmarks/projection.py --photos data/64/test        # 100 faces of the generator, 100 test images

A face of the generator counts as recovered at a PSNR of 30 dB or more. The seeds are 10,000 and up: none of them is
among the candidates that project() starts from.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader import DataGenerater, to_float
from generator import PRETRAINED, draw, load_generator, sample
from support.cli import HelpFormatter, int_at_least, run
from support.feature_stats import choose
from support.projection import project, psnr

RECOVERED = 30  # dB


def measure(netG: torch.nn.Module, images: Iterable[torch.Tensor], label: str) -> str:
    """A row of the table for `images` uint8 (3,S,S)."""
    values, seconds = [], []
    for image in images:
        start = time.perf_counter()
        z = project(netG, to_float(image))
        seconds.append(time.perf_counter() - start)
        values.append(psnr(draw(netG, z)[0], image))
        print(f"{label} {len(values)}: {values[-1]:.1f} dB, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    recovered = sum(value >= RECOVERED for value in values)
    median, duration = statistics.median(values), statistics.median(seconds)
    return f"| {label} | {recovered} of {len(values)} | {median:.1f} | {duration:.1f} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--params", type=Path, default=PRETRAINED, help="weights of the generator")
    add("--photos", type=Path, help="folder of real crops")
    add("--num", type=int_at_least(1), default=100, help="faces of the generator, and real crops")
    add("--threads", type=int_at_least(1), default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    netG = load_generator(args.params)
    seeds = range(10_000, 10_000 + args.num)
    rows = [measure(netG, (face for faces in sample(netG, seeds) for face in faces), "faces of the generator")]
    if args.photos:
        dataset = DataGenerater(args.photos, netG.image_size)
        rows.append(measure(netG, (dataset[i] for i in choose(len(dataset), args.num)), "test photos"))
    print(f"| images | {RECOVERED} dB or more | median PSNR, dB | median seconds |\n|---|---|---|---|", *rows, sep="\n")


if __name__ == "__main__":
    run(main)
