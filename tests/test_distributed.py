"""Two processes of torchrun over gloo: training and evaluation."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from helpers import (
    PROGRAMS,
    ROOT,
    SMALL,
    assert_equal,
    child_processes,
    load,
    run_python,
    start,
    torchrun,
    wait_for,
)
from PIL import Image

import network
import train
from dataloader import DataGenerater
from support import distributed
from support.checkpoint import refuse_unequal_ranks
from support.distributed import first_rank_writes, from_first_rank, joined_ranks, once_per_machine
from support.feature_stats import load_statistics
from support.files import UserError


def test_two_processes_stay_equal_and_share_each_batch(dataroot, tmp_path):
    """After an epoch, the ranks are equal bit by bit. Only D's BatchNorm statistics depend on the images of a rank.

    No thread of gloo may still run after the training, because it could abort the process at exit.
    """
    flags = [*SMALL, "--dataroot", str(dataroot), "--outdir", str(tmp_path / "run")]
    done = run_python(*torchrun(2), PROGRAMS / "spy_on_steps.py", *flags, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "gloo" not in done.stdout
    ranks = [load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    images = DataGenerater(dataroot / "64" / "train", in_memory=True).images
    seen = torch.cat([rank.pop("seen") for rank in ranks])
    indices = [(images == image).flatten(1).all(1).nonzero().item() for image in seen]  # each image is in the data set
    assert len(indices) == len(images) // 8 * 8 == len(set(indices))
    for rank in ranks:
        rank["netD"] = {name: tensor for name, tensor in rank["netD"].items() if "running" not in name}
    assert_equal(*ranks)
    train.main([*flags, "--epochs", "2", "--resume"])  # one process resumes the training of two


def test_after_the_death_of_one_process_the_other_ends(dataroot, tmp_path):
    process = start(dataroot, tmp_path / "run", 2, "--epochs", 500)
    wait_for((tmp_path / "run" / "checkpoint.pt").exists, process)
    children = child_processes(process)
    if children is None:
        process.terminate()
        pytest.skip("needs /proc")
    killed, other = children
    os.kill(killed, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_evaluate_in_two_processes_equals_one_process(dataroot, weights, tmp_path):
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    flags = ["--params", tmp_path / "g.params", "--num", 21, "--dims", 64, "--inception", "tf2015"]
    flags += ["--weights", weights, "--device", "cpu"]
    results = []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        (root / "64").mkdir(parents=True)
        for split in ("train", "test"):
            (root / "64" / split).symlink_to(dataroot / "64" / split)
        launcher = torchrun(processes) if processes > 1 else []
        outputs = ["--dataroot", root, "--json", root / "r.json", "--save-stats", root / "s.npz"]
        done = run_python(*launcher, ROOT / "evaluate.py", *flags, *outputs, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Fréchet Inception Distance") == 1
        results.append((json.loads((root / "r.json").read_text()), load_statistics(root / "s.npz")))
    (single, stats), (double, double_stats) = results
    assert double["n_fake"] == 21 and double["n_real"] == single["n_real"] == double_stats["n"]
    assert double["fid"] == pytest.approx(single["fid"], abs=1e-4)
    for name in ("mu", "sigma"):
        np.testing.assert_allclose(double_stats[name], stats[name], rtol=1e-5, atol=1e-5)


def test_two_processes_share_the_faces_of_generator(tmp_path):
    """Each seed is drawn once. The first process alone prints and makes the grid, with the faces in their order."""
    torch.manual_seed(0)
    torch.save(network.Generator(8, 4).state_dict(), tmp_path / "g.params")
    flags = ["--params", "g.params", "--seeds", "0-4", "--device", "cpu", "--grid", "--interpolate"]
    for processes in (1, 2):
        launcher = torchrun(processes) if processes > 1 else []
        done = run_python(*launcher, ROOT / "generator.py", *flags, "--outdir", processes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        pictures = f"grid in {processes}_grid.png, interpolation in {processes}_interpolation.gif"
        assert done.stdout == f"5 faces of 64x64 from g.params in {processes}, {pictures}\n"
    names = [sorted(path.name for path in (tmp_path / folder).glob("*.png")) for folder in "12"]
    assert names[0] == names[1] and len(names[0]) == 5
    pairs = [(tmp_path / "1" / name, tmp_path / "2" / name) for name in names[0]]
    pairs += [(tmp_path / f"1_{name}", tmp_path / f"2_{name}") for name in ("grid.png", "interpolation.gif")]
    for pair in pairs:
        single, double = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in pair)
        assert abs(single - double).max() <= 1, pair  # convolutions round differently for other batch sizes


def test_world_size_without_torchrun_is_refused(monkeypatch):
    """Schedulers of clusters set WORLD_SIZE for another purpose."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE"), joined_ranks("cpu"):
        pass


def test_one_process_is_first_everywhere():
    """Without torchrun, what one process does for all is done once, and an error of it is raised."""
    calls = []
    first_rank_writes(lambda: calls.append("written"))
    assert from_first_rank(lambda: calls) == once_per_machine(lambda: calls) == ["written"]
    with pytest.raises(ZeroDivisionError):
        first_rank_writes(lambda: 1 / 0)


@pytest.mark.parametrize("size, weight, words", [(10, 0, "evenly"), (4, 10, "two images a process")])
def test_batches_that_four_processes_cannot_share(monkeypatch, size, weight, words):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 4))
    monkeypatch.setattr(distributed, "refuse_differences", lambda *_: None)
    args = train.parse_args(["--batch-size", str(size), "--colour-weight", str(weight)])
    args.images_sha256 = ""
    with pytest.raises(UserError, match=words):
        refuse_unequal_ranks(args, torch.device("cpu"))


@pytest.mark.parametrize("size, warned", [(16, True), (28, True), (32, False)])
def test_a_warning_for_batchnorm_in_small_shares_of_a_batch(monkeypatch, capsys, size, warned):
    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (0, 4))
    monkeypatch.setattr(distributed, "refuse_differences", lambda *_: None)
    args = train.parse_args(["--batch-size", str(size)])
    args.images_sha256 = ""
    refuse_unequal_ranks(args, torch.device("cpu"))
    assert ("BatchNorm" in capsys.readouterr().err) == warned
