"""The script evaluate.py: FID of images, generators and statistics files."""

import hashlib
import json
import re
import shutil
import socket

import numpy as np
import pytest
import torch
from helpers import PROGRAMS
from PIL import Image

import evaluate
import network
from evaluate import make_scorer
from support import comparison
from support.files import UserError


@pytest.fixture
def generator(tmp_path):
    """A file of random generator weights."""
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    return tmp_path / "g.params"


def spy_on_measurements(monkeypatch):
    """The list that receives the label of each measurement from now on."""
    labels, measure = [], evaluate.measure_features

    def spy(net, batches, total, label):
        labels.append(label)
        return measure(net, batches, total, label)

    monkeypatch.setattr(evaluate, "measure_features", spy)
    return labels


def last_fid(out):
    """The number in the last line."""
    return float(re.search(r"Distance \(FID\): ([\d.]+) ", out.splitlines()[-1])[1])


def test_folders_cache_json_and_statistics_files(run_evaluate, dataroot, tmp_path, monkeypatch):
    train, test = dataroot / "64" / "train", dataroot / "64" / "test"
    outputs = ("--json", tmp_path / "r.json", "--save-stats", tmp_path / "s.npz")
    out = run_evaluate("--images", train, "--real", test, *outputs)
    last = out.out.splitlines()[-1]
    result = json.loads((tmp_path / "r.json").read_text())
    assert last.startswith(f"Fréchet Inception Distance (FID): {result['fid']:.4f} (tf2015, 64 features, ")
    assert result["n_fake"] == len(list(train.iterdir())) and result["floor"] == pytest.approx(result["fid"])
    assert result["resize"] == "tf" and result["dtype"] == "fp32" and result["flags"]["dims"] == 64
    assert {"kid", "precision", "recall", "n_floor", "versions"} <= result.keys()
    assert "fewer than the 64 dims" in out.err and "biases differ" in out.err
    assert "FID-64 " in out.out and "resize tf" in out.out and result["weights_sha256"][:16] in out.out
    labels = spy_on_measurements(monkeypatch)
    assert run_evaluate("--images", train).out == out.out
    assert labels == [str(train)]  # statistics of generated images are not kept
    assert run_evaluate("--images", train, "--real", tmp_path / "s.npz").out.splitlines()[-1] == last
    assert "(FID): 0.0000 (" in run_evaluate("--images", tmp_path / "s.npz", "--real", tmp_path / "s.npz").out
    with np.load(tmp_path / "s.npz") as stats:  # pytorch-fid and TTUR store only mu and sigma
        assert {"n", "resolution", "split", "network", "dims", "resize", "weights_sha256", "version"} <= set(stats)
        assert stats["split"] == "test" and stats["sigma"].dtype == np.float64
        np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    bare = run_evaluate("--images", train, "--real", tmp_path / "bare.npz")
    assert last_fid(bare.out) == last_fid(out.out) and "does not say how it was measured" in bare.err


def test_changed_data_is_measured_again(run_evaluate, dataroot, tmp_path, monkeypatch):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(4):
        Image.effect_noise((64, 64), 50 + i).convert("RGB").save(folder / f"{i}.png")
    flags = ("--real", folder, "--dataroot", tmp_path, "--images", dataroot / "64" / "test", "--no-floor")
    labels = spy_on_measurements(monkeypatch)
    first = run_evaluate(*flags).out
    assert run_evaluate(*flags).out == first and labels.count(str(folder)) == 1
    (folder / "0.png").unlink()
    assert run_evaluate(*flags).out != first and labels.count(str(folder)) == 2
    caches = list((tmp_path / ".statistics").iterdir())
    assert len(caches) == 2  # of the two states of the real images alone
    for cache in caches:
        cache.write_bytes(cache.read_bytes()[:1000])
    again = run_evaluate(*flags)
    assert again.err.count("measured again") == 1
    for resize in ("bilinear", "clean"):
        assert run_evaluate(*flags, "--resize", resize).out.splitlines()[-1] != again.out.splitlines()[-1]


def test_a_generator_is_evaluated_without_files_of_faces(run_evaluate, generator, tmp_path):
    flags = ("--params", generator, "--num", 6, "--no-floor")
    out = run_evaluate(*flags).out
    assert "6 generated" in out and "64x64" in out and "training images" not in out
    for size in (1, 4):
        batched = run_evaluate(*flags, "--batch-size", size).out
        assert abs(last_fid(batched) - last_fid(out)) < 2e-3
    assert run_evaluate(*flags, "--seed", 1).out != out


def test_the_valid_split_is_measured_with_as_many_images_as_faces(run_evaluate, generator, dataroot, tmp_path):
    """The numbers that choose between trainings do not see the test images."""
    shutil.copytree(dataroot / "64", tmp_path / "64", ignore=shutil.ignore_patterns("test"))
    for path in sorted((tmp_path / "64" / "train").iterdir())[:9]:
        path.rename(tmp_path / "64" / "valid" / path.name)
    flags = ("--params", generator, "--dataroot", tmp_path, "--split", "valid", "--no-floor")
    assert "64/valid: 7 real images" in run_evaluate(*flags, "--num", 7).out
    assert "64/valid: 9 real images" in run_evaluate(*flags).out


