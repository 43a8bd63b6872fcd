"""Two folders of images -> FID, KID, precision and recall by evaluate.py's code and by three established tools.

    pip install -r benchmarks/requirements.txt     # in a separate environment: the tools need an older SciPy
    python benchmarks/fid_agreement.py data/64/test faces --weights inception_2015-12-05_half.pth

pytorch-fid 0.3.0, torch-fidelity 0.4.0 and clean-fid measure the same images with the same weights (tf2015) on the same
cores, through their own functions. clean-fid's network is a TorchScript file with fixed weights, so the comparison
combines clean-fid's resize and distance with pytorch-fid's network. The command prints the tables; --markdown FILE
writes them too.
"""

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import fid_peers as peers
import numpy as np
import torch
from timing import timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader import DataGenerater, find_images, read_batches
from support.cli import HelpFormatter, int_at_least, run
from support.feature_stats import measure_features
from support.files import UserError
from support.inception import LAST_LAYER, load_inception
from support.metrics import frechet_distance, kernel_distance, mean_and_covariance, precision_and_recall
from support.workers import count_cores

SPEED_DIMS = 2048  # of the statistics whose distance is timed


def our_features(folder: Path, dims: int, resize: str, weights: Path, batch: int, precision: str = "fp32") -> tuple:
    """(features (N,dims), seconds per image) by the functions of evaluate.py, after a warm-up of two images."""
    net, _ = load_inception("tf2015", dims, weights, resize=resize, precision=precision)
    dataset = DataGenerater(folder, image_size=None)
    net(dataset.__getitems__(range(2)))
    batches = read_batches(dataset, range(len(dataset)), batch)
    stats, seconds = timed(measure_features, net, batches, len(dataset), f"ours {dims} {resize} {folder.name}")
    return stats["features"], seconds / len(dataset)


def our_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b))


def compare_fids(real: Path, fake: Path, args: argparse.Namespace, peer_weights: Path) -> tuple[list[dict], dict]:
    """One result per (dims, tool), and the features: (resize or tool, dims) -> (of fake, of real)."""
    results, features = [], {}
    fidelity = [peers.torch_fidelity_features(folder, peer_weights, args.batch_size) for folder in (fake, real)]
    clean = [peers.clean_fid_features(folder, args.batch_size) for folder in (fake, real)]
    for dims in args.dims:
        pytorch = [peers.pytorch_fid_features(folder, dims)[0] for folder in (fake, real)]
        features["torch-fidelity", dims] = [side[dims] for side in fidelity]
        for resize, tool, peer, distance in (
            ("bilinear", "pytorch-fid", pytorch, peers.pytorch_fid_fid),
            ("tf", "torch-fidelity", [side[dims] for side in fidelity], peers.torch_fidelity_fid),
            ("clean", "clean-fid", [side[dims] for side in clean], peers.clean_fid_fid),
        ):
            ours = [our_features(folder, dims, resize, args.weights, args.batch_size)[0] for folder in (fake, real)]
            features[resize, dims] = ours
            difference = max(float((a - b).abs().max()) for a, b in zip(ours, peer))
            result = {"dims": dims, "resize": resize, "tool": tool, "max_feature_difference": difference}
            result |= {"our_fid": our_fid(*ours), "tool_fid": distance(*peer), "exact_fid": peers.exact_fid(*ours)}
            print(result, flush=True)
            results.append(result)
    return results, features


def compare_sets(features: dict, dims: int) -> list[dict]:
    """KID, precision and recall of our features by our code, and of torch-fidelity's features by torch-fidelity."""
    ours, theirs = features["tf", dims], features["torch-fidelity", dims]
    size = min(1000, *map(len, ours)) // 2  # half of the images, so that the subsets differ
    metrics = dict(zip(("kid", "kid_std"), kernel_distance(*ours, size=size)))
    metrics |= dict(zip(("precision", "recall"), precision_and_recall(*ours)))
    tool = peers.torch_fidelity_set_metrics(*theirs, size)
    fixed = {"dims": dims, "kid_subset_size": size}
    return [{"metric": name, **fixed, "ours": value, "tool": tool[name]} for name, value in metrics.items()]


