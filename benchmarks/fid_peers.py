"""Features and distances by pytorch-fid, torch-fidelity, clean-fid and textbook formulas. For fid_agreement.py.

The three packages are imported inside the functions, so that this module also loads without them.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timing import timed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataloader import DataGenerater, find_images, read_batches
from support.inception import LAST_LAYER

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"  # the name under which pytorch-fid looks for its weights
PACKAGES = ("pytorch-fid", "torch-fidelity", "clean-fid", "scipy", "numpy", "torch", "torchvision", "pillow")


def check_peers() -> dict[str, str]:
    """The version of each package. Raises ImportError if one is missing or cannot be imported."""
    import cleanfid.fid  # noqa: F401
    import pytorch_fid.fid_score  # noqa: F401
    import torch_fidelity  # noqa: F401

    return {name: version(name) for name in PACKAGES}


def write_peer_weights(weights: Path, folder: Path) -> Path:
    """Writes the state dict in the form that pytorch-fid and torch-fidelity load: float32, with every key.

    FID does not use `fc`. Zeros replace it if `weights` has no `fc`.
    """
    state = torch.load(weights, map_location="cpu", weights_only=True)
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = folder / "hub" / "checkpoints" / WEIGHTS_NAME
    path.parent.mkdir(parents=True)
    torch.save({"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)} | state, path)
    return path


# ---------------------------------------------------------------------------------------------- features


def pytorch_fid_features(folder: Path, dims: int, batch_size: int = 50, workers: int = 0) -> tuple:
    """(features (N,dims), seconds per image) by pytorch-fid. The default batch size is that of its command."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    net, files = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]]), find_images(folder)
    get_activations(files[:2], net, 2, dims, "cpu", 0)  # warm-up
    features, seconds = timed(get_activations, files, net, batch_size, dims, "cpu", workers)
    return torch.from_numpy(features), seconds / len(files)


@torch.no_grad()
def torch_fidelity_features(folder: Path, weights: Path, batch_size: int) -> dict[int, torch.Tensor]:
    """Features (N,dims) by number of dims, by torch-fidelity, from one run over the images."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = [str(dims) for dims in LAST_LAYER]
    net = FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=str(weights))
    dataset = DataGenerater(folder, image_size=None)
    parts = [net(batch) for batch in read_batches(dataset, range(len(dataset)), batch_size)]
    return {dims: torch.cat([part[i] for part in parts]) for i, dims in enumerate(LAST_LAYER)}


@torch.no_grad()
def clean_fid_features(folder: Path, batch_size: int) -> dict[int, torch.Tensor]:
    """Features (N,dims) by number of dims: the resize of clean-fid, then the network of pytorch-fid."""
    from cleanfid.resize import build_resizer
    from pytorch_fid.inception import InceptionV3

    net, resize = InceptionV3([0, 1, 2, 3], resize_input=False, normalize_input=False).eval(), build_resizer("clean")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in find_images(folder)]
    parts = []
    for start in range(0, len(images), batch_size):
        x = np.stack([resize(image) for image in images[start : start + batch_size]])
        x = (torch.from_numpy(x).permute(0, 3, 1, 2) - 128) / 128  # the scaling in clean-fid's own wrapper
        parts.append([block.mean((2, 3)) for block in net(x)])
    return {dims: torch.cat([part[i] for part in parts]) for i, dims in enumerate(LAST_LAYER)}


# ---------------------------------------------------------------------------------------------- metrics of features


def mean_and_covariance(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of pytorch-fid: NumPy's mean and covariance, float64."""
    features = features.double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


def pytorch_fid_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from pytorch_fid.fid_score import calculate_frechet_distance

    return float(calculate_frechet_distance(*mean_and_covariance(a), *mean_and_covariance(b)))


def clean_fid_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from cleanfid.fid import fid_from_feats

    return float(fid_from_feats(a.numpy(), b.numpy()))


def torch_fidelity_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    stats = (fid_features_to_statistics(x) for x in (a, b))
    return fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]


def torch_fidelity_set_metrics(fake: torch.Tensor, real: torch.Tensor, subset_size: int) -> dict[str, float]:
    """kid, kid_std, precision and recall by torch-fidelity."""
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    metrics = kid_features_to_metric(fake, real, kid_subset_size=subset_size, verbose=False)
    metrics |= prc_features_to_metric(fake, real, verbose=False)
    kid = {"kid": metrics["kernel_inception_distance_mean"], "kid_std": metrics["kernel_inception_distance_std"]}
    return kid | {"precision": metrics["precision"], "recall": metrics["recall"]}


def exact_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    """FID of features without a covariance, which avoids its rounding errors; a root amplifies them where n < dims.

    With S1 = A^T A and S2 = B^T B, tr (S1 S2)^(1/2) is the sum of the singular values of A B^T.
    """
    a, b = a.double(), b.double()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def sqrtm_distance(stats1: tuple, stats2: tuple) -> tuple[float, float]:
    """(FID, seconds of scipy.linalg.sqrtm) of two (mean, covariance) pairs, by the textbook formula."""
    from scipy.linalg import sqrtm

    (mu1, sigma1), (mu2, sigma2) = stats1, stats2
    root, seconds = timed(sqrtm, sigma1 @ sigma2)
    fid = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real)
    return float(fid), seconds


def torch_fidelity_distance(stats1: tuple, stats2: tuple) -> tuple[float, float]:
    """(FID, seconds) of two (mean, covariance) pairs, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    pair = [{"mu": mu, "sigma": sigma} for mu, sigma in (stats1, stats2)]
    metric, seconds = timed(fid_statistics_to_metric, *pair, verbose=False)
    return metric["frechet_inception_distance"], seconds
