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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from support.cli import HelpFormatter, run
from support.training_log import read_log

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--"]


def steps(args: argparse.Namespace) -> list[tuple[int, dict[str, list]]]:
    """(limit in seconds, {name: arguments of Python}): what is in one dictionary runs side by side on the GPU.

    Names that begin with "train" have a training in out/<name>. A training that reaches its limit keeps the weights of
    its last epoch, and the next step measures them.
    """
    data, out = args.out / "data", args.out

    def train(name: str, *flags, launcher=()) -> list:
        return [*launcher, ROOT / "train.py", "--dataroot", data, "--outdir", out / name, *flags]

    def measure(name: str, weights: str = "generator") -> list:
        flags = ["--inception", "tf2015", "--weights", args.weights, "--dims", 768, "--overwrite"]
        params, result = out / f"train_{name}" / f"{weights}.params", out / f"measure_{name}_{weights}.json"
        return [ROOT / "evaluate.py", "--params", params, "--dataroot", data, "--json", result, *flags]

    end_to_end = [ROOT / "benchmarks" / "end_to_end.py", "--photos", args.photos, "--weights", args.weights]
    bits = ["--epochs", 2, "--deterministic"]

    def best(name: str, epochs: int, *flags) -> dict[str, list]:
        return {name: train(name, "--recipe", "best", "--epochs", epochs, *flags)}

    seeds = (0, 1)
    return [
        (120, {"crops": [ROOT / "preprocess.py", args.photos, "--partition", args.partition, "--dataroot", data]}),
        (120, {"tests": ["-m", "pytest", "-q", "-n", "2", ROOT / "tests" / "test_step.py", "-k", "cuda_graph"]}),
        (60, best("train_best", 4)),
        (240, best("train_best_0", 56, "--seed", 0) | best("train_best_1", 56, "--seed", 1)),
        (60, {f"measure_best_{seed}_generator": measure(f"best_{seed}") for seed in seeds}),
        (300, best("train_best_long", 480) | best("train_best_128", 480, "--image-size", 128)),
        (60, {f"measure_best_{name}_generator": measure(f"best_{name}") for name in ("long", "128")}),
        (60, {"train_report": train("train_report", "--epochs", 10)}),
        (60, {"train_128": train("train_128", "--image-size", 128, "--epochs", 8)}),
        (300, {"end_to_end": [*end_to_end, "--steps", 200, "--fid-images", 2000, "--json", out / "end_to_end.json"]}),
        (60, {"train_plain_bits": train("train_plain_bits", *bits)}),
        (60, {"train_nccl_bits": train("train_nccl_bits", *bits, launcher=TORCHRUN)}),
        (60, {"train_nccl": train("train_nccl", "--epochs", 10, launcher=TORCHRUN)}),
        (150, {"train_compiled": train("train_compiled", "--epochs", 10, "--compile")}),
        (90, {f"train_report_{seed}": train(f"train_report_{seed}", "--epochs", 56, "--seed", seed) for seed in seeds}),
        (60, {f"measure_report_{seed}_generator": measure(f"report_{seed}") for seed in seeds}),
        (60, {f"measure_report_{seed}_generator_raw": measure(f"report_{seed}", "generator_raw") for seed in seeds}),
        (150, best("train_compiled_best", 4, "--compile")),
    ]


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
    shutil.rmtree(out / name, ignore_errors=True)  # or results() would report an older run
    (out / f"{name}.json").unlink(missing_ok=True)
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
    for limit, commands in steps(args):
        names = [name for name in commands if not args.only or name in args.only]
        with ThreadPoolExecutor() as pool:
            rows = [pool.submit(run_step, name, limit, commands[name], args.out) for name in names]
        for row in rows:
            row.result()  # raises what went wrong in run_step()


if __name__ == "__main__":
    run(main)
