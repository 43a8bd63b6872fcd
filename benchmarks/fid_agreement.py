"""Two folders of images -> one table: FID, KID, precision and recall by evaluate.py's code and by the field's tools.

    pip install -r benchmarks/requirements.txt     # in an environment of its own; nothing is installed from here
    python benchmarks/fid_agreement.py data/64/test faces --weights inception_2015-12-05_half.pth

pytorch-fid 0.3.0, torch-fidelity 0.4.0 and clean-fid run beside it, on the same images, the same weights (tf2015) and
the same cores, by their own functions. clean-fid's network is a TorchScript file of its own, so its resize and its
distance are taken with pytorch-fid's network. The table goes to standard output, and with --markdown to a file.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support.cli import Formatter, natural

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from dataloader import DataGenerater, find_images
from support.cli import count_cores
from support.inception import LAST_LAYER, load_inception
from support.metrics import Moments, frechet_distance, kernel_distance, precision_and_recall

PORT = "pt_inception-2015-12-05-6726825d.pth"  # the name under which pytorch-fid looks for its weights


def write_peer_weights(weights: Path, folder: Path) -> Path:
    """The state dict as both peers want it: float32, every key there. `fc`, which FID does not use, may be zero."""
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = folder / "hub" / "checkpoints" / PORT
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)} | state, path)
    return path


def timed(function: Callable, *arguments, **options) -> tuple:
    """(result, seconds)."""
    start = time.perf_counter()
    result = function(*arguments, **options)
    return result, time.perf_counter() - start


def our_features(folder: Path, dims: int, resize: str, weights: Path, batch: int, precision: str = "fp32") -> tuple:
    """(features (N,dims), seconds an image) through the code of evaluate.py; two images warm up."""
    net, _ = load_inception("tf2015", dims, weights, resize=resize, precision=precision)
    dataset = DataGenerater(folder, image_size=None)
    net(dataset.__getitems__(range(2)))
    batches = evaluate.read_batches(dataset, range(len(dataset)), batch)
    stats, seconds = timed(evaluate.measure, batches, net, len(dataset), f"ours {dims} {resize} {folder.name}")
    return stats["features"], seconds / len(dataset)


def pytorch_fid_features(folder: Path, dims: int, batch_size: int = 50, workers: int = 0) -> tuple:
    """(features, seconds an image) by pytorch-fid, with the batch size of its command."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    net, files = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]]), find_images(folder)
    get_activations(files[:2], net, 2, dims, "cpu", 0)
    features, seconds = timed(get_activations, files, net, batch_size, dims, "cpu", workers)
    return torch.from_numpy(features), seconds / len(files)


