"""Folders and files that are no photos: support/sources.py and support/sources.py, through the scripts."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, jpeg, named, skips
from PIL import Image

import preprocess
from dataloader import DataGenerater, find_images
from support.files import UserError
from support.images import encode_png, save_animation, save_image
from support.sources import DOCS, folders_without_photos, relative_key

HIDDEN = [".ipynb_checkpoints", ".Trashes", ".thumbnails", ".@__thumb"]
SYSTEM = ["__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"]


def write(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg())


def preprocess_here(src, *flags):
    preprocess.main([src, "--sizes", "64", "--workers", "0", "--allow-upscale", *flags])


@pytest.mark.parametrize("zipped", [False, True])
def test_hidden_and_system_folders_hold_no_photos(tmp_path, zipped):
    src, out = tmp_path / ".src", tmp_path / "out"  # SRC itself may be hidden
    write(src / "good.jpg", src / "a" / "good.jpg", *(src / "a" / name / "deep" / "t.jpg" for name in HIDDEN + SYSTEM))
    write(src / "a" / ".thumbnails" / "second.jpg")
    if zipped:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in src.rglob("*.jpg"):
                archive.write(path, path.relative_to(src))
        src = tmp_path / "photos.zip"
    preprocess_here(str(src), "--dataroot", str(out))
    assert named(out) == ["a__good", "good"]
    expected = {f"a/{name}/": "hidden: 1 file" for name in HIDDEN} | {"a/.thumbnails/": "hidden: 2 files"}
    assert skips(out) == expected | {f"a/{name}/": "in a system folder: 1 file" for name in SYSTEM}


def test_hidden_and_system_folders_hold_no_crops(tmp_path):
    root = tmp_path / ".data" / "train"
    for folder in (root, root / "b", *(root / name for name in HIDDEN + SYSTEM)):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert find_images(root) == [root / "a.png", root / "b" / "a.png"]


def test_folders_named_by_numbers_hold_photos(tmp_path, monkeypatch):
    """FFHQ's layout, in the folder of the crops."""
    monkeypatch.chdir(tmp_path)
    write(*(Path(f"data/0{i % 2}000/{i:05d}.jpg") for i in range(4)), Path("data/x.jpg"))
    for _ in range(2):
        preprocess_here("data")
        assert named(Path("data")) == ["00000__00000", "00000__00002", "01000__00001", "01000__00003", "x"]
    assert skips(Path("data")) == {"64/": "crops of preprocess.py: 6 files"}  # five and crop.txt


@pytest.mark.parametrize("flags, keeps_note", [((), True), ((), False), (("--dataroot", "other"), True)])
def test_crops_are_not_photos(tmp_path, monkeypatch, capsys, flags, keeps_note):
    """In --dataroot also those of older versions, which wrote no crop.txt."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.jpg"))
    preprocess_here(".")
    if not keeps_note:
        Path("data/64/crop.txt").unlink()
    Path("data/skipped.txt").unlink()
    preprocess_here(".", *flags)
    out = Path(flags[-1] if flags else "data")
    assert named(out) == ["a"] and skips(out)["data/64/"] == f"crops of preprocess.py: {1 + keeps_note} file" + (
        "s" if keeps_note else "")
    assert f"{1 + keeps_note} crops of preprocess.py" in capsys.readouterr().out


def test_output_of_a_training_is_not_a_photo(trained, tmp_path, convert):
    """`trained` is a run folder. Its samples are no photos even where SRC is the run folder itself."""
    write(tmp_path / "src" / "a.jpg")
    files = sum(path.is_file() for path in trained.rglob("*"))
    shutil.copytree(trained, tmp_path / "src" / "runs" / "64")
    out = convert("--allow-upscale")
    assert named(out) == ["a"] and skips(out) == {"runs/64/": f"output of train.py: {files} files"}
    assert folders_without_photos(["args.json", "log.jsonl", "samples/1.png", "b/1.jpg"]) == {
        "samples": "output of train.py"}
    assert folders_without_photos(["a/args.json", "a/1.jpg", "b/log.jsonl", "b/1.jpg", "samples/1.jpg"]) == {}


def test_pictures_that_our_scripts_draw_are_not_photos(tmp_path, convert):
    """They carry a mark, wherever somebody copies them."""
    src, face = tmp_path / "src", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write(src / "a.jpg")
    (src / "faces").mkdir()
    picture = Image.fromarray(face)
    (src / "faces" / "x.png").write_bytes(encode_png(face))
    save_image(picture, src / "faces" / "grid.png")
    save_animation([picture, picture.rotate(90)], src / "faces" / "interpolation.gif")
    picture.save(src / "faces" / "00000008.png")  # of another program
    (src / "copied.png").write_bytes(encode_png(face))
    out = convert()
    assert named(out) == ["a", "faces__00000008"]
    assert skips(out) == {"faces/": "drawn by FakeFaceGen: 3 files", "copied.png": "drawn by FakeFaceGen"}
    assert len(DataGenerater(src / "faces", None)) == 4  # evaluate.py still reads them


def test_pictures_of_the_readme_are_not_photos(tmp_path):
    assert relative_key(DOCS, ROOT) == "docs" and relative_key(DOCS, tmp_path) is None
    assert folders_without_photos(["docs/a.png", "x/docs/a.png"], docs="docs") == {"docs": "pictures of the README"}


def test_a_source_of_our_own_pictures_alone_is_refused(tmp_path, convert):
    write(tmp_path / "src" / ".hidden" / "a.jpg")
    with pytest.raises(UserError, match="gave no crop"):
        convert()
    assert skips(tmp_path / "out") == {".hidden/": "hidden: 1 file"}


def test_a_file_that_a_zip_holds_twice_gives_the_later_crop(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.jpg", b"old")
        archive.writestr("a.jpg", jpeg())
    preprocess_here(str(tmp_path / "photos.zip"), "--dataroot", str(tmp_path / "out"))
    assert named(tmp_path / "out") == ["a"]
    assert skips(tmp_path / "out") == {"a.jpg": "replaced by a later file of this name in the zip"}
