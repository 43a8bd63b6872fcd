"""benchmarks/ablation.py: trainings of several variants, their table and their faces."""

import importlib
import json
import shutil
import sys
from argparse import Namespace

import pytest
from helpers import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "benchmarks"))
import ablation

import train
from support import distributed
from support.files import UserError


def test_table_and_faces_and_no_repeated_work(dataroot, tmp_path, weights, monkeypatch):
    """Two small trainings. A second call does only the work that is left."""
    ran = []

    def in_this_process(script, flags, args, log):
        ran.append(script)
        importlib.import_module(script.removesuffix(".py")).main([*map(str, flags)])

    monkeypatch.setattr(ablation, "python", in_this_process)
    monkeypatch.setattr(distributed, "catch_signals", list)  # only the main thread of a process may
    monkeypatch.setitem(ablation.VARIANTS, "batch 4", "--batch-size 4")
    flags = ["--variants", "report", "batch 4", "--train-flags", "--ngf 4 --ndf 4 --nz 8", "--eval-every", "1"]
    flags += ["--eval-flags", f"--inception tf2015 --dims 64 --num 3 --no-floor --weights '{weights}'"]
    flags += ["--dataroot", str(dataroot), "--outdir", str(tmp_path / "runs"), "--markdown", str(tmp_path / "table.md")]
    monkeypatch.setitem(ablation.VARIANTS, "report", "--batch-size 8")
    ablation.main([*flags, "--epochs", "1", "--faces", str(tmp_path / "faces.png")])
    assert ran == ["train.py", "evaluate.py", "evaluate.py"] * 2

    def fid(variant, name):
        [report] = (tmp_path / "runs" / f"{variant}, seed 0").glob(f"{name}_[0-9]*.json")
        return json.loads(report.read_text())["fid"]

    def last_row():
        return (tmp_path / "table.md").read_text().splitlines()[-1].split(" | ")

    assert last_row()[:2] == ["| batch 4", "`--batch-size 4`"]
    assert last_row()[3:5] == [f"{fid('batch 4', name):.4f}" for name in ("generator", "generator_raw")]
    expected = fid("batch 4", "generator") / fid("report", "generator_raw")
    assert float(last_row()[5]) == pytest.approx(expected, abs=0.01)
    logits = ablation.judge(tmp_path / "runs" / "batch 4, seed 0", Namespace(dataroot=dataroot))
    assert last_row()[7] == ", ".join(f"{logit:.2f}" for logit in logits.values())
    with Image.open(tmp_path / "faces.png") as picture:
        assert picture.size == (3 * (4 * 66 + 2) + 20, 8 * 66 + 2 + 16)

    ran.clear()
    with monkeypatch.context() as patch:
        patch.setattr(ablation, "judge", lambda *_: pytest.fail("judge() runs a second time"))
        ablation.main([*flags, "--epochs", "1"])
    assert ran == ["train.py"] * 2  # both have nothing left to train
    ablation.main([*flags, "--epochs", "2"])
    assert ran[2:] == ["train.py", "evaluate.py", "evaluate.py"] * 2
    assert int(last_row()[2]) == 2 * (len(list((dataroot / "64" / "train").iterdir())) // 4 * 4)


@pytest.mark.parametrize("recipe", ["report", "best"])
def test_the_verdict_of_d_depends_only_on_the_pixels(dataroot, tmp_path, recipe):
    known, others = tmp_path / "known", tmp_path / "others"
    for root, split in ((known, "train"), (others, "test")):
        shutil.copytree(dataroot / "64" / "train", root / "64" / "train")
        shutil.copytree(dataroot / "64" / split, root / "64" / "test")
    flags = ["--ngf", "4", "--ndf", "4", "--batch-size", "4", "--epochs", "1", "--recipe", recipe]
    train.main([*flags, "--dataroot", str(known), "--outdir", str(tmp_path / "run")])
    same, different = (ablation.judge(tmp_path / "run", Namespace(dataroot=root)) for root in (known, others))
    assert same["train"] == same["test"] == different["train"] != different["test"]
    assert same["fakes"] == different["fakes"] != same["train"]


def test_a_failing_variant_is_named_in_the_error(dataroot, tmp_path, monkeypatch):
    monkeypatch.setitem(ablation.VARIANTS, "report", "--batch-size 4000")
    with pytest.raises(UserError, match="train.py .* failed; see .*stdout.txt"):
        ablation.main(["--variants", "report", "--dataroot", str(dataroot), "--outdir", str(tmp_path)])
