"""From a zip of photos to the FID: the user's four commands and their usual alternatives, timed, one row a stage.

    python benchmarks/end_to_end.py --photos img_align_celeba.zip --weights pt_inception-2015-12-05-6726825d.pth
    python benchmarks/end_to_end.py --photos photos.zip --weights FILE --count 4000 --epochs 1      # two cores

The benchmark makes a zip of --count photos under new names, and a partition in CelebA's proportions. Photos at hand
repeat until the zip is full. It then runs preprocess.py, train.py, generator.py and evaluate.py as a user does.

Start-up is the time that a script needs to import its modules. Idle is the share of all CPU cores that the stage leaves
unused. Memory is the peak of the largest process. The alternatives are a PIL loop on all cores, the PyTorch DCGAN
tutorial's loop and pytorch-fid (if installed). They process a part, and the table scales their time to the same number
of images.
"""

import argparse
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from speed_stages import pil_loop
from speed_training import TutorialProcess
from timing import items_per_sec, timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import HelpFormatter, int_at_least, run
from support.devices import pick_device
from support.files import UserError
from support.workers import count_cores

ROOT = Path(__file__).resolve().parent.parent
CELEBA = {"train": 162_770, "valid": 19_867, "test": 19_962}  # photos in each split
PART = 1000  # photos that the alternatives process


def make_source(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write photos.zip and list_eval_partition.txt into `folder`. Returns the number of photos in each split."""
    with zipfile.ZipFile(args.photos) as archive:
        members = [member for member in archive.infolist() if member.filename.lower().endswith((".jpg", ".jpeg"))]
        largest = sorted(members, key=lambda member: member.file_size)[-args.count :]  # not the half-size ones
        photos = [archive.read(member) for member in largest]
    if not photos:
        raise UserError(f"--photos {args.photos} holds no JPEG files; give a zip of photos such as CelebA's")
    test, valid = (max(2, round(args.count * CELEBA[split] / sum(CELEBA.values()))) for split in ("test", "valid"))
    counts = {"train": args.count - valid - test, "valid": valid, "test": test}
    labels = itertools.chain.from_iterable(itertools.repeat(i, n) for i, n in enumerate(counts.values()))
    names = [f"{number:06d}.jpg" for number in range(1, args.count + 1)]
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for name, photo in zip(names, itertools.cycle(photos)):
            archive.writestr(f"img_align_celeba/{name}", photo)
    lines = (f"{name} {label}\n" for name, label in zip(names, labels))
    (folder / "list_eval_partition.txt").write_text("".join(lines))
    return counts


# Runs a command and prints what it used. A process counts the memory of the one that it was forked from: this one is
# small, and the benchmark is not.
MEASURE = """
import json, resource, subprocess, sys
with open("output.txt", "a") as output:
    code = subprocess.call(sys.argv[1:], stdout=output, stderr=subprocess.STDOUT)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]))
