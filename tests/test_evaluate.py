import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.models.inception import Inception3

import evaluate
import inception
import network

REAL_WEIGHTS = ROOT.parent / "shared" / "weights" / "inception_2015-12-05_half.pth"


def moments(features, chunk=100):
    result = evaluate.Moments()
    for start in range(0, len(features), chunk):
        result.add(torch.as_tensor(features[start : start + chunk]))
    return result.mean_and_covariance()


def fid(a, b):
    return evaluate.frechet_distance(*moments(a), *moments(b))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_closed_forms(rng):
    x = rng.normal(size=(500, 20)) @ rng.normal(size=(20, 20))
    shift = rng.normal(size=20)
    sigma = np.cov(x, rowvar=False)
    assert fid(x, x) == pytest.approx(0, abs=1e-8)
    assert fid(x, x + shift) == pytest.approx((shift**2).sum(), rel=1e-9)
    mu = x.mean(0)
    # tr(S + 4S - 2 (4 S S)^(1/2)) = tr(S), since S commutes with itself
    assert evaluate.frechet_distance(mu, sigma, mu, 4 * sigma) == pytest.approx(np.trace(sigma), rel=1e-9)
    a, b = rng.uniform(1, 5, 20), rng.uniform(1, 5, 20)
    diagonal = ((a**0.5 - b**0.5) ** 2).sum()
    assert evaluate.frechet_distance(mu, np.diag(a), mu, np.diag(b)) == pytest.approx(diagonal, rel=1e-9)


def test_against_the_textbook_square_root(rng):
    from scipy.linalg import sqrtm

    (mu1, s1), (mu2, s2) = moments(rng.normal(size=(400, 30))), moments(rng.normal(1, 2, size=(300, 30)))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * sqrtm(s1 @ s2).real)
    assert evaluate.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def test_rank_deficient_and_constant_sets(rng):
    few, other = rng.normal(size=(10, 64)), rng.normal(size=(12, 64))
    assert fid(few, few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(fid(few, other)) and fid(few, other) == pytest.approx(fid(other, few), rel=1e-9)
    flat = np.full((5, 64), 3.0)
    assert fid(flat, flat) == 0
    assert fid(flat, flat + 1) == pytest.approx(64)


def test_nan_is_an_error_that_says_why():
    with pytest.raises(SystemExit, match="NaN"):
        fid(np.full((4, 3), np.nan), np.zeros((4, 3)))


def test_statistics_do_not_depend_on_chunks_or_order(rng):
    x = rng.normal(5, 1, size=(700, 16)).astype(np.float32)
    mu, sigma = moments(x)
    np.testing.assert_allclose(mu, x.astype(float).mean(0), atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x.astype(float), rowvar=False), atol=1e-12)
    for chunk, rows in ((1, x), (64, x), (700, x), (100, x[::-1].copy())):
        again = moments(rows, chunk)
        assert abs(again[0] - mu).max() < 1e-10 and abs(again[1] - sigma).max() < 1e-10


def test_a_million_nearly_equal_features(rng):
    """Around 1000 a float32 has steps of 6e-5: sums of squares in float32, or not centred, lose all of it."""
    x = (1000 + rng.normal(0, 1e-2, size=(1_000_000, 4))).astype(np.float32)
    mu, sigma = moments(x, 50_000)
    np.testing.assert_allclose(sigma, np.cov(x.astype(float), rowvar=False), rtol=1e-6, atol=1e-12)


# ---------------------------------------------------------------------------------------------- the network


def random_inception(tf2015):
    """A state dict with the names and shapes of the real files, and features that vary."""
    torch.manual_seed(0)
    net = Inception3(aux_logits=not tf2015, init_weights=False, num_classes=1008 if tf2015 else 1000)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.02, 0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception(tf2015=True).state_dict(), path)
    return path


