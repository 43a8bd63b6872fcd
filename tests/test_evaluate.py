
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluate
import network
from support.statistics import load_statistics


@pytest.fixture
def run(dataroot, weights, capsys):
    def evaluate_small(*flags):
        flags = ["--weights", weights, "--dims", "64", "--inception", "tf2015", "--dataroot", dataroot, *flags]
        evaluate.main([str(flag) for flag in flags])
        return capsys.readouterr()

    return evaluate_small


@pytest.fixture
def generator(tmp_path):
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    return tmp_path / "g.params"


def test_folders_cache_json_and_interchange(run, dataroot, tmp_path, monkeypatch):
    train, test = dataroot / "64" / "train", dataroot / "64" / "test"
    out = run("--images", train, "--real", test, "--json", tmp_path / "r.json", "--save-stats", tmp_path / "s.npz")
    last = out.out.splitlines()[-1]
    result = json.loads((tmp_path / "r.json").read_text())
    assert last == f"Fréchet Inception Distance (FID): {result['fid']:.4f}" and result["fid"] > 0
    assert result["n_fake"] == len(list(train.iterdir())) and result["floor"] == pytest.approx(result["fid"])
    assert result["resize"] == "tf" and result["dtype"] == "fp32" and result["flags"]["dims"] == 64
    assert {"kid", "kid_std", "precision", "recall", "n_floor", "versions"} <= result.keys()
    assert "fewer than 2,048" in out.err and "biases differ" in out.err
    assert "FID-64 " in out.out and "resize tf" in out.out and result["weights_sha256"][:16] in out.out
    monkeypatch.setattr(evaluate, "measure", None)  # nothing is measured a second time
    assert run("--images", train).out == out.out
    assert run("--images", train, "--real", tmp_path / "s.npz").out.splitlines()[-1] == last
    assert run("--images", tmp_path / "s.npz", "--real", tmp_path / "s.npz").out.endswith("0.0000\n")
    with np.load(tmp_path / "s.npz") as stats:  # as pytorch-fid and TTUR write it: mu and sigma alone
        assert {"n", "resolution", "split", "network", "dims", "resize", "weights_sha256", "version"} <= set(stats)
        assert stats["split"] == "test" and stats["sigma"].dtype == np.float64
        np.savez(tmp_path / "bare.npz", mu=stats["mu"], sigma=stats["sigma"])
    bare = run("--images", train, "--real", tmp_path / "bare.npz")
    assert bare.out.splitlines()[-1] == last and "does not say how it was measured" in bare.err


def test_changed_data_is_measured_again(run, dataroot, tmp_path, monkeypatch):
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(4):
        Image.effect_noise((64, 64), 50 + i).convert("RGB").save(folder / f"{i}.png")
    flags = ("--images", folder, "--dataroot", tmp_path, "--real", dataroot / "64" / "test", "--no-floor")
    first = run(*flags).out
    assert run(*flags).out == first
    (folder / "0.png").unlink()
    assert run(*flags).out != first
    for cache in (tmp_path / ".statistics").iterdir():
        cache.write_bytes(cache.read_bytes()[:1000])
    again = run(*flags)
    assert again.err.count("measured again") == 2
    for resize in ("bilinear", "clean"):
        assert run(*flags, "--resize", resize).out.splitlines()[-1] != again.out.splitlines()[-1]


def test_params_are_evaluated_without_files(run, generator, tmp_path):
    flags = ("--params", generator, "--num", 6, "--no-floor")
    out = run(*flags).out
    assert "6 generated" in out and "64x64" in out and "floor" not in out
    for size in (1, 4):
        batched = run(*flags, "--batch-size", size).out
        assert abs(float(batched.split()[-1]) - float(out.split()[-1])) < 2e-3
    assert run(*flags, "--seed", 1).out != out