"""


def run_command(command: list, folder: Path) -> dict[str, float]:
    """Run one of the scripts in `folder`. Returns wall-clock seconds, the share of all cores that was idle, and GiB.

    The memory is that of the largest process, the script or one of its workers, at its peak.
    """
    command = [sys.executable, str(ROOT / command[0]), *map(str, command[1:])]
    measure = [sys.executable, "-c", MEASURE, *command]
    done, seconds = timed(subprocess.run, measure, cwd=folder, stdout=subprocess.PIPE, check=True)
    code, cpu_seconds, largest = json.loads(done.stdout)
    if code:
        last = (folder / "output.txt").read_text().strip().splitlines()[-1]
        raise UserError(f"`{shlex.join(command)}` failed: {last}")
    idle = 1 - cpu_seconds / seconds / count_cores()
    kibibytes = largest / 1024 if sys.platform == "darwin" else largest
    return {"seconds": seconds, "idle": max(0.0, idle), "peak_gib": kibibytes / 2**20}


def import_seconds(script: str) -> float:
    """Median time of three processes that import a script, minus that of a process that imports nothing."""

    def measure(code: str) -> float:
        command = [sys.executable, "-c", code]
        return statistics.median(timed(subprocess.run, command, cwd=ROOT, check=True)[1] for _ in range(3))

    return measure(f"import {Path(script).stem}") - measure("pass")


def measure_ours(args: argparse.Namespace, folder: Path, counts: dict[str, int]) -> list[dict]:
    """One row for each of the four commands."""
    params = "runs/64/generator.params"
    inception = ["--inception", "tf2015", "--weights", args.weights.resolve(), "--dims", args.dims]
    commands = {
        "preprocess.py": (["photos.zip", "--partition", "list_eval_partition.txt", "--sizes", 64], args.count),
        "train.py": (["--epochs", args.epochs, "--device", args.device], args.epochs * counts["train"]),
        "generator.py": (["--params", params, "--grid", "--device", args.device], 64),
        "evaluate.py": (["--params", params, "--no-floor", "--device", args.device, *inception], 2 * counts["test"]),
    }
    rows = []
    for script, (flags, images) in commands.items():
        row = {"stage": script, "images": images, "start_sec": import_seconds(script)}
        row |= run_command([script, *flags], folder)
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def measure_alternatives(args: argparse.Namespace, folder: Path, counts: dict[str, int]) -> dict[str, float]:
    """{stage: images per second} of what people use instead, measured on a part."""
    photos = folder / "photos" / "faces"
    photos.mkdir(parents=True)
    (folder / "pil" / "64").mkdir(parents=True)
    with zipfile.ZipFile(folder / "photos.zip") as archive:
        for member in archive.infolist()[:PART]:
            (photos / Path(member.filename).name).write_bytes(archive.read(member))
    jobs = [(str(path), 64) for path in sorted(photos.iterdir())]
    with ProcessPoolExecutor(count_cores()) as pool:
        loop = partial(pil_loop, folder / "pil")
        speeds = {"preprocess.py": items_per_sec(len(jobs), lambda: list(pool.map(loop, jobs, chunksize=16)))}
    batch = min(128, len(jobs))
    with TutorialProcess(photos.parent, pick_device(args.device), batch) as tutorial:
        speeds["train.py"] = tutorial.images_per_sec(args.steps, batch)
    try:
        import fid_peers

        fid_peers.check_peers()
        weights = fid_peers.write_peer_weights(args.weights, folder)
        os.environ["TORCH_HOME"] = str(weights.parents[2])
        part = folder / "part"
        part.mkdir()
        for path in sorted((folder / "data" / "64" / "test").iterdir())[: args.fid_images]:
            (part / path.name).write_bytes(path.read_bytes())
        speeds["evaluate.py"] = 1 / fid_peers.pytorch_fid_features(part, args.dims)[1]
    except ImportError:
        print("note: pytorch-fid is not installed and not measured; see benchmarks/requirements.txt", file=sys.stderr)
    return speeds


def format_table(rows: list[dict], speeds: dict[str, float]) -> str:
    """Markdown: a row a stage, and the sum."""
    lines = ["| stage | images | seconds | images/s | start-up | idle cores | memory | instead (scaled) | times |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        instead = row["images"] / speeds[row["stage"]] if row["stage"] in speeds else None
        cells = [row["stage"], f"{row['images']:,}", f"{row['seconds']:.1f}", f"{row['images'] / row['seconds']:,.0f}"]
        cells += [f"{row['start_sec'] / row['seconds']:.0%}", f"{row['idle']:.0%}"]
        cells.append(f"{row['peak_gib']:.2f} GiB")
        cells += [f"{instead:,.1f} s", f"{instead / row['seconds']:.2f}"] if instead else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append(f"| together | | {sum(row['seconds'] for row in rows):.1f} | | | | | | |")
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--photos", type=Path, required=True, help="zip of JPEG photos; the largest --count of them are used")
    add("--weights", type=Path, required=True, help="state dict of the Inception network of 2015-12-05")
    add("--count", type=int_at_least(100), default=sum(CELEBA.values()), help="photos in the zip that is made")
    add("--epochs", type=int_at_least(1), default=5, help="epochs of train.py")
    add("--dims", type=int, choices=(64, 192, 768, 2048), default=2048, help="number of Inception features")
    add("--steps", type=int_at_least(1), default=12, help="steps of the tutorial's loop; use 200 on a GPU")
    add("--fid-images", type=int_at_least(2), default=200, help="images that pytorch-fid measures")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, metavar="FILE", help="write the measured numbers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = pick_device(args.device)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = make_source(args, folder)
        rows = measure_ours(args, folder, counts)
        speeds = measure_alternatives(args, folder, counts)
        print((folder / "output.txt").read_text().strip().splitlines()[-1])
    print(f"\n{hardware}, {count_cores()} cores, torch {torch.__version__}, {args.count:,} photos\n")
    print(format_table(rows, speeds))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "instead_images_per_sec": speeds}, indent=2) + "\n")


if __name__ == "__main__":
    run(main)
