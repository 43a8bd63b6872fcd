"""Statistics of real and of generated images -> the result of evaluate.py, in numbers, words and a picture.

    result = compare(real, [fake], False, device)           # statistics as in support/feature_stats.py
    print(report(metadata | result))
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from support import metrics
from support.colour import compare_colour
from support.feature_stats import choose
from support.files import atomic_write, git_commit, hash_file
from support.images import image_grid, save_image


def compare(real: dict, fakes: list[dict], infinity: bool, device: torch.device) -> dict:
    """FID, KID, precision and recall of generated against real images. FID is the mean over `fakes`, if several.

    KID, precision and recall are computed on `device`, which needs float64.
    """
    fids = [metrics.frechet_distance(real["mu"], real["sigma"], fake["mu"], fake["sigma"]) for fake in fakes]
    result = {"fid": float(np.mean(fids)), "n_real": real.get("n"), "n_fake": fakes[0].get("n")}
    if len(fids) > 1:
        half = scipy.stats.t.ppf(0.975, len(fids) - 1) * np.std(fids, ddof=1) / len(fids) ** 0.5
        result |= {"fids": fids, "n_repeats": len(fids), "fid_95": [result["fid"] - half, result["fid"] + half]}
    features = [stats["features"].to(device) for stats in (fakes[0], real) if "features" in stats]
    if infinity:
        result["fid_infinity"] = metrics.fid_at_infinity(features[0], real["mu"], real["sigma"])
    if len(features) == 2:
        result["kid"], result["kid_std"] = metrics.kernel_distance(*features)
        result["precision"], result["recall"] = metrics.precision_and_recall(*features)
    if "colour" in real and "colour" in fakes[0]:
        result["colour"] = compare_colour(real["colour"], fakes[0]["colour"])
    return result


def compare_training_images(real: dict, train: dict, n: int) -> dict:
    """The FID of `n` real training images, or of all there are, against the real side."""
    some = train["features"][choose(train["n"], min(n, train["n"]))]
    fid = metrics.frechet_distance(real["mu"], real["sigma"], *metrics.mean_and_covariance(some))
    return {"floor": fid, "n_floor": len(some)}


def warn(n_real: int | None, n_fake: int | None, dims: int) -> None:
    """Warn about numbers of images that bias FID. They are None where a file of statistics does not say them."""
    for side, n in (("real", n_real), ("generated", n_fake)):
        if n and n < dims:
            print(
                f"warning: {n:,} {side} images are fewer than the {dims:,} dims: their covariance is rank-deficient, "
                "and FID is biased upwards; compare it only with one of equal numbers",
                file=sys.stderr,
            )
    if n_real and n_fake and max(n_real, n_fake) > 1.25 * min(n_real, n_fake):
        message = f"{n_real:,} real and {n_fake:,} generated images: their biases differ; set --num"
        print(f"warning: {message}", file=sys.stderr)


def report(result: dict) -> str:
    """The result in words, with everything known that it depends on. The last line is the FID."""
    known = {field: value for field, value in result.items() if value is not None}
    name = "FID" if result["dims"] == 2048 else f"FID-{result['dims']}"
    n_real = f"{known['n_real']:,} real" if "n_real" in known else "real"
    n_fake = f"{known['n_fake']:,} generated" if "n_fake" in known else "generated"
    sides = [f"{result['real']}: {n_real} images", f"{result['fake']}: {n_fake} images"]
    if "resolution" in known:
        sides.append(f"both {result['resolution']}x{result['resolution']}")
    network = [known["network"]] if "network" in known else []
    network.append(f"{result['dims']} features")
    others = {"resize": "resize {}", "dtype": "{}", "weights_sha256": "weights of SHA-256 {:.16}..."}
    measurement = network + [text.format(known[field]) for field, text in others.items() if field in known]
    lines = ["; ".join(sides), ", ".join(measurement)]
    if "fid_95" in known:
        low, high = result["fid_95"]
        draws = f"mean of {result['n_repeats']} draws, 95 % interval {low:.4f} to {high:.4f}"
        lines.append(f"{name} {result['fid']:.4f}: {draws}")
    if "fid_infinity" in known:
        lines.append(f"{name} {result['fid_infinity']:.4f} extrapolated to infinitely many generated images")
    if "floor" in known:
        images = f"{result['n_floor']:,} real training images, which a perfect generator would reach"
        lines.append(f"{name} {result['floor']:.4f} of {images}")
    if "kid" in known:
        spread = f", standard deviation {result['kid_std']:.6f} over subsets" if "kid_std" in known else ""
        lines.append(f"KID {result['kid']:.6f}{spread}")
        share = f"precision {result['precision']:.4f}, recall {result['recall']:.4f}"
        lines.append(f"improved {share}, in Inception features")
    if "colour" in known:
        ratios = {what: values["ratio"] for what, values in result["colour"].items()}
        shown = (f"{what} {'unknown' if ratio is None else format(ratio, '.2f')}" for what, ratio in ratios.items())
        lines.append(f"colour relative to the real images: {', '.join(shown)} (share of pixels)")
    context = ", ".join([*network, f"{n_real} and {n_fake} images"])  # nobody quotes the number without it
    return "\n".join([*lines, f"Fréchet Inception Distance (FID): {result['fid']:.4f} ({context})"])


def draw_neighbours(fakes: Tensor, features: Tensor, train_features: Tensor, train: Sequence, path: Path) -> None:
    """A picture with a row for each of `fakes`: the fake and the 7 images of `train` nearest to it in feature space."""
    rows = []
    for fake, indices in zip(fakes, metrics.nearest(features[: len(fakes)], train_features, 7)):
        rows.append(torch.cat([fake[None], train.__getitems__(indices.tolist())]))
    save_image(image_grid(torch.cat(rows), columns=len(rows[0])), path)


def save_result(result: dict, args: argparse.Namespace) -> None:
    """Write the result, versions, flags, commit and the SHA-256 of --params to the file --json. Raises UserError."""
    result = result | {"git_commit": git_commit()}
    if args.params:
        result["params_sha256"] = hash_file(args.params)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    with atomic_write(args.json) as file:
        file.write(json.dumps(result | {"versions": versions, "flags": flags}, indent=2).encode())
