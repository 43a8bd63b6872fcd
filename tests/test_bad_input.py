"""Wrong flags and bad input of the four scripts: each error is one clear sentence."""

from collections import Counter

import pytest
import torch
from fuzz_scripts import RUNS, fuzz
from helpers import SMALL, jpeg
from PIL import Image

import evaluate
import generator
import network
import train
from support.files import UserError

# ---------------------------------------------------------------------------------------------- preprocess.py


@pytest.mark.parametrize("flags, words", [
    ((), ["SRC", "--demo"]),
    (("nowhere",), ["nowhere", "does not exist"]),
    (("empty",), ["empty", "no files"]),
    (("text.zip",), ["text.zip", "not a whole zip"]),
    (("texts",), ["no crop"]),
])
def test_preprocess_refuses_bad_input(tmp_path, run_script, refused, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    refused(run_script("preprocess.py", *flags), *words)


@pytest.mark.parametrize("flags", [
    ("--demo", "0"), ("--demo", "2", "--sizes", "0"), ("--demo", "2", "--workers", "-1"),
    ("--demo", "2", "--crop", "x"), ("--demo", "2", "--crop", "179"), ("--demo", "2", "--dataroot", "file"),
    ("--demo", "2", "--download"), ("src", "--demo", "2"), ("file",),
])
def test_preprocess_refuses_bad_flags(tmp_path, run_script, refused, flags):
    (tmp_path / "file").write_text("text")
    refused(run_script("preprocess.py", *flags))


@pytest.mark.parametrize("text, words", [
    (None, ["cannot read --partition"]),
    ("a.jpg 0\nb.jpg three\n", ["b.jpg three", "0, 1 or 2"]),
    ("other.jpg 0\n", ["names none of the photos"]),
    ("a.jpg 3\n", ["names none of the photos"]),
])
def test_preprocess_refuses_bad_partitions(tmp_path, run_script, refused, text, words):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    refused(run_script("preprocess.py", "src", "--partition", "list.txt"), "list.txt", *words)
    assert not list(tmp_path.rglob("*.png"))


@pytest.fixture
def refuses(tmp_path, monkeypatch, capsys):
    """Asserts that a script's main() ends with one sentence that holds `words`, in this process."""

    def check(script, flags, words):
        monkeypatch.chdir(tmp_path)
        with pytest.raises((UserError, SystemExit)) as error:
            script.main([*map(str, flags)])
        message = str(error.value)
        if message == "2":  # the exit code of argparse, which prints its message
            message = capsys.readouterr().err.splitlines()[-1]
            assert "error: " in message
        assert "\n" not in message
        for word in words:
            assert word in message, message

    return check


# ---------------------------------------------------------------------------------------------- train.py


@pytest.mark.parametrize("flags, words", [
    (("--dataroot", "nowhere"), ["nowhere", "preprocess.py"]),
    (("--batch-size", "1000"), ["--batch-size"]),
    (("--image-size", "65"), ["--image-size"]),
    (("--device", "cuda:99"), ["--device"]),
    (("--outdir", "/proc/none"), ["--outdir"]),
    (("--lr", "-1"), ["--lr", "-1 is not"]),
    (("--lr", "nan"), ["--lr"]),
    (("--beta1", "1"), ["--beta1", "below 1"]),
    (("--ema", "2"), ["--ema", "below 1"]),
    (("--seed", "9" * 30), ["--seed", "too large"]),
    (("--eval-every", "1", "--eval-flags", "--weights 'w"), ["--eval-flags"]),
])
def test_train_refuses_bad_input(dataroot, refuses, flags, words):
    refuses(train, [*SMALL, "--dataroot", dataroot, *flags], words)


# ---------------------------------------------------------------------------------------------- generator.py


@pytest.mark.parametrize("flags, words", [
    (("--device", "cuda:99"), ["--device", "cuda:99"]),
    (("--device", "meta"), ["--device", "meta"]),
    (("--outdir", "generator.params/x"), ["--outdir"]),
])
def test_generator_refuses_bad_input(tmp_path, refuses, flags, words):
    torch.save(network.Generator(16, 8).state_dict(), tmp_path / "generator.params")
    refuses(generator, ["--params", tmp_path / "generator.params", *flags], words)


# ---------------------------------------------------------------------------------------------- evaluate.py


@pytest.mark.parametrize("flags, words", [
    (("--params", "bad.npz"), ["bad.npz", "damaged"]),
    (("--images", "empty"), ["empty", "no images"]),
    (("--images", "mixed", "--real", "two"), ["b.png is 32x32"]),
    (("--images", "broken", "--real", "two"), ["a.png", "cannot be read"]),
    (("--images", "one"), ["64", "test", "preprocess.py"]),
    (("--images", "one", "--dataroot", "nowhere"), ["no folder nowhere/64/test", "preprocess.py"]),
    (("--images", "one", "--real", "one"), ["1 images"]),
    (("--images", "one", "--real", "two", "--num", "9"), ["--num is 9", "1 images"]),
    (("--images", "one", "--real", "small"), ["resolution is 32"]),
    (("--images", "one", "--real", "bad.npz"), ["bad.npz", "mu and sigma"]),
    (("--images", "one", "--json", "bad.npz"), ["bad.npz exists"]),
    (("--images", "one", "--json", "no/r.json"), ["no folder no"]),
    (("--images", "one", "--real", "one", "--neighbours", "n.png"), ["--neighbours", "train"]),
    (("--images", "one", "--repeats", "2"), ["--repeats"]),
    (("--images", "one", "--real", "one", "--device", "cuda:7"), ["--device cuda:7"]),
])
def test_evaluate_refuses_bad_input(refuses, weights, tmp_path, flags, words):
    for folder in ("data", "empty", "one", "two", "small", "mixed", "broken"):
        (tmp_path / folder).mkdir()
    (tmp_path / "bad.npz").write_text("no archive")
    (tmp_path / "broken" / "a.png").write_text("no picture")
    Image.new("RGB", (32, 32)).save(tmp_path / "small" / "a.png")
    for name in ("one/a.png", "two/a.png", "two/b.png", "mixed/a.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "b.png")
    refuses(evaluate, ["--inception", "tf2015", "--dims", "64", "--weights", weights, *flags], words)


@pytest.mark.parametrize("command", ["generator.py", "evaluate.py --dataroot nowhere", "train.py --dataroot nowhere"])
def test_scripts_print_one_sentence(tmp_path, run_script, refused, command):
    (tmp_path / "faces").touch()
    refused(run_script(*command.split()), "faces" if "generator" in command else "no folder nowhere")


# ---------------------------------------------------------------------------------------------- damaged input


def test_damaged_input_of_all_scripts(tmp_path):
    """The short form of tests/fuzz_scripts.py."""
    counts, outcomes = Counter(), fuzz(60, seed=4, folder=tmp_path / "fuzz")
    for (run, _), number in outcomes.items():
        counts[run] += number
    assert counts.total() == 60 and counts.keys() == {run.__name__ for run in RUNS}
    assert {outcome for _, outcome in outcomes} == {"done", "refused"}
