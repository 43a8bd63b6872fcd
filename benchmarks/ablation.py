"""Ablation: trains named variants on an equal number of real images, and compares them in a table and a picture.

    pip install -r benchmarks/requirements.txt                      # matplotlib, for --picture
    python benchmarks/ablation.py --epochs 8 --eval-flags "--inception tf2015 --dims 768"
    python benchmarks/ablation.py --variants report best --seeds 0 1 --epochs 56 --markdown ablation.md

Each variant is `python train.py` with the flags in VARIANTS. `python evaluate.py` measures each generator. The raw
(non-EMA) weights of `report` are the result of the PyTorch DCGAN tutorial: the same networks, losses, optimisers and
batch size. All results stay in --outdir: an interrupted ablation resumes, and finished results are not computed again.
"""

import argparse
import hashlib
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader import DataGenerater, make_loader, to_float
from generator import load_generator, sample
from network import Discriminator, Generator
from support.augment import augment, draw_augmentations
from support.cli import HelpFormatter, int_at_least, run
from support.files import CHECKPOINTS, UserError, atomic_write
from support.images import image_grid, save_image
from support.seeding import step_latents
from support.training_log import read_log
from support.weights import load_tensors
from support.workers import count_cores

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "report": "",
    "batch 16": "--batch-size 16",
    "augment": "--augment",
    "batch 16, augment": "--batch-size 16 --augment",
    "best": "--recipe best",
}
PARAMS = {"EMA": "generator.params", "raw": "generator_raw.params"}
JUDGED = 1600  # images per kind in judge()


def python(script: str, flags: list, args: argparse.Namespace, log: Path) -> None:
    """Runs a script of this repository on an equal share of the cores. Raises UserError if the script fails."""
    environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // args.jobs))} | os.environ
    command = [sys.executable, str(ROOT / script), "--device", args.device, *map(str, flags)]
    with log.open("a") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"`{shlex.join(command)}` failed; see {log}")