def test_repeats_infinity_and_neighbours(run, generator, dataroot, tmp_path):
    result, picture = tmp_path / "r.json", tmp_path / "n.png"
    flags = ("--params", generator, "--num", 128, "--batch-size", 64)
    out = run(*flags, "--repeats", 2, "--infinity", "--json", result, "--neighbours", picture).out
    result = json.loads(result.read_text())
    assert result["fid"] == pytest.approx(np.mean(result["fids"])) and len(set(result["fids"])) == 2
    assert result["fid_95"][0] < min(result["fids"]) and max(result["fids"]) < result["fid_95"][1]
    assert result["fid_infinity"] < result["fid"] and result["n_floor"] < 128
    assert "mean of 2 draws" in out and "infinitely many" in out and "floor" in out
    with Image.open(picture) as grid:
        assert grid.size == (2 + 8 * 66, 2 + 8 * 66)


def test_a_memorised_face_is_its_own_neighbour(run, dataroot, tmp_path):
    train = dataroot / "64" / "train"
    run("--images", train, "--neighbours", tmp_path / "n.png")
    with Image.open(tmp_path / "n.png") as grid:
        for row in range(8):
            fake, real = (np.array(grid.crop((x, 2 + 66 * row, x + 64, 66 + 66 * row))) for x in (2, 68))
            assert (fake == real).all()


def test_incomparable_statistics_are_refused(run, dataroot, tmp_path):
    with pytest.raises(SystemExit, match="resolution is 128"):
        run("--images", dataroot / "64" / "train", "--real", dataroot / "128" / "test")
    for fact, value in (("resize", "clean"), ("network", "torchvision"), ("dtype", "bf16"), ("version", 1)):
        np.savez(tmp_path / "other.npz", mu=np.zeros(64), sigma=np.eye(64), **{fact: value})
        with pytest.raises(SystemExit, match=f"{fact} is {value} in .*other.npz"):
            run("--images", dataroot / "64" / "train", "--real", tmp_path / "other.npz")
    np.savez(tmp_path / "small.npz", mu=np.zeros(32), sigma=np.eye(32))
    with pytest.raises(SystemExit, match="dims is 32"):
        run("--images", dataroot / "64" / "train", "--real", tmp_path / "small.npz")
    with pytest.raises(SystemExit, match="dims is 32"):
        run("--images", tmp_path / "small.npz", "--real", tmp_path / "other.npz")


