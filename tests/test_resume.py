"""Trainings that are killed, stopped and resumed: the result equals that of an uninterrupted training."""

import hashlib
import json
import shutil
import signal
import time

import pytest
import torch
from helpers import assert_same_training, load, run_training, start, wait_for
from kill_train import kill
from PIL import Image

import train
from support import checkpoint
from support.files import UserError


@pytest.mark.parametrize("flags", [[], ["--augment", "--group-norm", "--colour-weight", "3"]])
def test_resume_equals_no_interruption(dataroot, tmp_path, flags):
    run_training(dataroot, tmp_path / "whole", "--epochs", 2, *flags)
    run_training(dataroot, tmp_path / "parts", "--epochs", 1, *flags)
    run_training(dataroot, tmp_path / "parts", "--epochs", 2, "--resume", *flags)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_args_json_keeps_what_a_training_began_with(dataroot, tmp_path, monkeypatch):
    """And names the parameters. A resumed training adds what has changed: here the commit and the number of epochs."""
    for commit, flags in (("first", ["--epochs", 1]), ("second", ["--epochs", 2, "--resume"])):
        monkeypatch.setattr(checkpoint, "git_commit", lambda commit=commit: commit)
        run_training(dataroot, tmp_path / "run", *flags)
    metadata = json.loads((tmp_path / "run" / "args.json").read_text())
    assert metadata["git_commit"] == "first" and metadata["epochs"] == 1
    [resumed] = metadata["resumed"]
    assert resumed["git_commit"] == "second" and resumed["epochs"] == 2 and resumed["step"] == 5
    for name in ("generator.params", "generator_raw.params"):
        content = (tmp_path / "run" / name).read_bytes()
        assert metadata["sha256"][name] == hashlib.sha256(content).hexdigest()


def test_resume_needs_the_folder_alone(dataroot, tmp_path, capsys):
    """The flags are those of args.json. A later --epochs is kept, too."""
    flags = ["--batch-size", 16, "--ema", 0.9, "--recipe", "best", "--epochs", 1]
    run_training(dataroot, tmp_path / "parts", *flags)
    train.main(["--resume", "--outdir", str(tmp_path / "parts"), "--epochs", "3"])
    train.main(["--resume", "--outdir", str(tmp_path / "parts")])
    run_training(dataroot, tmp_path / "whole", *flags[:-1], 3)
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("flag, words", [
    (["--batch-size", "16"], "--batch-size was 8 in .*, now 16"),
    (["--recipe", "best"], "--recipe was report in .*, now best"),
    (["--precision", "bf16"], "--precision was fp32 in .*, now bf16"),
])
def test_a_flag_that_must_not_change_is_refused_by_name(trained, tmp_path, flag, words):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match=words):
        train.main(["--resume", "--outdir", str(tmp_path / "run"), "--epochs", "3", *flag])


def test_resume_without_a_training_starts_one(dataroot, tmp_path, trained, capsys):
    """So that a queue can run one command again and again."""
    run_training(dataroot, tmp_path / "run", "--epochs", 2, "--resume")
    assert "there is no training in" in capsys.readouterr().err
    assert_same_training(trained, tmp_path / "run")


