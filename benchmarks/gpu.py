"""The tests and trainings that need a GPU, one after the other, in a quarter of an hour on an H200 (computed).

    python benchmarks/gpu.py --dataroot data_82k --out results --weights INCEPTION
    python benchmarks/gpu.py --dataroot data_82k --out results --only tests best_64_0

No network is needed: --dataroot holds the crops of preprocess.py at 64x64 and 128x128. After each step, --out has its
results in results.json, and its networks in half precision as <step>.pt. Files above 15 MiB are split into <step>.pt.0,
<step>.pt.1, ...; `cat best_128.pt.* > best_128.pt` joins them, and generator.py takes the file as --params. A step that
fails or takes too long does not stop the next one.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import HelpFormatter, run
from support.training_log import read_log

ROOT = Path(__file__).resolve().parent.parent
PART = 15 * 2**20  # bytes
BEST = ("netG_ema", "netD")  # the networks of a checkpoint that a step keeps: EMA weights of G, and D
REPORT = ("netG_ema", "netG")  # EMA and raw weights of G
# Name: (limit in seconds, networks to keep, folder of the training, flags of train.py). The most valuable come first.
TRAININGS = {
    "best_64_0": (200, BEST, "best_64_0", "--recipe best --epochs 14 --seed 0"),
    "best_64_1": (200, BEST, "best_64_1", "--recipe best --epochs 14 --seed 1"),
    "best_64_0_long": (300, BEST, "best_64_0", "--recipe best --epochs 35 --seed 0"),
    "best_128": (360, ("netG_ema",), "best_128", "--recipe best --epochs 14 --image-size 128"),
    "report_64_0": (60, REPORT, "report_64_0", "--epochs 14 --seed 0"),
    "report_64_1": (60, REPORT, "report_64_1", "--epochs 14 --seed 1"),
}


def run_python(arguments: list, limit: int, log: Path) -> int | str:
    """Run `python <arguments>` and return its exit code, or "too slow" after `limit` seconds.

    The process leads a new process group. At the limit, SIGTERM goes to the whole group, so that torchrun can end its
    processes and a training can write its checkpoint. After half a minute, SIGKILL ends the group.
    """
    with log.open("w") as file:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            return "too slow"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the group has left on the GPU
            process.wait()


def save_half(checkpoint: Path, networks: tuple[str, ...], path: Path) -> None:
    """Write `networks` of the checkpoint to `path` in half precision, in parts where that is above PART bytes."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    halves = {}
    for name in networks:
        state = content[name].items()
        halves[name] = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state}
    torch.save(halves, path)
    data = path.read_bytes()
    if len(data) > PART:
        path.unlink()
        for number, start in enumerate(range(0, len(data), PART)):
            path.with_name(f"{path.name}.{number}").write_bytes(data[start : start + PART])


def run_tests(args: argparse.Namespace) -> dict:
    log = args.out / "tests.log"
    code = run_python(["-m", "pytest", "-q", "-n", 2, "tests/test_gpu.py"], 180, log)
    return {"exit": code, "summary": log.read_text().splitlines()[-1:]}


def run_training(name: str, args: argparse.Namespace) -> dict:
    """Train, keep the networks, and with --weights measure the FID of the EMA weights against the test split."""
    limit, networks, folder, flags = TRAININGS[name]
    outdir = args.work / folder
    command = ["train.py", "--dataroot", args.dataroot, "--outdir", outdir, "--device", args.device, *flags.split()]
    command.append("--resume")  # a second run of this script goes on
    result = {"exit": run_python(command, limit, args.out / f"{name}.log")}
    rows = read_log(outdir / "log.jsonl")
    if not rows:
        return result
    save_half(outdir / "checkpoint.pt", networks, args.out / f"{name}.pt")
    result |= {"step": rows[-1]["step"], "epoch": rows[-1]["epoch"]}
    result["images_per_sec"] = statistics.median(row["images_per_sec"] for row in rows)
    if args.weights:
        measured = args.work / f"{name}.json"
        command = ["evaluate.py", "--params", outdir / "generator.params", "--dataroot", args.dataroot, "--dims", 768]
        command += ["--inception", "tf2015", "--weights", args.weights, "--json", measured, "--overwrite"]
        result["exit_evaluate"] = run_python([*command, "--device", args.device], 120, args.out / f"{name}_fid.log")
        result["evaluate"] = json.loads(measured.read_text()) if measured.exists() else None
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    names = ["tests", *TRAININGS]
    add = parser.add_argument
    add("--dataroot", type=Path, required=True, help="folder that preprocess.py made, with 64/ and 128/")
    add("--out", type=Path, required=True, help="folder for results.json, the logs and the networks")
    add("--work", type=Path, default=Path("runs/gpu"), help="folder for the trainings")
    add("--weights", type=Path, help="Inception weights of 2015-12-05; without them no FID is measured")
    add("--device", default="cuda", help="cuda or cuda:1; cpu to try this script")
    add("--only", nargs="+", choices=names, default=names, metavar="STEP", help=f"steps to run, of {', '.join(names)}")
    args = parser.parse_args(argv)
    for name in ("dataroot", "out", "work", "weights"):
        path = getattr(args, name)
        setattr(args, name, path and path.absolute())
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.only:
        start = time.perf_counter()
        results[name] = run_tests(args) if name == "tests" else run_training(name, args)
        results[name]["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({name: results[name]}), flush=True)
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