def run_variant(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and measures one variant with one seed, and skips the finished parts. Returns what the table needs."""
    outdir = args.outdir / f"{variant}, seed {seed}"
    outdir.mkdir(parents=True, exist_ok=True)
    run_training(variant, seed, outdir, args)
    rows = read_log(outdir / "log.jsonl")
    images_seen = rows[-1]["images_seen"]
    result = {"variant": variant, "seed": seed, "outdir": outdir, "images_seen": images_seen}
    result["images_per_sec"] = statistics.median(row["images_per_sec"] for row in rows)
    result["curve"] = {row["images_seen"]: row["fid"] for row in rows if "fid" in row}
    for name, file in PARAMS.items():
        result[name] = evaluate_params(outdir / file, images_seen, args)
    logits_file = outdir / f"logits_{images_seen}.json"
    if not logits_file.exists():
        with atomic_write(logits_file) as file:
            file.write(json.dumps(judge(outdir, args)).encode())
    result["logits"] = json.loads(logits_file.read_text())
    print(f"{outdir.name}: " + ", ".join(f"FID ({name}) {result[name]['fid']:.4f}" for name in PARAMS), flush=True)
    return result


def run_training(variant: str, seed: int, outdir: Path, args: argparse.Namespace) -> None:
    """Runs train.py. It resumes if `outdir` holds a checkpoint, and ends at once if that training is complete."""
    resume = any((outdir / name).exists() for name in CHECKPOINTS)
    flags = [*shlex.split(VARIANTS[variant]), *shlex.split(args.train_flags), "--seed", seed, "--epochs", args.epochs]
    flags += ["--image-size", args.image_size, "--dataroot", args.dataroot, "--outdir", outdir]
    flags += ["--eval-every", args.eval_every, "--eval-flags", args.eval_flags]
    python("train.py", flags + ["--resume"] * resume, args, outdir / "stdout.txt")


def evaluate_params(params: Path, images_seen: int, args: argparse.Namespace) -> dict:
    """The report of evaluate.py on one generator. The report's file name depends on images_seen and --eval-flags."""
    flags_hash = hashlib.sha256(args.eval_flags.encode()).hexdigest()[:8]
    report = params.with_name(f"{params.stem}_{images_seen}_{flags_hash}.json")
    if not report.exists():
        flags = ["--params", params, "--dataroot", args.dataroot, "--json", report]
        python("evaluate.py", [*flags, *shlex.split(args.eval_flags)], args, params.with_name("stdout.txt"))
    return json.loads(report.read_text())


@torch.no_grad()
def judge(outdir: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean logits of D for train images, test images and fakes, with the batch size and augmentation of the training.

    A D that has memorised its train images gives them higher logits than test images, which it has never seen.
    """
    checkpoint = load_tensors(outdir / CHECKPOINTS[0], "train this variant again")
    flags = argparse.Namespace(**checkpoint["fixed"])
    netG = Generator(flags.nz, flags.ngf, flags.image_size)
    netD = Discriminator(flags.ndf, flags.image_size, flags.group_norm)
    netG.load_state_dict(checkpoint["netG"])
    netD.load_state_dict(checkpoint["netD"])

    def mean_logit(batches: Iterable[torch.Tensor]) -> float:
        scores = []
        for step, images in enumerate(islice(batches, max(1, JUDGED // flags.batch_size))):
            u = draw_augmentations(0, step, len(images), images.shape[-1])[0] if flags.augment else None
            scores.append(netD(augment(images, u), logits=True).mean())
        return torch.stack(scores).mean().item()

    logits = {}
    for split in ("train", "test"):
        dataset = DataGenerater(args.dataroot / str(flags.image_size) / split, flags.image_size)
        logits[split] = mean_logit(map(to_float, make_loader(dataset, min(flags.batch_size, len(dataset)), 0, 0)))
    latents = (step_latents(0, step, flags.batch_size, flags.nz) for step in range(JUDGED))
    return logits | {"fakes": mean_logit(map(netG, latents))}


def table(results: list[dict], args: argparse.Namespace) -> str:
    """Markdown: for each variant the mean over its seeds, with the value of each seed in parentheses."""

    def cell(values: list[float]) -> str:
        per_seed = f" ({', '.join(f'{value:.4f}' for value in values)})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{per_seed}"

    first = results[0]["EMA"]
    baseline = statistics.mean(r["raw"]["fid"] for r in results if r["variant"] == args.variants[0])
    lines = [
        f"FID-{first['dims']}, n = {first['n_fake']:,} generated images against {first['n_real']:,} test images "
        f"({first['network']}, resize {first['resize']}, weights {first['weights_sha256']:.16}...). "
        "EMA and raw (non-EMA) are the weights of G.\n",
        f"| variant | flags of train.py | images seen | FID, EMA | FID, raw | EMA / raw of `{args.variants[0]}` "
        "| KID, EMA | D's logits: train, test, fakes | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in args.variants:
        runs = [result for result in results if result["variant"] == variant]
        ema, raw = ([result[name]["fid"] for result in runs] for name in PARAMS)
        logits = zip(*(result["logits"].values() for result in runs))
        lines.append(
            f"| {variant} | {f'`{VARIANTS[variant]}`' if VARIANTS[variant] else 'none'} | {runs[0]['images_seen']:,} "
            f"| {cell(ema)} | {cell(raw)} | {statistics.mean(ema) / baseline:.2f} "
            f"| {cell([result['EMA']['kid'] for result in runs])} "
            f"| {', '.join(f'{statistics.mean(values):.2f}' for values in logits)} "
            f"| {statistics.median(result['images_per_sec'] for result in runs):,.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(results: list[dict], args: argparse.Namespace) -> None:
    """PNG of the FID of the EMA weights against the number of real images seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for result in results:
        colour = f"C{args.variants.index(result['variant'])}"
        label = result["variant"] if result["seed"] == args.seeds[0] else None
        axis.semilogy(list(result["curve"]), list(result["curve"].values()), ".-", color=colour, label=label)
    axis.set(xlabel="real images seen", ylabel=f"FID-{results[0]['EMA']['dims']}, EMA weights")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(matplotlib.ticker.ScalarFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(args.picture, dpi=90)


def draw_faces(results: list[dict], args: argparse.Namespace) -> None:
    """PNG of the images of seeds 0-31: by the first variant's raw weights, and by the EMA weights of each variant."""
    runs = [result for result in results if result["seed"] == args.seeds[0]]
    shown = [(f"{runs[0]['variant']}: raw", runs[0]["outdir"] / PARAMS["raw"])]
    shown += [(f"{r['variant']}: EMA", r["outdir"] / PARAMS["EMA"]) for r in runs]
    grids = [image_grid(torch.cat([*sample(load_generator(path), range(32))]), columns=4) for _, path in shown]
    width, height = grids[0].size
    picture = Image.new("RGB", (len(grids) * (width + 10) - 10, height + 16), "white")
    for i, ((label, _), grid) in enumerate(zip(shown, grids)):
        ImageDraw.Draw(picture).text((i * (width + 10) + 4, 2), label, "black")
        picture.paste(grid, (i * (width + 10), 16))
    save_image(picture, args.faces)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    variants = list(VARIANTS)
    add("--variants", nargs="+", choices=VARIANTS, default=variants, help="variants; the first is the baseline")
    add("--seeds", type=int_at_least(0), nargs="+", default=[0], help="seeds of the trainings of each variant")
    add("--epochs", type=int_at_least(1), default=8, help="training epochs")
    add("--image-size", type=int, default=64, help="width and height of the images")
    add("--train-flags", default="", help='flags of train.py for all variants: "--ngf 32 --ndf 32"')
    add("--eval-every", type=int_at_least(0), default=0, help="epochs between FIDs of the curve; 0: no curve")
    add("--eval-flags", default="", help='flags of evaluate.py: "--inception tf2015 --weights FILE --dims 768"')
    add("--dataroot", type=Path, default=Path("data"), help="output folder of preprocess.py")
    add("--outdir", type=Path, default=Path("runs/ablation"), help="folder for the trainings")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--jobs", type=int_at_least(1), default=1, help="concurrent trainings; they share the cores")
    add("--markdown", type=Path, metavar="FILE", help="write the table")
    add("--picture", type=Path, metavar="PNG", help="draw FID against images seen")
    add("--faces", type=Path, metavar="PNG", help="draw images of equal seeds for each variant")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        todo = [(variant, seed) for seed in args.seeds for variant in args.variants]
        results = list(pool.map(lambda variant_and_seed: run_variant(*variant_and_seed, args), todo))
    finally:
        pool.shutdown(cancel_futures=True)  # no new training starts after a failure or Ctrl-C
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    text = f"`python benchmarks/ablation.py {command}`\n\n{table(results, args)}"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")
    if args.picture:
        draw_curves(results, args)
    if args.faces:
        draw_faces(results, args)


if __name__ == "__main__":
    run(main)