def test_deleted_parameters_of_a_finished_training_are_written_again(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    for name in ("generator.params", "generator_raw.params"):
        (tmp_path / "run" / name).unlink()
    train.main(["--resume", "--outdir", str(tmp_path / "run")])
    assert_same_training(trained, tmp_path / "run")


def test_a_checkpoint_of_older_versions_is_taken(dataroot, tmp_path, trained):
    """They called the EMA weights "average", and the hash of the images data_sha256; their args.json may be gone."""
    shutil.copytree(trained, tmp_path / "run")
    content = load(trained / "checkpoint.pt")
    content["average"] = content.pop("netG_ema")
    content["fixed"]["data_sha256"] = content["fixed"].pop("images_sha256")
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    (tmp_path / "run" / "args.json").unlink()
    run_training(dataroot, tmp_path / "run", "--epochs", 3, "--resume")
    run_training(dataroot, tmp_path / "whole", "--epochs", 3)
    assert_same_training(tmp_path / "whole", tmp_path / "run")


def test_the_same_images_in_memory_and_from_files_are_recognised(dataroot, tmp_path, monkeypatch):
    """Also as other PNGs. Other pixels under the same names are refused."""
    run_training(dataroot, tmp_path / "run", "--epochs", 1)
    monkeypatch.setattr(train, "fits_in_memory", lambda *_: False)
    shutil.copytree(dataroot, tmp_path / "data")
    for path in (tmp_path / "data" / "64" / "train").iterdir():
        Image.open(path).save(path, compress_level=1)
    flags = ["--workers", 0, "--resume", "--epochs"]
    run_training(tmp_path / "data", tmp_path / "run", *flags, 2)
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    with pytest.raises(UserError, match="the training images differ"):
        run_training(tmp_path / "data", tmp_path / "run", *flags, 3)


@pytest.mark.parametrize("precision, processes, number, epochs", [
    ("fp32", 1, signal.SIGKILL, 14),
    ("bf16", 2, signal.SIGTERM, 6),  # slower steps, so that fewer leave time for the kill
])
def test_a_killed_training_resumes_bit_by_bit(tmp_path, precision, processes, number, epochs):
    """The short form of tests/kill_train.py: one kill, while a file is being written."""
    flags = ["--epochs", epochs, "--precision", precision, "--augment", "--group-norm"]
    torn = kill(tmp_path, 1, flags, processes, number)
    assert torn == (number == signal.SIGKILL)


def test_a_training_resumes_after_a_kill_in_the_first_epoch(dataroot, tmp_path, monkeypatch, trained):
    """Also a kill between generator.params and the checkpoint of that epoch."""

    def killed(*_):
        raise KeyboardInterrupt

    save_params = train.save_params

    def save_params_and_die(*arguments):
        save_params(*arguments)
        killed()

    for name, death in (("train_step", killed), ("save_params", save_params_and_die)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train, name, death)
            run_training(dataroot, tmp_path / name, "--epochs", 2)
        run_training(dataroot, tmp_path / name, "--epochs", 2, "--resume")
        assert_same_training(trained, tmp_path / name)


def test_a_training_killed_between_two_checkpoints_is_not_overwritten(dataroot, tmp_path, trained):
    """Between the two renames, checkpoint_previous.pt exists and checkpoint.pt does not."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match=f"{tmp_path / 'run'} holds a training; go on by --resume"):
        run_training(dataroot, tmp_path / "run", "--epochs", 2)
    run_training(dataroot, tmp_path / "run", "--epochs", 2, "--resume")


def test_a_second_ctrl_c_stops_at_once(dataroot, tmp_path):
    """The test sends both during a step of some seconds. The first Ctrl-C lets the step end."""
    process = start(dataroot, tmp_path / "run", 1, "--epochs", 99, "--ngf", 64, "--ndf", 64, "--batch-size", 40)
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_text(), process)  # a step has ended, which is an epoch here
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "stopped at" not in message


def test_a_finished_training_is_never_overwritten(dataroot, tmp_path, trained):
    outdir = tmp_path / "run"
    shutil.copytree(trained, outdir)

    def refused(words, *flags):
        with pytest.raises(UserError, match=words):
            run_training(dataroot, outdir, "--epochs", 2, *flags)

    refused(f"{outdir} holds a training; go on by --resume")
    refused("--lr was 0.0002 in .*, now 0.1", "--resume", "--lr", 0.1)
    before = {path: path.read_bytes() for path in outdir.rglob("*.*")}
    run_training(dataroot, outdir, "--epochs", 2, "--resume")  # no epoch is left
    for path in outdir.rglob("*.p*"):
        assert path.read_bytes() == before[path], path
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (outdir / name).write_bytes(b"no checkpoint")
    refused("checkpoint.pt is damaged", "--resume")
    for name in ("checkpoint.pt", "checkpoint_previous.pt"):
        (outdir / name).unlink()
    refused("generator.params of another training; choose another --outdir")
