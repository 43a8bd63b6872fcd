"""Named variants of a training at an equal budget of real images: what each flag is worth, as a table and a picture.

    pip install -r benchmarks/requirements.txt                      # matplotlib, for --picture
    python benchmarks/ablation.py --epochs 8 --eval-flags "--inception tf2015 --dims 768"
    python benchmarks/ablation.py --variants report best --seeds 0 1 --epochs 56 --markdown ablation.md

Each variant is `python train.py` with the flags below, and each generator is measured by `python evaluate.py`. The last
iterate of `report` is what users of the PyTorch DCGAN tutorial get: the same networks, losses, Adams and batches. All
that is done stays in --outdir: an interrupted ablation goes on where it was, and what is whole is not made again.
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
from support.augment import augment
from support.checkpoint import CHECKPOINTS, read_log
from support.cli import Formatter, count_cores, natural
from support.files import atomic_write
from support.images import image_grid, save_image
from support.seeding import step_generator, step_latents
from support.weights import load_tensors

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {
    "report": "",
    "batch 16": "--batch-size 16",
    "augment": "--augment",
    "batch 16, augment": "--batch-size 16 --augment",
    "best": "--recipe best",
}
PARAMS = {"average": "generator.params", "last iterate": "generator_raw.params"}
JUDGED = 1600  # images of each kind that D is asked about


def python(script: str, flags: list, args: argparse.Namespace, log: Path) -> None:
    """Runs a script of this repository with its share of the cores. Raises SystemExit when it fails."""
    environment = {"OMP_NUM_THREADS": str(max(1, count_cores() // args.jobs))} | os.environ
    command = [sys.executable, str(ROOT / script), "--device", args.device, *map(str, flags)]
    with log.open("a") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"error: `{shlex.join(command)}` failed; see {log}")


def run(variant: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and measures one variant, as far as that is not done yet. The result is what the table needs."""
    outdir = args.outdir / f"{variant}, seed {seed}"
    outdir.mkdir(parents=True, exist_ok=True)
    begun = any((outdir / name).exists() for name in CHECKPOINTS)
    flags = [*shlex.split(VARIANTS[variant]), *shlex.split(args.train_flags), "--seed", seed, "--epochs", args.epochs]
    flags += ["--image-size", args.image_size, "--dataroot", args.dataroot, "--outdir", outdir]
    flags += ["--eval-every", args.eval_every, "--eval-flags", args.eval_flags]
    python("train.py", flags + ["--resume"] * begun, args, outdir / "stdout.txt")
    rows = read_log(outdir / "log.jsonl", sys.maxsize)
    result = {"variant": variant, "seed": seed, "outdir": outdir, "images_seen": rows[-1]["images_seen"]}
    result["images_per_sec"] = statistics.median(row["images_per_sec"] for row in rows)
    result["curve"] = {row["images_seen"]: row["fid"] for row in rows if "fid" in row}
    way = hashlib.sha256(args.eval_flags.encode()).hexdigest()[:8]
    for name, file in PARAMS.items():
        report = outdir / f"{Path(file).stem}_{rows[-1]['images_seen']}_{way}.json"
        if not report.exists():
            flags = ["--params", outdir / file, "--dataroot", args.dataroot, "--json", report]
            python("evaluate.py", [*flags, *shlex.split(args.eval_flags)], args, outdir / "stdout.txt")
        result[name] = json.loads(report.read_text())
    kept = outdir / f"logits_{rows[-1]['images_seen']}.json"
    if not kept.exists():
        with atomic_write(kept) as file:
            file.write(json.dumps(judge(outdir, args)).encode())
    result["logits"] = json.loads(kept.read_text())
    print(f"{outdir.name}: " + ", ".join(f"{name} {result[name]['fid']:.4f}" for name in PARAMS), flush=True)
    return result


