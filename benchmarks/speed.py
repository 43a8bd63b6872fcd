"""The speed of every stage, against a reference implementation and against the limit of the machine, as one table.

    pip install -r benchmarks/requirements.txt               # matplotlib, for --picture
    python benchmarks/speed.py --photos img_align_celeba.zip --markdown speed.md --picture docs/speed.png
    python benchmarks/speed.py --only training --device cuda --json speed.json

The table shows medians of measurements that run in turn. Without --photos the benchmark draws faces.
speed_training.py measures the training against the PyTorch DCGAN tutorial, speed_stages.py the other stages.
"""

import argparse
import json
import platform
import shlex
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from speed_stages import measure_generation, measure_input, measure_preprocess, measure_start
from speed_training import measure_growth, measure_training

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import preprocess
from support.cli import HelpFormatter, int_at_least, run
from support.demo_faces import draw_face
from support.devices import pick_device

STAGES = {
    "training": measure_training,
    "input": measure_input,
    "preprocess": measure_preprocess,
    "generation": measure_generation,
    "start": measure_start,
    "growth": measure_growth,
}
# How the table shows the keys of a result: settings by name, quantities by the end of the name.
SETTINGS = {
    "image_size": "{0}x{0}",
    "precision": "{}",
    "batch_size": "batch {:,}",
    "images": "{:,} images",
    "photos": "{:,} photos",
    "workers": "{} workers",
}
UNITS = {"images_per_sec": "img/s", "photos_per_sec": "photos/s", "sec": "s", "gib": "GiB", "percent": "%"}
COLUMNS = ("stage", "settings", "ours", "reference", "ours / reference", "goal", "limit", "ours / limit")


def is_full_size(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether a photo gives a crop of 128x128, as all of CelebA's do. Smaller ones would take less time."""
    with archive.open(name) as file, Image.open(file) as photo:
        return min(photo.size) >= 128


def prepare_images(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Returns (photos, dataroot): JPEG files in the layout of ImageFolder, and the crops that preprocess.py makes."""
    photos = folder / "photos" / "faces"
    photos.mkdir(parents=True)
    if args.photos is None:
        for i in range(args.count):
            draw_face(0, i).save(photos / f"{i:06d}.jpg", quality=92)
    else:
        with zipfile.ZipFile(args.photos) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg") and is_full_size(archive, name)]
            for name in names[:: max(1, len(names) // args.count)][: args.count]:
                (photos / Path(name).name).write_bytes(archive.read(name))
    dataroot = args.dataroot
    if dataroot is None:
        dataroot = folder / "data"
        preprocess.main([str(folder / "photos"), "--dataroot", str(dataroot)])
    return folder / "photos", dataroot


def measure(args: argparse.Namespace) -> list[dict]:
    """The results of all stages in --only. Prints each result when it is complete."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        photos, dataroot = prepare_images(args, Path(name))
        for stage in args.only:
            for result in STAGES[stage](args, photos, dataroot):
                print(json.dumps(result), flush=True)
                results.append(result)
    return results


def make_report(args: argparse.Namespace, argv: list[str], results: list[dict]) -> dict:
    """The results with the command, the hardware and the versions, as --json writes them."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "Pillow": PIL.__version__}
    versions |= {"numpy": np.__version__, "Python": platform.python_version()}
    return {
        "command": shlex.join(["python", "benchmarks/speed.py", *argv]),
        "hardware": args.hardware,
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "versions": versions,
        "results": results,
    }


def format_table(report: dict) -> str:
    """Markdown: the command, the hardware, one table row per result, and the notes below the table."""

    def settings(result: dict) -> str:
        parts = [form.format(result[name]) for name, form in SETTINGS.items() if name in result]
        varied = [f"{result['varied']}: {result['value']:,}"] if "varied" in result else []
        return ", ".join(parts + varied)

    def quantity(result: dict, kind: str) -> tuple[float | None, str]:
        for suffix, unit in UNITS.items():
            value = result.get(f"{kind}_{suffix}")
            if value is not None:
                return value, f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"
        return None, ""

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for result in report["results"]:
        (ours, ours_text), (reference, reference_text), (limit, limit_text) = (
            quantity(result, kind) for kind in ("ours", "reference", "limit")
        )
        ratio = f"{ours / reference:.2f}" if ours is not None and reference else ""
        share = f"{ours / limit:.2f}" if ours is not None and limit else ""
        cells = [result["stage"], settings(result), ours_text or "not measured", reference_text, ratio]
        lines.append("| " + " | ".join([*cells, result.get("goal", ""), limit_text, share]) + " |")
    notes = dict.fromkeys(f"- {result['stage']}: {result['note']}" for result in report["results"] if "note" in result)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n".join(
        [
            "# Speed\n",
            f"`{report['command']}`\n",
            f"{report['hardware']}, device {report['device']}, {report['threads']} threads. {versions}.",
            f"Medians of {report['rounds']} rounds.\n",
            *lines,
            "",
            *notes,
            "",
        ]
    )


def draw_growth(report: dict, path: Path) -> None:
    """PNG of the training throughput against each setting that measure_growth() varies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [result for result in report["results"] if "varied" in result]
    names = list(dict.fromkeys(point["varied"] for point in points))
    figure, axes = plt.subplots(1, len(names), figsize=(13, 3), sharey=True, constrained_layout=True)
    for axis, name in zip(axes, names):
        curve = {point["value"]: point["ours_images_per_sec"] for point in points if point["varied"] == name}
        axis.semilogy(range(len(curve)), list(curve.values()), "o-")
        axis.set_xticks(range(len(curve)), [str(value) for value in curve])
        axis.set(xlabel=name, xlim=(-0.4, len(curve) - 0.6))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("training, images/s")
    figure.suptitle(f"{report['hardware']}, {points[0]['precision']}")
    figure.savefig(path, dpi=90)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--photos", type=Path, help="zip of JPEG photos, such as CelebA's; without it the benchmark draws faces")
    group("--count", type=int_at_least(256), default=4000, help="number of photos to use")
    group("--dataroot", type=Path, help="folder of crops to train on, instead of crops of the photos")
    group = parser.add_argument_group("measurement").add_argument
    group("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to measure")
    group("--rounds", type=int_at_least(1), default=3, help="repetitions of each measurement; the table shows medians")
    group("--steps", type=int_at_least(1), default=12, help="training steps per round; use 200 on a GPU")
    group("--batch-size", type=int_at_least(2), default=128, help="batch size of the training")
    batches = [32, 64, 128, 256, 512, 1024]
    group("--batches", type=int_at_least(2), nargs="+", default=batches, help="batch sizes of the stage growth")
    group("--faces", type=int_at_least(64), default=1024, help="number of faces to generate")
    group("--celeba", type=int_at_least(0), default=202_599, help="images of the large start measurement; 0 skips it")
    group = parser.add_argument_group("hardware").add_argument
    group("--device", default="auto", help="auto, cpu, cuda, mps")
    group("--hardware", default=platform.processor() or platform.machine(), help="description for the table")
    group = parser.add_argument_group("output").add_argument
    group("--markdown", type=Path, metavar="FILE", help="write the table")
    group("--json", type=Path, metavar="FILE", help="write the results with versions and hardware")
    group("--picture", type=Path, metavar="PNG", help="draw the results of the stage growth")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    if args.device.type == "cuda":
        args.hardware = torch.cuda.get_device_name(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    report = make_report(args, argv, measure(args))
    table = format_table(report)
    print(f"\n{table}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    if args.picture and "growth" in args.only:
        draw_growth(report, args.picture)


if __name__ == "__main__":
    run(main)
