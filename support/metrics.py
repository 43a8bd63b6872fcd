"""Features (N,D) of two sets of images -> distances between the sets: FID, KID, precision and recall.

    from support.metrics import frechet_distance, mean_and_covariance
    fid = frechet_distance(*mean_and_covariance(real), *mean_and_covariance(fake))

Nothing here knows files, images or networks. The work is done on the device of the features, which must have float64
(MPS has none). Input that no metric is defined for raises ValueError.
"""

import numpy as np
import scipy.linalg
import torch

ROWS = 1024  # of features or of a distance matrix that are in memory at a time


def mean_and_covariance(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D,D), float64, of features (N,D). Raises ValueError for fewer than two."""
    n = len(features)
    if n < 2:
        raise ValueError(f"{n} images have no covariance")
    # Minus the first row, since sums of squares of nearly equal numbers lose their digits when the squared mean is
    # subtracted.
    shift = features[0].double()
    total, outer = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
    for rows in features.split(ROWS):  # float64 takes twice the memory
        rows = rows.double() - shift
        total += rows.sum(0)
        outer.addmm_(rows.T, rows)
    covariance = (outer - torch.outer(total, total) / n) / (n - 1)
    return (shift + total / n).cpu().numpy(), covariance.cpu().numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Fréchet distance between two normal distributions, never negative (Dowson and Landau, 1982).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S1 = F F^T, tr (S1 S2)^(1/2) is the sum of the square roots of
    the eigenvalues of F^T S2 F. That matrix is symmetric, so nothing becomes complex, even for a singular covariance.
    Raises ValueError for NaN or infinite input.
    """
    for array in (mu1, sigma1, mu2, sigma2):
        if not np.isfinite(array).all():
            raise ValueError("mean or covariance holds NaN or infinite values")
    values, vectors = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)  # values in rising order
    # Directions without variance only add rounding errors of the others, which the square root enlarges.
    start = np.searchsorted(values, len(values) * np.finfo(np.float64).eps * max(values[-1], 0), side="right")
    factor = vectors[:, start:] * np.sqrt(values[start:])
    inner = factor.T @ sigma2 @ factor  # eigvalsh reads one triangle, so rounding cannot make it asymmetric
    trace = np.sqrt(scipy.linalg.eigvalsh(inner, driver="evd", check_finite=False).clip(0)).sum() if factor.size else 0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def fid_at_infinity(fake: torch.Tensor, mu: np.ndarray, sigma: np.ndarray, points: int = 15, seed: int = 0) -> float:
    """The FID that infinitely many fakes would have against the real (mu, sigma).

    A line through the FIDs of random subsets of `fake` (N,D) over 1/n, read at 0 (Chong and Forsyth, "Effectively
    Unbiased FID and Inception Score and Where to Find Them", 2020). Raises ValueError for N < 2D: for subsets of fewer
    than D images, the covariance is rank-deficient and the bias is not linear in 1/n.
    """
    n, dims = fake.shape
    if n < 2 * dims:
        raise ValueError(f"{n:,} images are too few to extrapolate at {dims} dims; {2 * dims:,} are needed")
    sizes = np.linspace(max(n // 10, dims), n, points).astype(int)
    rng, fids = np.random.default_rng(seed), []
    for size in sizes:
        some = fake[torch.from_numpy(rng.permutation(n)[:size])]
        fids.append(frechet_distance(mu, sigma, *mean_and_covariance(some)))
    return float(np.polyfit(1 / sizes, fids, 1)[1])


def kernel_distance(
    fake: torch.Tensor, real: torch.Tensor, subsets: int = 100, size: int = 1000
) -> tuple[float, float | None]:
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD with kernel (x.y/D + 1)^3.

    Binkowski et al., "Demystifying MMD GANs", 2018. The subsets are those of torch-fidelity, so both give the same
    numbers. A set of fewer than `size` images is used whole. Where both sets are, there is one subset, and no standard
    deviation (None).
    """
    size = min(size, len(fake), len(real))
    if size == len(fake) == len(real):
        subsets = 1
    rng, distances = np.random.RandomState(2020), []
    for _ in range(subsets):
        x, y = (part[torch.from_numpy(rng.choice(len(part), size, replace=False))] for part in (fake, real))
        # Products in float32, whose errors average out. Cubes and sums in float64: nearly equal sums are subtracted.
        kxx, kyy, kxy = (((a @ b.T).double() / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()
        distances.append(float(within / (size * (size - 1)) - 2 * kxy.sum() / size**2))
    return float(np.mean(distances)), float(np.std(distances)) if subsets > 1 else None


def precision_and_recall(fake: torch.Tensor, real: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """(precision, recall): the share of fakes within the real set, and of real images within the fake set.

    An image is within a set when one of the set's members is at least as near to it as to that member's own `k`-th
    neighbour (Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019, who
    use VGG-16 features).
    """

    def radii(x: torch.Tensor) -> torch.Tensor:
        rank = min(k, len(x) - 1) + 1  # + 1: the nearest to each image is the image
        return torch.cat([torch.cdist(rows, x).topk(rank, largest=False).values[:, -1] for rows in x.split(ROWS)])

    reach_real, within_real = radii(real), []
    within_fake = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, reach in zip(fake.split(ROWS), radii(fake).split(ROWS)):
        distances = torch.cdist(rows, real)
        within_real.append((distances <= reach_real).any(1))
        within_fake |= (distances <= reach[:, None]).any(0)
    return torch.cat(within_real).double().mean().item(), within_fake.double().mean().item()


def nearest(x: torch.Tensor, others: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (N,k) of the `k` members of `others` (M,D) that are nearest to each of `x` (N,D)."""
    return torch.cdist(x, others).topk(min(k, len(others)), largest=False).indices
