"""Checkpoints, the log and the lock of an output folder: support/checkpoint.py."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, assert_same_training, load, run_training

import train
from support.files import UserError, open_outdir
from support.training_log import FIELDS, continue_log, read_log


class Bomb:
    """An object whose pickle creates the file "boom" when it is loaded as code."""

    def __reduce__(self):
        return (exec, ("open('boom', 'w')",))


@pytest.mark.parametrize("name, value, words", [
    ("netG", Bomb(), "Python objects"),
    ("netG", {}, "loading state_dict"),
    ("netD", {"main.0.weight": torch.zeros(1).expand(2**20, 2**20)}, "claims"),
    ("netG_ema", {"main.0.weight": torch.zeros(3)}, "loading state_dict"),
    ("optG", {"state": {}, "param_groups": []}, "param"),
    ("optD", {"state": 7}, "not a checkpoint"),
    ("step", "many", "not a checkpoint"),
    ("fixed", None, "not a checkpoint"),
])
def test_bad_checkpoints_are_refused(dataroot, tmp_path, monkeypatch, trained, name, value, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_previous.pt").unlink()
    content = load(trained / "checkpoint.pt")
    torch.save(content | {name: value}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match=words) as stop:
        run_training(dataroot, "run", "--epochs", 3, "--resume")
    assert str(stop.value).startswith("run/checkpoint.pt") and "\n" not in str(stop.value)
    assert not Path("boom").exists()


def test_damaged_checkpoint_falls_back_to_the_previous_one(dataroot, tmp_path, capsys, trained):
    shutil.copytree(trained, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    run_training(dataroot, tmp_path / "run", "--epochs", 2, "--resume")
    assert "damaged" in capsys.readouterr().err
    assert_same_training(trained, tmp_path / "run")


def test_the_log_loses_the_rows_after_the_checkpoint(tmp_path):
    rows = [json.dumps(dict.fromkeys(FIELDS, step)) for step in (20, 40, 60)]
    damaged = [b'{"step": 30}', b"[]", b"\xff\xfe", rows[0].encode().replace(b"20", b'"20"', 1)]
    lines = [rows[0].encode(), *damaged, rows[1].encode(), rows[2].encode(), b'{"step": 7']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    with continue_log(tmp_path / "log.jsonl", 45) as log:
        log.write(rows[2])
    assert [row["step"] for row in read_log(tmp_path / "log.jsonl", 99)] == [20, 40, 60]


def test_no_checkpoint_is_written_after_a_loss_is_nan(dataroot, tmp_path, trained, monkeypatch):
    """Also between two rows of the log. The last good checkpoint stays, and the error names it."""
    shutil.copytree(trained, tmp_path / "run")
    step = train.train_step

    def diverge(state, *rest):
        step(state, *rest)
        state.totals += float("nan")

    monkeypatch.setattr(train, "train_step", diverge)
    kept = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="near step 11: .*last good checkpoint is .*checkpoint.pt"):
        run_training(dataroot, tmp_path / "run", "--epochs", 3, "--checkpoint-every", 1, "--resume")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == kept


def test_two_trainings_in_one_folder_at_the_same_time(dataroot, tmp_path, run_script, refused):
    lock = open_outdir(tmp_path / "run", resume=False)
    refused(run_script("train.py", *SMALL, "--dataroot", dataroot, "--outdir", tmp_path / "run"), "another training")
    lock.close()
