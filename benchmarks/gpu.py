"""Everything that is worth measuring on a GPU, most valuable first: each step writes its log and one line of results.

    python benchmarks/gpu.py --photos celeba.zip --partition list_eval_partition.txt --weights INCEPTION --out results

A step that fails or takes too long does not stop the next one. results/summary.jsonl has a row a step: its seconds, its
exit code, and what was measured. --only runs the steps of these names.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import HelpFormatter, run
from support.training_log import read_log

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--"]


def steps(args: argparse.Namespace) -> dict[str, tuple[int, list]]:
    """{name: (limit in seconds, arguments of Python)}. Names that begin with "train" have a training in out/<name>."""
    data, out = args.out / "data", args.out

    def train(name: str, *flags, launcher=()) -> list:
        return [*launcher, ROOT / "train.py", "--dataroot", data, "--outdir", out / name, *flags]

    def measure(name: str, weights: str = "generator") -> list:
        flags = ["--inception", "tf2015", "--weights", args.weights, "--dims", 768, "--overwrite"]
        params, result = out / f"train_{name}" / f"{weights}.params", out / f"measure_{name}_{weights}.json"
        return [ROOT / "evaluate.py", "--params", params, "--dataroot", data, "--json", result, *flags]

    end_to_end = [ROOT / "benchmarks" / "end_to_end.py", "--photos", args.photos, "--weights", args.weights]
    bits = ["--epochs", 2, "--deterministic"]
    return {
        "crops": (120, [ROOT / "preprocess.py", args.photos, "--partition", args.partition, "--dataroot", data]),
        "tests": (120, ["-m", "pytest", "-q", "-n", "2", ROOT / "tests" / "test_step.py", "-k", "cuda_graph"]),
        "train_report": (60, train("train_report", "--epochs", 10)),
        "train_best": (60, train("train_best", "--recipe", "best", "--epochs", 4)),
        "train_128": (60, train("train_128", "--image-size", 128, "--epochs", 8)),
        "train_plain_bits": (60, train("train_plain_bits", *bits)),
        "train_nccl_bits": (60, train("train_nccl_bits", *bits, launcher=TORCHRUN)),
        "train_nccl": (60, train("train_nccl", "--epochs", 10, launcher=TORCHRUN)),
        "train_compiled": (150, train("train_compiled", "--epochs", 10, "--compile")),
        "end_to_end": (300, [*end_to_end, "--steps", 200, "--fid-images", 2000, "--json", out / "end_to_end.json"]),
        "train_best_0": (300, train("train_best_0", "--recipe", "best", "--epochs", 56, "--seed", 0)),
        "measure_best_0_generator": (60, measure("best_0")),
        "train_report_0": (60, train("train_report_0", "--epochs", 56, "--seed", 0)),
        "measure_report_0_generator": (60, measure("report_0")),
        "measure_report_0_generator_raw": (60, measure("report_0", "generator_raw")),
        "train_best_1": (300, train("train_best_1", "--recipe", "best", "--epochs", 56, "--seed", 1)),
        "measure_best_1_generator": (60, measure("best_1")),
        "train_report_1": (60, train("train_report_1", "--epochs", 56, "--seed", 1)),
        "measure_report_1_generator": (60, measure("report_1")),
        "measure_report_1_generator_raw": (60, measure("report_1", "generator_raw")),
        "train_compiled_best": (150, train("train_compiled_best", "--recipe", "best", "--epochs", 4, "--compile")),
    }


def results(name: str, out: Path) -> dict:
    """What the step `name` has measured: the median speed of a training, or the content of its JSON file."""
    found = {}
    speeds = [row["images_per_sec"] for row in read_log(out / name / "log.jsonl")]
    if speeds:
        found["images_per_sec"] = statistics.median(speeds)
    if name == "train_nccl_bits":
        plain, nccl = (out / step / "generator_raw.params" for step in ("train_plain_bits", name))
        found["same_bits"] = plain.exists() and nccl.exists() and plain.read_bytes() == nccl.read_bytes()
    path = out / f"{name}.json"
    return found | (json.loads(path.read_text()) if path.exists() else {})


def run_step(name: str, limit: int, arguments: list, out: Path) -> None:
    """Run one step and append its row to summary.jsonl."""
    start = time.perf_counter()
    shutil.rmtree(out / name, ignore_errors=True)
    with (out / f"{name}.log").open("w") as log:
        try:
            command = [sys.executable, *map(str, arguments)]
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = "too slow"
    row = {"step": name, "seconds": round(time.perf_counter() - start, 1), "exit": code} | results(name, out)
    print(json.dumps(row), flush=True)
    with (out / "summary.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--photos", type=Path, required=True, help="zip of CelebA's photos, or of some of them")
    add("--partition", type=Path, required=True, help="list_eval_partition.txt")
    add("--weights", type=Path, required=True, help="state dict of the Inception network of 2015-12-05")
    add("--out", type=Path, required=True, help="folder for the crops, trainings, logs and results")
    add("--only", nargs="+", metavar="STEP", help="names of the steps to run (default: all)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (limit, arguments) in steps(args).items():
        if not args.only or name in args.only:
            run_step(name, limit, arguments, args.out)


if __name__ == "__main__":
    run(main)