def test_damaged_statistics_are_one_sentence(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", mu=np.zeros(64), sigma=np.eye(64))
    whole = (tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "objects.npz", mu=np.array([{}] * 4), sigma=np.eye(4))
    np.savez(tmp_path / "unfit.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "none.npz", mean=np.zeros(3))
    np.savez(tmp_path / "n.npz", mu=np.zeros(4), sigma=np.eye(4), n="many")
    np.savez(tmp_path / "rows.npz", mu=np.zeros(4), sigma=np.eye(4), n=3, features=np.zeros((2, 4)))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for cut in range(0, len(whole), 37):
        (tmp_path / f"cut{cut}.npz").write_bytes(whole[:cut])
        (tmp_path / f"flip{cut}.npz").write_bytes(whole[:cut] + bytes([whole[cut] ^ 0x10]) + whole[cut + 1 :])
    harmless = 0
    for path in tmp_path.glob("*.npz"):
        try:
            stats = load_statistics(path)
            assert path.stem == "whole" or path.stem.startswith("flip")  # in a timestamp, say
            assert (stats["mu"] == 0).all() and (stats["sigma"] == np.eye(64)).all()
            harmless += 1
        except SystemExit as error:
            assert str(error).startswith("error: ") and path.name in str(error)
    assert harmless


def test_processes_share_the_images(run, dataroot, weights, generator, tmp_path):
    """Two processes of torchrun, over gloo, come to what one comes to."""
    flags = ["--params", generator, "--num", 21, "--dims", 64, "--inception", "tf2015", "--weights", weights]
    results = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        (root / "64").mkdir(parents=True)
        for split in ("train", "test"):
            (root / "64" / split).symlink_to(dataroot / "64" / split)
        command = [sys.executable, ROOT / "evaluate.py", *flags, "--dataroot", root, "--json", root / "r.json"]
        command += ["--save-stats", root / "s.npz", "--device", "cpu"]
        if processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]
            command[1:1] = torchrun
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [str(part) for part in command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Fréchet Inception Distance") == 1
        results.append((json.loads((root / "r.json").read_text()), load_statistics(root / "s.npz")))
    (alone, stats), (shared, shared_stats) = results
    assert shared["n_fake"] == 21 and shared["n_real"] == alone["n_real"] == shared_stats["n"]
    assert shared["fid"] == pytest.approx(alone["fid"], abs=1e-4)
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(shared_stats[name], stats[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags, words", [
    (("--params", "nowhere"), ["nowhere", "train.py"]),
    (("--params", "bad.npz"), ["bad.npz", "damaged"]),
    (("--images", "nowhere"), ["nowhere", "preprocess.py"]),
    (("--images", "empty"), ["empty", "no images"]),
    (("--images", "mixed", "--real", "two"), ["b.png is 32x32"]),
    (("--images", "broken", "--real", "two"), ["a.png", "cannot be read"]),
    (("--images", "one"), ["64", "test", "preprocess.py"]),
    (("--images", "one", "--weights", "nowhere"), ["64", "test", "preprocess.py"]),
    (("--images", "one", "--real", "one"), ["1 images"]),
    (("--images", "one", "--real", "two", "--num", "9"), ["--num is 9", "1 images"]),
    (("--images", "one", "--real", "small"), ["resolution is 32"]),
    (("--images", "one", "--real", "no.npz"), ["no.npz"]),
    (("--images", "one", "--real", "bad.npz"), ["bad.npz", "mu and sigma"]),
    (("--images", "one", "--real", "one", "--weights", "nowhere"), ["--weights nowhere"]),
    (("--images", "one", "--json", "bad.npz"), ["bad.npz exists"]),
    (("--images", "one", "--json", "no/r.json"), ["no folder no"]),
    (("--images", "one", "--real", "one", "--neighbours", "n.png"), ["--neighbours", "train"]),
    (("--images", "one", "--repeats", "2"), ["--repeats"]),
    (("--images", "one", "--neighbours", "n.gif"), [".png"]),
    (("--images", "one", "--real", "one", "--device", "cuda:7"), ["--device cuda:7"]),
])
def test_bad_input(refused_in_process, tmp_path, monkeypatch, flags, words):
    for folder in ("empty", "one", "two", "small", "mixed", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad.npz").write_text("no archive")
    (tmp_path / "broken" / "a.png").write_text("no picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "small" / "a.png")
    for name in ("one/a.png", "two/a.png", "two/b.png", "mixed/a.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "b.png")
    refused_in_process(flags, words)


@pytest.fixture
def refused_in_process(weights, tmp_path, monkeypatch, capsys):
    """Asserts one sentence that holds `words`. In this process, as a new one takes seconds to import torch."""

    def check(flags, words):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as error:
            evaluate.main(["--inception", "tf2015", "--dims", "64", "--weights", str(weights), *flags])
        message = error.value.code
        if message == 2:  # argparse
            message = capsys.readouterr().err.splitlines()[-1]
        assert "error: " in message and "\n" not in message
        for word in words:
            assert word in message, message

    return check


def test_bad_input_as_a_user_meets_it(run_script, refused):
    refused(run_script("evaluate.py", "--params", "runs/64/generator.params"), "runs/64/generator.params", "train.py")


def test_without_a_training_it_is_the_pretrained_generator_and_says_so(run_script, refused, tmp_path, weights):
    done = run_script("evaluate.py", "--inception", "tf2015", "--weights", weights)
    refused(done, "data/64/test", "preprocess.py")
    assert "pretrained/generator_64.params" in done.stderr


def test_offline_without_weights(run_script, refused, tmp_path):
    """TORCH_HOME is an empty folder, and the network is out of reach."""
    Path(tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    code = "import sys, socket, evaluate\ndef no(*_, **__): raise OSError('offline')\nsocket.create_connection = no\n"
    (tmp_path / "offline.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"
                                         "evaluate.main(['--images', 'images', '--real', 'images'])\n")
    refused(run_script(tmp_path / "offline.py"), "inception_v3_google-0cc3c7bd.pth", "104 MB", "0cc3c7bd", "--weights")


def test_given_weights_need_no_network(run, dataroot, monkeypatch):
    import socket

    def no(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no)
    run("--images", dataroot / "64" / "train", "--num", 9)