def compare_precisions(real: Path, fake: Path, features: dict, args: argparse.Namespace) -> list[dict]:
    """Our FID in fp32 and in bf16, of the same images."""
    results = []
    for dims in args.dims:
        exact = features["bilinear", dims]
        rounded = [our_features(f, dims, "bilinear", args.weights, args.batch_size, "bf16")[0] for f in (fake, real)]
        fp32, bf16 = our_fid(*(x[: len(y)] for x, y in zip(exact, rounded))), our_fid(*rounded)
        results.append({"dims": dims, "n": args.num_bf16, "fp32_fid": fp32, "bf16_fid": bf16})
    return results


def compare_extraction_speed(folder: Path, bf16_folder: Path, args: argparse.Namespace) -> list[dict]:
    """Images per second from files to features, best of --rounds."""
    dims = max(args.dims)
    ours, pytorch = [], []
    for _ in range(args.rounds):  # in turn, so that background load affects both
        ours.append(our_features(folder, dims, "bilinear", args.weights, args.batch_size)[1])
        # pytorch-fid's command starts one worker per core. With few images the start costs more than it saves.
        pytorch += [peers.pytorch_fid_features(folder, dims, workers=n)[1] for n in (0, min(args.threads, 8))]
    bf16 = our_features(bf16_folder, dims, "bilinear", args.weights, args.batch_size, "bf16")[1]
    seconds = {"pytorch-fid fp32": min(pytorch), "ours fp32": min(ours), "ours bf16": bf16}
    return [
        {
            "operation": "extraction",
            "dims": dims,
            "tool": tool,
            "images_per_sec": 1 / sec,
            "speedup": min(pytorch) / sec,
        }
        for tool, sec in seconds.items()
    ]


def compare_distance_speed() -> list[dict]:
    """Seconds of the distance between two sets of statistics of full rank."""
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1e-2, SPEED_DIMS)
    samples = (torch.from_numpy(rng.gamma(0.5, 1, (4096, SPEED_DIMS)) * spectrum) for _ in range(2))
    a, b = (peers.mean_and_covariance(sample) for sample in samples)
    frechet_distance(*a, *b)
    fid, seconds = min((timed(frechet_distance, *a, *b) for _ in range(3)), key=lambda pair: pair[1])
    sqrtm = peers.sqrtm_distance(a, b)
    measured = {"sqrtm of SciPy": sqrtm, "torch-fidelity": peers.torch_fidelity_distance(a, b), "ours": (fid, seconds)}
    return [
        {"operation": "distance", "dims": SPEED_DIMS, "tool": tool, "sec": sec, "speedup": sqrtm[1] / sec}
        | {"fid_difference_from_ours": abs(value - fid)}
        for tool, (value, sec) in measured.items()
    ]