@torch.no_grad()
def judge(outdir: Path, args: argparse.Namespace) -> dict[str, float]:
    """Mean logits that D, in the batches and through the augmentation of its training, gives to images of three kinds.

    A D that knows its training photos by heart scores them higher than test photos, which it has never seen.
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
            u = torch.rand(len(images), 5, generator=step_generator(0, step, 1)) if flags.augment else None
            scores.append(netD(augment(images, u), logits=True).mean())
        return torch.stack(scores).mean().item()

    logits = {}
    for split in ("train", "test"):
        dataset = DataGenerater(args.dataroot / str(flags.image_size) / split, flags.image_size)
        logits[split] = mean_logit(map(to_float, make_loader(dataset, min(flags.batch_size, len(dataset)), 0, 0)))
    latents = (step_latents(0, step, flags.batch_size, flags.nz) for step in range(JUDGED))
    return logits | {"fakes": mean_logit(map(netG, latents))}


def table(results: list[dict], args: argparse.Namespace) -> str:
    """Markdown: for each variant the mean over its seeds, and beside it each seed."""

    def cell(values: list[float]) -> str:
        each = f" ({', '.join(f'{value:.4f}' for value in values)})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{each}"

    first = results[0]["average"]
    tutorial = statistics.mean(r["last iterate"]["fid"] for r in results if r["variant"] == args.variants[0])
    lines = [
        f"FID-{first['dims']}, {first['n_fake']:,} faces against {first['n_real']:,} test faces ({first['network']}, "
        f"resize {first['resize']}, weights {first['weights_sha256']:.16}...).\n",
        f"| variant | flags of train.py | images seen | average of G | last iterate | average / last iterate of "
        f"`{args.variants[0]}` | KID of the average | D's logits: train, test, fakes | images/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in args.variants:
        mine = [result for result in results if result["variant"] == variant]
        average, last = ([result[name]["fid"] for result in mine] for name in PARAMS)
        logits = zip(*(result["logits"].values() for result in mine))
        lines.append(
            f"| {variant} | {f'`{VARIANTS[variant]}`' if VARIANTS[variant] else 'none'} | {mine[0]['images_seen']:,} "
            f"| {cell(average)} | {cell(last)} | {statistics.mean(average) / tutorial:.2f} "
            f"| {cell([result['average']['kid'] for result in mine])} "
            f"| {', '.join(f'{statistics.mean(values):.2f}' for values in logits)} "
            f"| {statistics.median(result['images_per_sec'] for result in mine):,.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(results: list[dict], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for result in results:
        colour = f"C{args.variants.index(result['variant'])}"
        label = result["variant"] if result["seed"] == args.seeds[0] else None
        axis.semilogy(list(result["curve"]), list(result["curve"].values()), ".-", color=colour, label=label)
    axis.set(xlabel="real images seen", ylabel=f"FID-{results[0]['average']['dims']} of the average of G")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(matplotlib.ticker.ScalarFormatter())
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(args.picture, dpi=90)


def draw_faces(results: list[dict], args: argparse.Namespace) -> None:
    """The faces of seeds 0-31: of the tutorial, which is the first variant's last iterate, and of each average."""
    of_one_seed = [result for result in results if result["seed"] == args.seeds[0]]
    shown = [("the tutorial", of_one_seed[0]["outdir"] / PARAMS["last iterate"])]
    shown += [(f"{r['variant']}: average", r["outdir"] / PARAMS["average"]) for r in of_one_seed]
    grids = [image_grid(torch.cat([*sample(load_generator(path), range(32))]), columns=4) for _, path in shown]
    width, height = grids[0].size
    picture = Image.new("RGB", (len(grids) * (width + 10) - 10, height + 16), "white")
    for i, ((label, _), grid) in enumerate(zip(shown, grids)):
        ImageDraw.Draw(picture).text((i * (width + 10) + 4, 2), label, "black")
        picture.paste(grid, (i * (width + 10), 16))
    save_image(picture, args.faces)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the first is what others stand beside")
    add("--seeds", type=natural(0), nargs="+", default=[0], help="each variant is trained once with each")
    add("--epochs", type=natural(1), default=8, help="passes over the training images")
    add("--image-size", type=int, default=64, help="side of the faces")
    add("--train-flags", default="", help='of train.py, for all: "--ngf 32 --ndf 32"')
    add("--eval-every", type=natural(0), default=0, help="epochs between the points of the curve; 0: none")
    add("--eval-flags", default="", help='of evaluate.py: "--inception tf2015 --weights FILE --dims 768"')
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--outdir", type=Path, default=Path("runs/ablation"), help="folder for the trainings")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--jobs", type=natural(1), default=1, help="trainings side by side, which share the cores")
    add("--markdown", type=Path, help="file for the table")
    add("--picture", type=Path, help="PNG of the FIDs against the images seen")
    add("--faces", type=Path, help="PNG of faces of each, of equal seeds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        todo = [(variant, seed) for seed in args.seeds for variant in args.variants]
        results = list(pool.map(lambda one: run(*one, args), todo))
    finally:
        pool.shutdown(cancel_futures=True)  # after a failure or Ctrl-C, nothing more is begun than runs by then
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
    main()