def test_a_training_is_measured_on_valid_where_it_has_enough_images(dataroot, tmp_path, weights, capsys):
    for split, count in (("train", 9), ("valid", 6), ("test", 8)):
        (tmp_path / "64" / split).mkdir(parents=True)
        for path in sorted((dataroot / "64" / "train").iterdir())[:count]:
            shutil.copy(path, tmp_path / "64" / split)
    flags = ["--dataroot", str(tmp_path), "--inception", "tf2015", "--weights", str(weights)]
    for num, split, is_note in ((6, "valid", False), (7, "test", True)):
        make_scorer([*flags, "--num", str(num)], 64, torch.device("cpu"))
        printed = capsys.readouterr()
        assert f"{num} faces and {num} images of {tmp_path / '64' / split}, 768 features" in printed.out
        assert ("note: " in printed.err) == is_note and "fewer than the 768 dims" in printed.err
    make_scorer([*flags, "--num", "8", "--split", "test", "--dims", "64"], 64, torch.device("cpu"))
    assert "note: " not in capsys.readouterr().err


def test_distances_are_computed_without_tf32(run_evaluate, dataroot, monkeypatch, tf32):
    """KID, precision and recall come from matrix products."""
    seen = []

    def spy(*inputs):
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return comparison.compare(*inputs)

    monkeypatch.setattr(evaluate, "compare", spy)
    run_evaluate("--images", dataroot / "64" / "train", "--num", 9, "--no-floor")
    assert seen == [False]


def test_the_result_names_the_commit_and_the_parameters(run_evaluate, generator, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "git_commit", lambda: "0123abcd")
    run_evaluate("--params", generator, "--num", 6, "--no-floor", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["git_commit"] == "0123abcd"
    assert result["params_sha256"] == hashlib.sha256(generator.read_bytes()).hexdigest()


def test_repeats_infinity_and_neighbours(run_evaluate, generator, dataroot, tmp_path):
    result, picture = tmp_path / "r.json", tmp_path / "n.png"
    flags = ("--params", generator, "--num", 128, "--batch-size", 64)
    out = run_evaluate(*flags, "--repeats", 2, "--infinity", "--json", result, "--neighbours", picture).out
    result = json.loads(result.read_text())
    assert result["fid"] == pytest.approx(np.mean(result["fids"])) and len(set(result["fids"])) == 2
    assert result["fid_95"][0] < min(result["fids"]) and max(result["fids"]) < result["fid_95"][1]
    assert result["fid_infinity"] < result["fid"] and result["n_floor"] < 128
    assert "mean of 2 draws" in out and "infinitely many" in out and "real training images" in out
    with Image.open(picture) as grid:
        assert grid.size == (2 + 8 * 66, 2 + 8 * 66)


def test_infinity_is_refused_before_the_measurement(run_evaluate, generator, dataroot, monkeypatch):
    """As soon as the number of generated images is known: 127 faces, or the few of a folder."""
    monkeypatch.setattr(evaluate, "load_extractor", None)
    for flags in (("--params", generator, "--num", 127), ("--images", dataroot / "64" / "train")):
        with pytest.raises(UserError, match="--infinity needs 128 generated images at --dims 64, not"):
            run_evaluate(*flags, "--infinity")


def test_a_memorized_face_is_its_nearest_neighbour(run_evaluate, dataroot, tmp_path):
    train = dataroot / "64" / "train"
    run_evaluate("--images", train, "--neighbours", tmp_path / "n.png")
    with Image.open(tmp_path / "n.png") as grid:
        for row in range(8):
            fake, real = (np.array(grid.crop((x, 2 + 66 * row, x + 64, 66 + 66 * row))) for x in (2, 68))
            assert (fake == real).all()


def test_incomparable_statistics_are_refused(run_evaluate, dataroot, tmp_path):
    with pytest.raises(UserError, match="resolution is 128"):
        run_evaluate("--images", dataroot / "64" / "train", "--real", dataroot / "128" / "test")
    for field, value in (("resize", "clean"), ("network", "torchvision"), ("dtype", "bf16"), ("version", 1)):
        np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), **{field: value})
        with pytest.raises(UserError, match=f"{field} is {value} in .*other.npz"):
            run_evaluate("--images", dataroot / "64" / "train", "--real", tmp_path / "other.npz")
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    with pytest.raises(UserError, match="dims is 32"):
        run_evaluate("--images", dataroot / "64" / "train", "--real", tmp_path / "small.npz")
    with pytest.raises(UserError, match="dims is 32"):
        run_evaluate("--images", tmp_path / "small.npz", "--real", tmp_path / "other.npz")


def test_the_pretrained_generator_replaces_a_missing_training(tmp_path, run_evaluate, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="64/test; make the crops with `python preprocess.py"):
        run_evaluate("--dataroot", "data")
    assert "pretrained/generator_64.params" in capsys.readouterr().err


def test_offline_without_weights(run_script, refused, tmp_path):
    """The cache of weights is empty (run_script sets TORCH_HOME), and there is no network."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    done = run_script(PROGRAMS / "evaluate_offline.py", "--images", "images", "--real", "images")
    refused(done, "inception_v3_google-0cc3c7bd.pth", "104 MB", "0cc3c7bd", "--weights")


def test_given_weights_need_no_network(run_evaluate, dataroot, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("evaluate.py has opened a socket")

    monkeypatch.setattr(socket, "socket", fail)
    run_evaluate("--images", dataroot / "64" / "train", "--num", 9)