@torch.no_grad()
def torch_fidelity_features(folder: Path, weights: Path, batch_size: int) -> dict:
    """Features by number of dims, all from one pass."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = [str(dims) for dims in LAST_LAYER]
    net = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(weights))
    dataset = DataGenerater(folder, image_size=None)
    parts = [net(batch) for batch in evaluate.read_batches(dataset, range(len(dataset)), batch_size)]
    return {dims: torch.cat([part[i] for part in parts]) for i, dims in enumerate(LAST_LAYER)}


@torch.no_grad()
def clean_fid_features(folder: Path, batch_size: int) -> dict:
    from cleanfid.resize import build_resizer
    from pytorch_fid.inception import InceptionV3

    net, resize = InceptionV3([0, 1, 2, 3], resize_input=False, normalize_input=False).eval(), build_resizer("clean")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in find_images(folder)]
    parts = []
    for start in range(0, len(images), batch_size):
        x = np.stack([resize(image) for image in images[start : start + batch_size]])
        x = (torch.from_numpy(x).permute(0, 3, 1, 2) - 128) / 128  # as clean-fid's own wrapper does
        parts.append([block.mean((2, 3)) for block in net(x)])
    return {dims: torch.cat([part[i] for part in parts]) for i, dims in enumerate(LAST_LAYER)}


def our_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*Moments().add(a).mean_and_covariance(), *Moments().add(b).mean_and_covariance())


def peer_statistics(features: torch.Tensor) -> tuple:
    features = features.double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def pytorch_fid_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from pytorch_fid.fid_score import calculate_frechet_distance

    return float(calculate_frechet_distance(*peer_statistics(a), *peer_statistics(b)))


def clean_fid_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from cleanfid.fid import fid_from_feats

    return float(fid_from_feats(a.numpy(), b.numpy()))


def torch_fidelity_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    stats = (fid_features_to_statistics(x) for x in (a, b))
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def exact_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    """Without a covariance, and so without its rounding, which a root makes a lot of where n < dims.

    With S1 = A^T A and S2 = B^T B, tr (S1 S2)^(1/2) is the sum of the singular values of A B^T.
    """
    a, b = a.double(), b.double()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def compare_fids(real: Path, fake: Path, args: argparse.Namespace, peer_weights: Path) -> tuple[list[str], dict]:
    """Rows of the table, a FID each, and features to go on with: (resize, dims) -> (ours of fake, ours of real)."""
    rows, kept = [], {}
    fidelity = [torch_fidelity_features(folder, peer_weights, args.batch_size) for folder in (fake, real)]
    clean = [clean_fid_features(folder, args.batch_size) for folder in (fake, real)]
    for dims in args.dims:
        port = [pytorch_fid_features(folder, dims)[0] for folder in (fake, real)]
        for resize, name, peer, distance in (
            ("bilinear", "pytorch-fid", port, pytorch_fid_fid),
            ("tf", "torch-fidelity", [side[dims] for side in fidelity], torch_fidelity_fid),
            ("clean", "clean-fid", [side[dims] for side in clean], clean_fid_fid),
        ):
            ours = [our_features(folder, dims, resize, args.weights, args.batch_size)[0] for folder in (fake, real)]
            kept[resize, dims] = ours
            apart = max(float((a - b).abs().max()) for a, b in zip(ours, peer))
            fid, theirs, exact = our_fid(*ours), distance(*peer), exact_fid(*ours)
            rows.append(
                f"| {dims} | {resize} | {name} | {apart:.1e} | {fid:.6f} | {theirs:.6f} | {abs(fid - theirs):.1e} "
                f"| {abs(fid - exact):.1e} | {abs(theirs - exact):.1e} |"
            )
            print(rows[-1], flush=True)
    kept["torch-fidelity"] = fidelity
    return rows, kept


def compare_sets(kept: dict, dims: int) -> list[str]:
    """KID, precision and recall against torch-fidelity's, each on its own features."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs = kept["tf", dims], [side[dims] for side in kept["torch-fidelity"]]
    size = min(1000, *map(len, ours)) // 2  # so that the subsets differ
    kid, kid_std = kernel_distance(*ours, size=size)
    precision, recall = precision_and_recall(*ours)
    peer = kid_features_to_metric(*theirs, kid_subset_size=size, verbose=False)
    peer |= prc_features_to_metric(*theirs, verbose=False)
    pairs = {
        f"KID, subsets of {size}": (kid, peer["kernel_inception_distance_mean"]),
        "its standard deviation": (kid_std, peer["kernel_inception_distance_std"]),
        "precision": (precision, peer["precision"]),
        "recall": (recall, peer["recall"]),
    }
    return [f"| {name} | {dims} | {a:.6f} | {b:.6f} | {abs(a - b):.1e} |" for name, (a, b) in pairs.items()]


def compare_speed(folder: Path, few: Path, args: argparse.Namespace) -> list[str]:
    """Images/s from files to 2,048 features, and seconds of the distance between two such sets of full rank."""
    from scipy.linalg import sqrtm
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    dims = max(args.dims)
    ours, port = [], []
    for _ in range(args.rounds):  # in turn, so that a busy moment meets both
        ours.append(our_features(folder, dims, "bilinear", args.weights, args.batch_size)[1])
        # Its command takes a worker for each core, which costs a start that few images do not earn back.
        port += [pytorch_fid_features(folder, dims, workers=n)[1] for n in (0, min(args.threads, 8))]
    bf16 = our_features(few, dims, "bilinear", args.weights, args.batch_size, "bf16")[1]
    rows = [
        f"| extraction to {dims}, pytorch-fid fp32 | {1 / min(port):.2f} img/s | 1 |",
        f"| extraction to {dims}, ours fp32 | {1 / min(ours):.2f} img/s | {min(port) / min(ours):.2f} |",
        f"| extraction to {dims}, ours bf16 | {1 / bf16:.2f} img/s | {min(port) / bf16:.2f} |",
    ]
    rng = np.random.default_rng(0)
    spectrum = np.geomspace(1, 1e-2, 2048)
    stats = [peer_statistics(torch.from_numpy(rng.gamma(0.5, 1, (4096, 2048)) * spectrum)) for _ in "ab"]
    (mu1, sigma1), (mu2, sigma2) = stats
    frechet_distance(*stats[0], *stats[1])
    fid, seconds = min((timed(frechet_distance, *stats[0], *stats[1]) for _ in range(3)), key=lambda pair: pair[1])
    (root, sqrtm_seconds) = timed(sqrtm, sigma1 @ sigma2)
    textbook = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real)
    pair = [{"mu": mu, "sigma": sigma} for mu, sigma in stats]
    theirs, eig_seconds = timed(fid_statistics_to_metric, *pair, verbose=False)
    apart = abs(fid - theirs["frechet_inception_distance"])
    return rows + [
        f"| distance at 2,048, sqrtm of SciPy {version('scipy')} | {sqrtm_seconds:.2f} s | 1 |",
        f"| distance at 2,048, torch-fidelity ({apart:.1e} from ours) | {eig_seconds:.2f} s "
        f"| {sqrtm_seconds / eig_seconds:.2f} |",
        f"| distance at 2,048, ours ({abs(fid - textbook):.1e} from sqrtm's) | {seconds:.2f} s "
        f"| {sqrtm_seconds / seconds:.2f} |",
    ]


