"""Features (N,D) of two sets of images -> how far apart the sets are: FID, KID, precision and recall.

    from metrics import Moments, frechet_distance
    fid = frechet_distance(*Moments().add(real).mean_and_covariance(), *Moments().add(fake).mean_and_covariance())

Everything here is a function of numbers alone: it knows no files, no images and no network.
"""

import numpy as np
import scipy.linalg
import torch

ROWS = 1024  # of a matrix of distances that are held at a time


class Moments:
    """Count, mean and covariance, in float64, of features (N,D) that come in chunks of any size, in any order."""

    def __init__(self):
        self.n, self.shift = 0, None

    def add(self, features: torch.Tensor) -> "Moments":
        # On the CPU: MPS has no float64. Less the first row: sums of squares of nearly equal numbers cancel badly.
        features = features.cpu().double()
        if self.shift is None:
            self.shift = features[0].clone()
            self.sum = torch.zeros_like(self.shift)
            self.outer = self.shift.new_zeros(len(self.shift), len(self.shift))
        features = features - self.shift
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)
        return self

    def merge(self, other: "Moments") -> "Moments":
        """This with what `other` has seen: its sums, as if they had been taken around this shift."""
        if other.n == 0 or self.n == 0:
            return self if other.n == 0 else other
        delta = other.shift - self.shift
        cross = torch.outer(other.sum, delta)
        self.n += other.n
        self.sum += other.sum + other.n * delta
        self.outer += other.outer + cross + cross.T + other.n * torch.outer(delta, delta)
        return self

    def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
        """(D,) and (D,D), unbiased. Raises SystemExit for fewer than two images."""
        if self.n < 2:
            raise SystemExit(f"error: {self.n} images have no covariance; give 2 or more, and 2,048 for a FID to quote")
        covariance = (self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)
        return (self.shift + self.sum / self.n).numpy(), covariance.numpy()


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Fréchet distance between two normal distributions, never negative (Dowson and Landau, 1982).

    |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). With S1 = F F^T the last trace is the sum of the roots of the
    eigenvalues of F^T S2 F, which is symmetric: nothing can become complex, also where a covariance is singular.
    Raises SystemExit for NaN or infinite input.
    """
    for array in (mu1, sigma1, mu2, sigma2):
        if not np.isfinite(array).all():
            raise SystemExit("error: the features hold NaN or infinite values; check the images and --weights")
    values, vectors = scipy.linalg.eigh(sigma1, driver="evd", check_finite=False)  # values rise
    # Directions without variance add nothing but the rounding of their neighbours, of which the root makes a lot.
    start = np.searchsorted(values, len(values) * np.finfo(np.float64).eps * max(values[-1], 0), side="right")
    factor = vectors[:, start:] * np.sqrt(values[start:])
    inner = factor.T @ sigma2 @ factor  # of which eigvalsh reads one triangle: symmetric to the last bit
    trace = np.sqrt(scipy.linalg.eigvalsh(inner, driver="evd", check_finite=False).clip(0)).sum() if factor.size else 0
    distance = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace
    return max(float(distance), 0.0)


def fid_at_infinity(fake: torch.Tensor, mu: np.ndarray, sigma: np.ndarray, points: int = 15, seed: int = 0) -> float:
    """The FID that infinitely many fakes would have against the real (mu, sigma).

    A line through the FIDs of random subsets of `fake` (N,D) over 1/n, read at 0 (Chong and Forsyth, "Effectively
    Unbiased FID and Inception Score and Where to Find Them", 2020). Raises SystemExit where N is too small for that:
    below n = D, where covariances are rank-deficient, the bias is no line in 1/n.
    """
    n, dims = fake.shape
    if n < 2 * dims:
        raise SystemExit(f"error: --infinity needs {2 * dims:,} generated images at --dims {dims}, not {n:,}")
    sizes = np.linspace(max(n // 10, dims), n, points).astype(int)
    rng, fids = np.random.default_rng(seed), []
    for size in sizes:
        moments = Moments().add(fake[torch.from_numpy(rng.permutation(n)[:size])])
        fids.append(frechet_distance(mu, sigma, *moments.mean_and_covariance()))
    return float(np.polyfit(1 / sizes, fids, 1)[1])


def kernel_distance(fake: torch.Tensor, real: torch.Tensor, subsets: int = 100, size: int = 1000) -> tuple:
    """KID: (mean, standard deviation) over random subsets of the unbiased squared MMD with kernel (x.y/D + 1)^3.

    Binkowski et al., "Demystifying MMD GANs", 2018. The subsets are those of torch-fidelity, so that its numbers can
    be had again; sets smaller than `size` take part whole.
    """
    size = min(size, len(fake), len(real))
    rng, distances = np.random.RandomState(2020), []
    for _ in range(subsets):
        x, y = (part[torch.from_numpy(rng.choice(len(part), size, replace=False))] for part in (fake, real))
        # Products in float32, which rounds at random; their cubes and sums, nearly equal, in float64.
        kxx, kyy, kxy = (((a @ b.T).double() / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()
        distances.append(float(within / (size * (size - 1)) - 2 * kxy.sum() / size**2))
    return float(np.mean(distances)), float(np.std(distances))


def precision_and_recall(fake: torch.Tensor, real: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Share of fakes within the real set, and of real images within the fake set.

    Within: not farther from some member of the set than that is from its own `k`-th neighbour (Kynkäänniemi et al.,
    "Improved Precision and Recall Metric for Assessing Generative Models", 2019; there on VGG-16 features).
    """

    def radii(x: torch.Tensor) -> torch.Tensor:  # the nearest to each is itself
        rank = min(k, len(x) - 1) + 1
        return torch.cat([torch.cdist(rows, x).kthvalue(rank).values for rows in x.split(ROWS)])

    def share_within(x: torch.Tensor, others: torch.Tensor) -> float:
        reach = radii(others)
        within = [(torch.cdist(rows, others) <= reach).any(1) for rows in x.split(ROWS)]
        return torch.cat(within).double().mean().item()

    return share_within(fake, real), share_within(real, fake)


def nearest(x: torch.Tensor, others: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (N,k) of the `k` members of `others` (M,D) that are nearest to each of `x` (N,D)."""
    return torch.cdist(x, others).topk(min(k, len(others)), largest=False).indices