def format_tables(report: dict) -> str:
    """Markdown: the command, the conditions and four tables."""

    def table(columns: str, rows: list[str]) -> str:
        return "\n".join([f"| {columns} |", "|---" * len(columns.split(" | ")) + "|", *rows]) + "\n"

    fids = [
        f"| {r['dims']} | {r['resize']} | {r['tool']} | {r['max_feature_difference']:.1e} | {r['our_fid']:.6f} "
        f"| {r['tool_fid']:.6f} | {abs(r['our_fid'] - r['tool_fid']):.1e} "
        f"| {abs(r['our_fid'] - r['exact_fid']):.1e} | {abs(r['tool_fid'] - r['exact_fid']):.1e} |"
        for r in report["fids"]
    ]
    sets = [
        f"| {r['metric']} | {r['dims']} | {r['ours']:.6f} | {r['tool']:.6f} | {abs(r['ours'] - r['tool']):.1e} |"
        for r in report["sets"]
    ]
    precisions = [
        f"| {r['dims']} | {r['fp32_fid']:.4f} | {r['bf16_fid']:.4f} "
        f"| {abs(r['fp32_fid'] - r['bf16_fid']) / r['fp32_fid']:.1e} |"
        for r in report["precisions"]
    ]
    speed = []
    for r in report["speed"]:
        measured = f"{r['images_per_sec']:.2f} img/s" if "images_per_sec" in r else f"{r['sec']:.2f} s"
        difference = f"{r['fid_difference_from_ours']:.1e}" if "fid_difference_from_ours" in r else ""
        speed.append(
            f"| {r['operation']} | {r['dims']} | {r['tool']} | {measured} | {r['speedup']:.2f} | {difference} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    fid_columns = "dims | resize | tool | max. feature difference | our FID | tool's FID | difference "
    fid_columns += "| ours - exact | tool's - exact"
    return f"""# Agreement of FID with established tools

`{report["command"]}`

{report["n_real"]} real and {report["n_fake"]} generated images, {report["threads"]} threads on {report["hardware"]}.
{versions}.

The exact FID comes from singular values of the same features, without a covariance. It shows which side a rounding
error belongs to. Where n < dims the covariances are rank-deficient, and the matrix root amplifies rounding errors.

{table(fid_columns, fids)}
Against torch-fidelity, KID over subsets of {report["sets"][0]["kid_subset_size"]} images:

{table("metric | dims | ours | torch-fidelity | difference", sets)}
fp32 against bf16, n = {report["precisions"][0]["n"]}:

{table("dims | FID in fp32 | FID in bf16 | relative difference", precisions)}
Speed, relative to the first tool of each operation:

{table("operation | dims | tool | measured | speedup | FID difference from ours", speed)}"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("real", type=Path, help="folder of real images")
    add("fake", type=Path, help="folder of generated images of the same size")
    add("--weights", type=Path, required=True, help="state dict of the tf2015 network (2015-12-05)")
    add("--num", type=int_at_least(2), default=256, help="images per folder")
    add("--num-bf16", type=int_at_least(2), default=32, help="images per folder in bf16")
    add("--num-speed", type=int_at_least(2), default=100, help="images of the speed measurement in fp32")
    add("--dims", type=int, nargs="+", choices=LAST_LAYER, default=list(LAST_LAYER), help="numbers of features")
    add("--rounds", type=int_at_least(1), default=3, help="rounds of the speed measurement; the best one counts")
    add("--batch-size", type=int_at_least(1), default=16, help="our batch size; pytorch-fid keeps its default of 50")
    add("--threads", type=int_at_least(1), default=count_cores(), help="threads of torch")
    add("--hardware", default="unknown hardware", help="description for the tables")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    return parser.parse_args(argv)


def copy_first(folder: Path, num: int, target: Path) -> Path:
    target.mkdir()
    for i, path in enumerate(find_images(folder)[:num]):
        shutil.copy(path, target / f"{i:06d}{path.suffix}")
    return target


def compare_all(args: argparse.Namespace, folder: Path) -> dict:
    """All comparisons, on copies of the images in the temporary `folder`."""
    peer_weights = peers.write_peer_weights(args.weights, folder)
    real, fake = copy_first(args.real, args.num, folder / "real"), copy_first(args.fake, args.num, folder / "fake")
    few = [copy_first(side, args.num_bf16, folder / f"few_{side.name}") for side in (real, fake)]
    report = {"n_real": len(find_images(real)), "n_fake": len(find_images(fake))}
    report["fids"], features = compare_fids(real, fake, args, peer_weights)
    report["sets"] = compare_sets(features, max(args.dims))
    report["precisions"] = compare_precisions(*few, features, args)
    speed_folder = copy_first(real, args.num_speed, folder / "speed")
    report["speed"] = compare_extraction_speed(speed_folder, few[0], args) + compare_distance_speed()
    return report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        versions = peers.check_peers()
    except ImportError as error:
        raise UserError(f"{error}; run `pip install -r benchmarks/requirements.txt`") from None
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    command = shlex.join(["python", "benchmarks/fid_agreement.py", *(sys.argv[1:] if argv is None else argv)])
    report = {"command": command, "threads": args.threads, "hardware": args.hardware, "versions": versions}
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCH_HOME"] = name
        tables = format_tables(report | compare_all(args, Path(name)))
    print(tables)
    if args.markdown:
        args.markdown.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    run(main)
