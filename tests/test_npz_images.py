"""What evaluate.py compares besides folders and its own statistics: .npz of images, statistics of other tools."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from support.cli import npz_path
from support.comparison import report, warn
from support.feature_stats import NpzImages, holds_statistics
from support.files import UserError


@pytest.fixture
def foreign(tmp_path):
    """Two .npz that hold mu and sigma alone, as pytorch-fid writes them."""
    paths = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for i, path in enumerate(paths):
        np.savez(path, mu=np.full(64, i), sigma=np.eye(64))
    return paths


def pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


# ---------------------------------------------------------------------------------------------- .npz of images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_images_gives_the_statistics_of_its_folder(run_evaluate, dataroot, tmp_path, save):
    """The format of guided-diffusion: `arr_0`, uint8 (N,S,S,3)."""
    train, test = dataroot / "64" / "train", dataroot / "64" / "test"
    save(tmp_path / "train.npz", pixels(train))
    save(tmp_path / "test.npz", pixels(test))
    flags = ("--no-floor", "--num", 9)
    of_folders = run_evaluate("--images", train, "--real", test, *flags).out.splitlines()
    files = ("--images", tmp_path / "train.npz", "--real", tmp_path / "test.npz")
    of_files = run_evaluate(*files, *flags).out.splitlines()
    assert of_folders[1:] == of_files[1:] and "9 generated images; both 64x64" in of_files[0]
    assert len(NpzImages(tmp_path / "train.npz")) == len(list(train.iterdir()))


def test_neighbours_of_an_npz_of_images(run_evaluate, dataroot, tmp_path):
    train = dataroot / "64" / "train"
    np.savez(tmp_path / "s.npz", pixels(train))
    run_evaluate("--images", tmp_path / "s.npz", "--real", dataroot / "64" / "test", "--neighbours", tmp_path / "n.PNG")
    with Image.open(tmp_path / "n.PNG") as grid:
        fake, real = (np.array(grid.crop((x, 2, x + 64, 66))) for x in (2, 68))
        assert (fake == real).all()


def test_a_changed_npz_of_images_is_measured_again(run_evaluate, dataroot, tmp_path):
    images = pixels(dataroot / "64" / "train")
    flags = ("--images", dataroot / "64" / "train", "--real", tmp_path / "s.npz", "--no-floor")
    np.savez(tmp_path / "s.npz", images)
    before = run_evaluate(*flags).out
    np.savez(tmp_path / "s.npz", 255 - images)
    assert run_evaluate(*flags).out != before


@pytest.mark.parametrize("array, words", [
    (np.zeros((2, 8, 8, 3), np.float32), r"float32 \(2, 8, 8, 3\), not images uint8"),
    (np.zeros((2, 3, 8, 8), np.uint8), "not images"),
    (np.zeros((2, 8, 9, 3), np.uint8), "not images"),
    (np.zeros(3, np.uint8), "not images"),
    (np.zeros((0, 8, 8, 3), np.uint8), "no images"),
    (np.array([{}]), "damaged"),
])
def test_other_arrays_are_no_images(tmp_path, array, words):
    np.savez(tmp_path / "s.npz", array)
    with pytest.raises(UserError, match=f"s.npz.*{words}"):
        evaluate.open_images(tmp_path / "s.npz")


# ---------------------------------------------------------------------------------------------- other files


def test_the_content_decides_whether_an_npz_holds_statistics(foreign, tmp_path):
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "both.npz", np.zeros((2, 8, 8, 3), np.uint8), mu=np.zeros(4), sigma=np.eye(4))
    (tmp_path / "images.npz").rename(tmp_path / "IMAGES.NPZ")
    assert not holds_statistics(tmp_path / "IMAGES.NPZ") and not holds_statistics(tmp_path)
    assert holds_statistics(foreign[0].rename(tmp_path / "STATS.NPZ")) and holds_statistics(tmp_path / "both.npz")
    assert holds_statistics(foreign[1].rename(tmp_path / "stats")) and not holds_statistics(tmp_path / "missing")


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("faces/a.png", b"")


@pytest.mark.parametrize("name, write, words", [
    ("stats.npy", lambda path: np.save(path, np.zeros(3)), "is neither a folder nor a whole .npz; give a folder of im"),
    ("stats.pt", lambda path: torch.save({"mu": torch.zeros(3)}, path), "holds neither statistics .mu and sigma. nor"),
    ("faces.zip", write_zip, "holds neither .*; give a folder of images, unzipped"),
    ("stats.npz", lambda path: path.touch(), "is an empty file; give"),
    ("stats.npz", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "is a git-lfs pointer"),
    ("stats.npz", lambda path: path.write_text("<!DOCTYPE html>"), "is an HTML page; download the file itself"),
])
@pytest.mark.parametrize("flag", ["--real", "--images"])
def test_other_files_are_named_with_what_to_do(run_evaluate, foreign, tmp_path, flag, name, write, words):
    write(tmp_path / name)
    other = {"--real": "--images", "--images": "--real"}[flag]
    with pytest.raises(UserError, match=f"{name} {words}"):
        run_evaluate(flag, tmp_path / name, other, foreign[0])


def test_flags_that_need_images_are_refused_for_statistics(run_evaluate, foreign, tmp_path):
    for flag in (["--infinity"], ["--num", 9], ["--neighbours", tmp_path / "n.png"]):
        with pytest.raises(UserError, match="a.npz holds statistics, but .* need images"):
            run_evaluate("--images", foreign[0], "--real", foreign[1], *flag)
    with pytest.raises(UserError, match="a.npz holds statistics; give a folder"):
        evaluate.make_scorer(["--real", str(foreign[0])], 64, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------- reports


def test_the_last_line_says_what_the_number_is_of():
    """So that nobody quotes it bare."""
    result = {"real": "a", "fake": "b", "n_real": 5346, "n_fake": 5000, "dims": 768, "fid": 0.19588}
    result["network"] = "tf2015"
    last = "Fréchet Inception Distance (FID): 0.1959 ({}768 features, {} and {} images)"
    assert report(result).splitlines()[-1] == last.format("tf2015, ", "5,346 real", "5,000 generated")
    bare = report(result | {"network": None, "n_real": None, "n_fake": None})
    assert bare.splitlines()[-1] == last.format("", "real", "generated")


def test_a_file_that_does_not_say_its_resolution_needs_real(run_evaluate, foreign):
    with pytest.raises(UserError, match="a.npz does not say the size of its images; give .* --real"):
        run_evaluate("--images", foreign[0])


def test_the_report_of_foreign_statistics_says_what_is_known_alone(run_evaluate, foreign, tmp_path):
    a, b = foreign
    out = run_evaluate("--images", a, "--real", b, "--json", tmp_path / "r.json")
    assert out.out.splitlines()[:2] == [f"{b}: real images; {a}: generated images", "64 features"]
    assert "warning" not in out.err and "make sure that both sides were measured alike" in out.err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["network"] is None and result["n_real"] is None and result["fid"] == pytest.approx(64)


def test_braces_in_a_path_are_no_fields_of_the_report():
    result = {"real": "{fid}", "fake": "{x}", "n_real": None, "n_fake": 3, "dims": 64, "fid": 1.0}
    assert report(result).splitlines()[0] == "{fid}: real images; {x}: 3 generated images"


def test_a_rank_deficient_covariance_is_a_warning(capsys):
    warn(2000, 2000, 768)
    warn(None, None, 2048)
    assert capsys.readouterr().err == ""
    warn(2000, None, 2048)
    assert "2,000 real images are fewer than the 2,048 dims: their covariance is rank" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- outputs


def test_save_stats_adds_npz_to_the_name(run_evaluate, foreign, tmp_path):
    run_evaluate("--images", foreign[0], "--real", foreign[1], "--save-stats", tmp_path / "stats.v1")
    assert "(FID): 0.0000 (64" in run_evaluate("--images", foreign[1], "--real", tmp_path / "stats.v1.npz").out
    assert npz_path("S.NPZ").name == "S.NPZ" and not (tmp_path / "stats.v1").exists()


@pytest.mark.parametrize("flag, name", [("--json", "r.json"), ("--save-stats", "s.npz"), ("--neighbours", "n.png")])
def test_no_output_is_overwritten_without_the_flag(run_evaluate, dataroot, tmp_path, monkeypatch, flag, name):
    flags = ("--images", dataroot / "64" / "train", flag, tmp_path / name)
    (tmp_path / name).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "load_extractor", None)  # the refusal comes before any work
        with pytest.raises(UserError, match=f"{name} exists; choose another {flag}, or pass --overwrite to replace it"):
            run_evaluate(*flags)
    assert (tmp_path / name).read_text() == "mine"
    run_evaluate(*flags, "--overwrite")
    assert (tmp_path / name).read_bytes() != b"mine"


def test_outputs_that_replace_an_input_are_refused(run_evaluate, foreign, tmp_path):
    flags = ("--images", foreign[0], "--real", foreign[1], "--overwrite")
    for outputs, words in (
        (("--json", foreign[0]), "a.npz is an input of the same command"),
        (("--json", tmp_path), "is a folder; choose another --json"),
        (("--json", tmp_path / "no" / "r.json"), "there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            run_evaluate(*flags, *outputs)
