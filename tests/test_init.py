"""Trainings that start from trained networks: train.py --init."""

import math
import shutil

import pytest
import torch
from helpers import assert_equal, load, log_rows, run_training

import train
from support.ema import ema_weight
from support.files import UserError


@pytest.fixture(scope="module")
def other_sizes(dataroot, tmp_path_factory):
    """A finished training of networks with GroupNorm in D, and other widths than those of run_training()."""
    outdir = tmp_path_factory.mktemp("init") / "run"
    run_training(dataroot, outdir, "--epochs", 1, "--group-norm", "--nz", 6, "--ngf", 6, "--ndf", 5)
    return outdir


def start_from(file, dataroot, outdir, *flags):
    settings = ["--dataroot", dataroot, "--outdir", outdir, "--batch-size", 8, "--device", "cpu", "--precision", "fp32"]
    train.main([*map(str, settings), "--init", str(file), *map(str, flags)])


@pytest.mark.parametrize("half", [False, True])
def test_a_training_starts_from_the_ema_weights(other_sizes, dataroot, tmp_path, half):
    """With steps of 0, all networks stay those of the file: a checkpoint, or a pair in half precision."""
    checkpoint = load(other_sizes / "checkpoint.pt")
    netG, netD = checkpoint["netG_ema"], checkpoint["netD"]
    file = other_sizes / "checkpoint.pt"
    if half:
        file = tmp_path / "networks.pt"
        netG, netD = ({name: t.half() for name, t in state.items()} for state in (netG, netD))
        torch.save({"netG": netG, "netD": netD}, file)
    start_from(file, dataroot, tmp_path / "run", "--lr", 0, "--epochs", 1)
    result = load(tmp_path / "run" / "checkpoint.pt")
    for started, expected in ((result["netG"], netG), (result["netG_ema"], netG), (result["netD"], netD)):
        weights = [name for name in expected if "running" not in name and "num_batches" not in name]
        assert_equal({name: started[name] for name in weights}, {name: expected[name].float() for name in weights})
    assert result["fixed"]["nz"] == 6 and result["fixed"]["ndf"] == 5 and result["fixed"]["group_norm"] is True
    assert not result["optD"]["state"][0]["step"] > 5  # new optimisers


def test_the_ema_weights_do_not_move_to_g_at_once():
    """Nor do they keep the weights of the file: after 3,750 steps (60,000 images) they hold less than a thousandth."""
    assert ema_weight(1, 0.9998) > 0.9 and ema_weight(1, 0.9998, trained=True) == pytest.approx(0.01, rel=0.02)
    assert math.prod(1 - ema_weight(step, 0.9998, trained=True) for step in range(1, 3751)) < 1e-3
    args = train.parse_args(["--init", "networks.pt"])
    assert train.step_inputs(args, 0, torch.arange(8)).ema_weight.item() == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("flags, images, epochs", [
    (["--init", "networks.pt"], 500, 120), (["--init", "networks.pt"], 57_347, 5), ([], 500, 5),
    (["--demo", "--init", "networks.pt"], 1808, 20),
])
def test_few_photos_get_many_epochs(flags, images, epochs):
    assert train.default_epochs(train.parse_args(flags), torch.device("cpu"), images) == epochs


def test_resume_does_not_start_from_the_file_again(other_sizes, dataroot, tmp_path):
    start_from(other_sizes / "checkpoint.pt", dataroot, tmp_path / "run", "--epochs", 1)
    train.main(["--resume", "--outdir", str(tmp_path / "run"), "--epochs", "2"])
    assert [row["epoch"] for row in log_rows(tmp_path / "run")] == [1, 2]
    start_from(other_sizes / "checkpoint.pt", dataroot, tmp_path / "whole", "--epochs", 2)
    assert_equal(load(tmp_path / "run" / "checkpoint.pt"), load(tmp_path / "whole" / "checkpoint.pt"))


def test_another_init_is_refused_in_a_resumed_training(other_sizes, trained, dataroot, tmp_path):
    """The EMA weights of a training without --init have a longer warm-up."""
    shutil.copytree(trained, tmp_path / "run")
    file = other_sizes / "checkpoint.pt"
    with pytest.raises(UserError, match="--init was None in .*, now .*checkpoint.pt"):
        train.main(["--resume", "--outdir", str(tmp_path / "run"), "--epochs", "3", "--init", str(file)])


@pytest.mark.parametrize("flags, words", [
    (["--ngf", 8], "--ngf is 8, but .*checkpoint.pt has 6; leave out --ngf"),
    (["--image-size", 128], "--image-size is 128, but .* has 64"),
    (["--no-group-norm"], "--group-norm is False, but .* has True"),
])
def test_a_flag_that_contradicts_the_file_is_refused_by_name(other_sizes, dataroot, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        start_from(other_sizes / "checkpoint.pt", dataroot, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [{}, {"netG": {"main.0.weight": torch.zeros(3)}}])
def test_a_file_without_a_pair_is_refused(dataroot, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt does not hold a generator netG and a discriminator"):
        start_from(tmp_path / "other.pt", dataroot, tmp_path / "run")
