"""FID, KID, precision and recall of known distributions: support/metrics.py."""

import numpy as np
import pytest
import torch
from helpers import fid

import support.metrics
from support.metrics import (
    fid_at_infinity,
    frechet_distance,
    kernel_distance,
    mean_and_covariance,
    nearest,
    precision_and_recall,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_fid_equals_closed_forms(rng):
    x = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20))
    shift = rng.normal(size=20)
    sigma = np.cov(x, rowvar=False)
    assert fid(x, x) == pytest.approx(0, abs=1e-8)
    assert fid(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    mu = x.mean(0)
    # tr(S + 4S - 2 (4 S S)^(1/2)) = tr(S), since S commutes with itself
    assert frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-9)
    a, b = rng.uniform(1, 5, 20), rng.uniform(1, 5, 20)
    diagonal = ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(diagonal, rel=1e-9)


def test_fid_equals_the_formula_with_the_matrix_square_root(rng):
    from scipy.linalg import sqrtm

    (mu1, s1), (mu2, s2) = (
        mean_and_covariance(torch.from_numpy(rng.normal(centre, 2, size=(n, 30)))) for centre, n in ((0, 400), (1, 300))
    )
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def exact(a, b):
    """FID without covariances: the trace of the square root of (A^T A)(B^T B) is the sum of A B^T's singular values."""
    mu, (a0, b0) = a.mean(0) - b.mean(0), ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))
    return (mu**2).sum() + (a0**2).sum() + (b0**2).sum() - 2 * np.linalg.svd(a0 @ b0.T, compute_uv=False).sum()


@pytest.mark.parametrize("n, other", [(10, 12), (100, 300), (300, 100), (2, 2)])
def test_rank_deficient_sets(rng, n, other):
    a, b = rng.normal(size=(n, 256)), rng.normal(0.1, 2, size=(other, 256))
    assert fid(a, b) == pytest.approx(exact(a, b), rel=1e-6) == fid(b, a)
    assert 0 <= fid(a, a) < 1e-4


def test_sets_of_one_color(rng):
    flat = np.full((5, 64), 3.0)
    assert fid(flat, flat) == 0
    assert fid(flat, flat + 1) == pytest.approx(64)
    faces = rng.normal(size=(200, 64))
    assert fid(flat, faces) == pytest.approx(exact(flat, faces)) == fid(faces, flat)


def test_fid_is_never_negative(rng):
    for _ in range(20):
        x = rng.normal(1000, 1, size=(60, 32)).astype(np.float32)
        assert 0 <= fid(x, x[rng.permutation(60)]) < 1e-6


def test_nan_and_too_few_images_are_refused_with_the_reason():
    with pytest.raises(ValueError, match="NaN"):
        fid(np.full((4, 3), np.nan), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="1 images"):
        mean_and_covariance(torch.zeros(1, 3))


def test_statistics_do_not_depend_on_blocks_or_order(rng, monkeypatch):
    x = rng.normal(5, 1, size=(700, 16)).astype(np.float32)
    mu, sigma = mean_and_covariance(torch.from_numpy(x))
    np.testing.assert_allclose(mu, x.astype(float).mean(0), atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(float), rowvar=False), atol=1e-12)
    for rows, order in ((1, 1), (64, 1), (700, 1), (100, -1)):
        monkeypatch.setattr(support.metrics, "ROWS", rows)
        again = mean_and_covariance(torch.from_numpy(x[::order].copy()))
        assert abs(again[0] - mu).max() < 1e-10 and abs(again[1] - sigma).max() < 1e-10


def test_a_million_nearly_equal_features(rng):
    """Near 1000, float32 has a resolution of 6e-5: float32 or uncentered sums of squares lose the covariance."""
    x = (1000 + rng.normal(0, 1e-2, size=(1_000_000, 4))).astype(np.float32)
    mu, sigma = mean_and_covariance(torch.from_numpy(x))
    np.testing.assert_allclose(sigma, np.cov(x.astype(float), rowvar=False), rtol=1e-6, atol=1e-12)


def test_kid_is_the_unbiased_estimate(rng):
    """The double sum gives the same estimate. One subset that holds all images has no deviation."""
    x, y = rng.normal(size=(12, 5)), rng.normal(0.5, 1, size=(12, 5))
    k = {}
    for name, a, b in (("xx", x, x), ("yy", y, y), ("xy", x, y)):
        k[name] = np.array([[(p @ q / 5 + 1) ** 3 for q in b] for p in a])
    apart = ~np.eye(12, dtype=bool)
    expected = k["xx"][apart].mean() + k["yy"][apart].mean() - 2 * k["xy"].mean()
    mean, deviation = kernel_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert mean == pytest.approx(expected, rel=1e-9) and deviation is None
    near = kernel_distance(*(torch.from_numpy(rng.normal(size=(400, 5))) for _ in "ab"), size=100)
    assert abs(near[0]) < 3 * near[1] / 10 + 0.05 and near[1] > 0


def test_precision_and_recall(rng, monkeypatch):
    real = torch.arange(20.0)[:, None]  # on a line: the third neighbour is at distance 2 or 3
    assert precision_and_recall(real, real) == (1, 1)
    assert precision_and_recall(real + 1000, real) == (0, 0)
    collapsed = torch.full((20, 1), 10.0)  # one face 20 times: full precision, low recall
    assert precision_and_recall(collapsed, real) == (1, 1 / 20)
    half = torch.cat([real[:10], real[:10] + 1000])
    precision, recall = precision_and_recall(half, real)
    assert precision == 0.5 and recall >= 0.5
    a, b = (torch.from_numpy(rng.normal(0, scale, size=(50, 8))) for scale in (1, 1.5))
    distances, within = np.array([[(p - q).norm() for q in b] for p in a]), []
    for x, table in ((b, distances), (a, distances.T)):
        radius = np.sort([[(p - q).norm() for q in x] for p in x])[:, 3]
        within.append((table <= radius).any(1).mean())
    monkeypatch.setattr(support.metrics, "ROWS", 7)
    assert precision_and_recall(a, b) == pytest.approx(tuple(within))


def test_extrapolation_to_infinity_removes_the_bias_of_small_sets(rng):
    a = rng.normal(size=(64, 64)) * np.geomspace(1, 0.05, 64)
    sigma, mu = a.T @ a / 64, np.zeros(64)
    root = np.linalg.cholesky(sigma)
    plain, extrapolated = [], []
    for seed in range(4):
        fake = torch.from_numpy(rng.normal(size=(1000, 64)) @ root.T)
        plain.append(frechet_distance(mu, sigma, *mean_and_covariance(fake)))
        extrapolated.append(fid_at_infinity(fake, mu, sigma, seed=seed))
    assert abs(np.mean(extrapolated)) < np.mean(plain) / 5
    with pytest.raises(ValueError, match="127 images are too few .* 128 are needed"):
        fid_at_infinity(fake[:127], mu, sigma)


def test_nearest_neighbours():
    others = torch.tensor([[0.0], [10.0], [3.0], [4.0]])
    assert nearest(torch.tensor([[3.4], [-5.0]]), others, 3).tolist() == [[2, 3, 0], [0, 2, 3]]
    assert nearest(torch.tensor([[3.4]]), others, 9).shape == (1, 4)