def compare_precisions(real: Path, fake: Path, kept: dict, args: argparse.Namespace) -> list[str]:
    rows = []
    for dims in args.dims:
        exact = kept["bilinear", dims]
        rounded = [our_features(f, dims, "bilinear", args.weights, args.batch_size, "bf16")[0] for f in (fake, real)]
        a, b = our_fid(*(x[: len(y)] for x, y in zip(exact, rounded))), our_fid(*rounded)
        rows.append(f"| {dims} | {a:.4f} | {b:.4f} | {abs(a - b) / a:.1e} |")
    return rows


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("real", type=Path, help="folder of real images")
    add("fake", type=Path, help="folder of others of the same size")
    add("--weights", type=Path, required=True, help="state dict of the network of 2015-12-05")
    add("--num", type=natural(2), default=256, help="images of each folder")
    add("--num-bf16", type=natural(2), default=32, help="images of each folder in bf16")
    add("--num-speed", type=natural(2), default=100, help="images of the speed measurement in fp32")
    add("--dims", type=int, nargs="+", choices=LAST_LAYER, default=list(LAST_LAYER), help="numbers of features")
    add("--rounds", type=natural(1), default=3, help="of the speed measurement, of which the best counts")
    add("--batch-size", type=natural(1), default=16, help="of ours; pytorch-fid has its own default, 50")
    add("--threads", type=natural(1), default=count_cores(), help="of torch")
    add("--hardware", default="unknown hardware", help="a word on it, for the file")
    add("--markdown", type=Path, help="file for the tables")
    return parser.parse_args(argv)


def copy_first(folder: Path, num: int, target: Path) -> Path:
    target.mkdir()
    for i, path in enumerate(find_images(folder)[:num]):
        shutil.copy(path, target / f"{i:06d}{path.suffix}")
    return target


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        names = ("pytorch-fid", "torch-fidelity", "clean-fid", "scipy", "numpy", "torch", "torchvision", "pillow")
        versions = ", ".join(f"{name} {version(name)}" for name in names)
        import cleanfid.fid  # noqa: F401
        import pytorch_fid.fid_score  # noqa: F401
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"error: {error}; run `pip install -r benchmarks/requirements.txt`") from None
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCH_HOME"] = name
        peer_weights = write_peer_weights(args.weights, folder)
        real, fake = copy_first(args.real, args.num, folder / "real"), copy_first(args.fake, args.num, folder / "fake")
        few = [copy_first(side, args.num_bf16, folder / f"few_{side.name}") for side in (real, fake)]
        fids, kept = compare_fids(real, fake, args, peer_weights)
        sets = compare_sets(kept, max(args.dims))
        bf16 = compare_precisions(*few, kept, args)
        counts = f"{len(find_images(real))} real and {len(find_images(fake))} generated images"
        speed = compare_speed(copy_first(real, args.num_speed, folder / "speed"), few[0], args)
    tables = f"""# FID beside the tools of the field

`python benchmarks/fid_agreement.py {" ".join(sys.argv[1:] if argv is None else argv)}`

{counts}, {args.threads} threads on {args.hardware}. {versions}.

"Exact" is the FID of the same features through singular values, without a covariance to round: it tells whose rounding
a difference is. Where n < dims the covariances are rank-deficient, and roots of rounding errors add up.

| dims | resize | tool | features, max. difference | ours | theirs | FID, difference | ours to exact | theirs to exact |
|---|---|---|---|---|---|---|---|---|
{chr(10).join(fids)}

| against torch-fidelity | dims | ours | theirs | difference |
|---|---|---|---|---|
{chr(10).join(sets)}

| fp32 against bf16, n = {args.num_bf16}, dims | fp32 | bf16 | relative difference |
|---|---|---|---|
{chr(10).join(bf16)}

| speed | measured | times |
|---|---|---|
{chr(10).join(speed)}
"""
    print(tables)
    if args.markdown:
        args.markdown.write_text(tables, encoding="utf-8")


if __name__ == "__main__":
    main()