def test_torchvision_features_are_those_before_the_last_layer(tmp_path):
    net = random_inception(tf2015=False)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    features, facts = inception.load_inception("torchvision", 2048, tmp_path / "w.pth")
    net.fc = net.dropout = nn.Identity()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = nn.functional.interpolate(images / 255, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = net(2 * x - 1)
    assert torch.allclose(features(images), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
    assert facts["network"] == "torchvision" and len(facts["weights_sha256"]) == 64


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_dims(weights, dims):
    features, _ = inception.load_inception("tf2015", dims, weights)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    out = features(images)
    assert out.shape == (2, dims) and out.dtype == torch.float32
    assert torch.allclose(features(images[1:]), out[1:], rtol=1e-3, atol=1e-4 * out.abs().max())


def test_tensorflow_pooling(weights):
    """Padding counts in torchvision's averages and not in those of 2015, whose last block takes the maximum."""
    blocks = {}
    for name in ("torchvision", "tf2015"):
        features, _ = inception.load_inception(name, 2048, weights)
        blocks[name] = features.layers
    x = torch.rand(1, 192, 9, 9)
    with torch.no_grad():
        plain, patched = (blocks[name].Mixed_5b.branch_pool.conv for name in ("torchvision", "tf2015"))
        out = blocks["tf2015"].Mixed_5b(x)[:, -32:]
        valid = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        assert torch.allclose(out, patched(valid).relu(), atol=1e-5)
        padded = nn.functional.avg_pool2d(x, 3, 1, 1)
        assert torch.allclose(blocks["torchvision"].Mixed_5b(x)[:, -32:], plain(padded).relu(), atol=1e-5)
        y = torch.rand(1, 2048, 4, 4)
        out = blocks["tf2015"].Mixed_7c(y)[:, -192:]
        largest = nn.functional.max_pool2d(y, 3, 1, 1)
        assert torch.allclose(out, blocks["tf2015"].Mixed_7c.branch_pool.conv(largest).relu(), atol=1e-4)


@pytest.mark.skipif(not REAL_WEIGHTS.exists(), reason="the real Inception weights are not beside the repository")
def test_real_weights_tell_faces_from_noise(dataroot):
    features, _ = inception.load_inception("tf2015", 192, REAL_WEIGHTS)
    faces = evaluate.DataGenerater(dataroot / "64" / "train", None).__getitems__(range(24))
    noise = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    near, far = (fid(features(faces[:12]), features(other)) for other in (faces[12:], noise))
    assert near < far / 10


def test_weights_that_are_no_inception(tmp_path, weights):
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.pth")
    with pytest.raises(SystemExit, match="g.pth does not hold the weights of Inception"):
        inception.load_inception("tf2015", 64, tmp_path / "g.pth")
    (tmp_path / "x-6726825d.pth").write_bytes(weights.read_bytes())
    with pytest.raises(SystemExit, match="not what its name says"):
        inception.load_inception("tf2015", 64, tmp_path / "x-6726825d.pth")
    (tmp_path / "half.pth").write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(SystemExit, match="damaged"):
        inception.load_inception("tf2015", 64, tmp_path / "half.pth")


def test_download_is_hashed_and_its_failure_explained(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    digest = inception.hash_file(weights)
    served = tmp_path / f"inception-{digest[:8]}.pth"
    served.write_bytes(weights.read_bytes())
    monkeypatch.setitem(inception.URLS, "tf2015", served.as_uri())
    path = inception.find_weights("tf2015")
    assert path.parent == tmp_path / "hub" / "checkpoints" and inception.hash_file(path) == digest
    for name in ("missing-00000000.pth", "wrong-00000000.pth"):
        (tmp_path / "wrong-00000000.pth").write_bytes(b"something else")
        monkeypatch.setitem(inception.URLS, "tf2015", (tmp_path / name).as_uri())
        with pytest.raises(SystemExit, match=f"{name}.*SHA-256 begins 00000000.*--weights"):
            inception.find_weights("tf2015")
        assert not (tmp_path / "hub" / "checkpoints" / name).exists()


# ---------------------------------------------------------------------------------------------- the script


@pytest.fixture
def run(dataroot, weights, capsys, tmp_path):
    def evaluate_small(*flags):
        evaluate.main(["--weights", str(weights), "--dims", "64", "--inception", "tf2015", "--dataroot", str(dataroot)]
                      + [str(flag) for flag in flags])
        return capsys.readouterr()

    return evaluate_small


def test_folders_cache_json_and_interchange(run, dataroot, tmp_path, monkeypatch):
    folder = dataroot / "64" / "train"
    out = run("--images", folder, "--real", dataroot / "64" / "test", "--json", tmp_path / "r.json",
              "--save-stats", tmp_path / "s.npz")
    last = out.out.splitlines()[-1]
    result = json.loads((tmp_path / "r.json").read_text())
    assert last == f"Fréchet Inception Distance (FID): {result['fid']:.4f}" and result["fid"] > 0
    assert result["n_fake"] == len(list(folder.iterdir())) and "fewer than 2,048" in out.err
    monkeypatch.setattr(evaluate, "measure", None)  # nothing is measured a second time
    assert run("--images", folder, "--real", tmp_path / "s.npz").out.splitlines()[-1] == last
    with np.load(tmp_path / "s.npz") as stats:  # as pytorch-fid writes it: mu and sigma alone
        np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    assert run("--images", folder, "--real", tmp_path / "bare.npz").out.splitlines()[-1] == last


def test_params_are_evaluated_without_files(run, dataroot, tmp_path):
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    out = run("--params", tmp_path / "g.params", "--num", 6).out
    assert "n_fake 6" in out and "resolution 64" in out


def test_incomparable_statistics_are_refused(run, dataroot, tmp_path):
    with pytest.raises(SystemExit, match="resolution is 128"):
        run("--images", dataroot / "64" / "train", "--real", dataroot / "128" / "test")
    np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), resize="clean")
    with pytest.raises(SystemExit, match="resize is clean"):
        run("--images", dataroot / "64" / "train", "--real", tmp_path / "other.npz")


@pytest.mark.parametrize("flags, words", [
    (("--params", "nowhere"), ["nowhere", "train.py"]),
    (("--images", "empty"), ["empty", "no images"]),
    (("--images", "one", "--real", "one"), ["1 images"]),
    (("--images", "one", "--real", "no.npz"), ["no.npz"]),
    (("--images", "one", "--real", "bad.npz"), ["bad.npz", "mu and sigma"]),
    (("--images", "one", "--weights", "nowhere"), ["--weights nowhere"]),
    (("--images", "one", "--json", "bad.npz"), ["bad.npz exists"]),
])
def test_bad_input(run_script, refused, weights, tmp_path, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "bad.npz").write_text("no archive")
    Image.new("RGB", (64, 64)).save(tmp_path / "one" / "a.png")
    chosen = ("--inception", "tf2015", "--dims", "64", "--weights", weights)
    refused(run_script("evaluate.py", *chosen, *flags), *words)


def test_offline_without_weights(run_script, refused, tmp_path):
    """TORCH_HOME is an empty folder, and the network is out of reach."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    Path(tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    code = "import sys, socket, evaluate\ndef no(*_, **__): raise OSError('offline')\nsocket.create_connection = no\n"
    (tmp_path / "offline.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
                                         "evaluate.main(['--images', 'images', '--real', 'images'])\n")
    refused(run_script(tmp_path / "offline.py"), "inception_v3_google-0cc3c7bd.pth", "104 MB", "--weights")
