"""Folders and files that are no photos: support/sources.py, through the scripts."""

import zipfile
from pathlib import Path

import pytest
from helpers import jpeg, named, skips
from PIL import Image

import preprocess
from dataloader import find_images
from support.files import UserError

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
    reasons = dict.fromkeys(HIDDEN, "hidden folder") | dict.fromkeys(SYSTEM, "system folder")
    assert skips(out) == {f"a/{name}/": reason for name, reason in reasons.items()}


def test_hidden_and_system_folders_hold_no_crops(tmp_path):
    root = tmp_path / ".data" / "train"
    for folder in (root, root / "b", *(root / name for name in HIDDEN + SYSTEM)):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    assert find_images(root) == [root / "a.png", root / "b" / "a.png"]


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_attributes_that_macos_keeps_on_other_disks_are_no_images(tmp_path, zipped):
    """Neither among photos nor among crops, where each crop may have one."""
    src, out = tmp_path / "src", tmp_path / "out"
    write(src / "a.jpg")
    (src / "._a.jpg").write_bytes(b"\0\5\x16\7" + bytes(99))
    if zipped:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in src.iterdir():
                archive.write(path, path.name)
        src = tmp_path / "photos.zip"
    for _ in range(2):  # the second run finds a crop and its file of attributes
        preprocess_here(str(src), "--dataroot", str(out))
        assert skips(out).keys() == {"._a.jpg"} and skips(out)["._a.jpg"].startswith("not an image")
        next(out.rglob("a.png")).with_name("._a.png").write_bytes(b"\0\5\x16\7")
        assert [path.name for path in find_images(out / "64")] == ["a.png"]


def test_folders_named_by_numbers_hold_photos(tmp_path, monkeypatch):
    """FFHQ's layout, in the folder of the crops."""
    monkeypatch.chdir(tmp_path)
    write(*(Path(f"data/0{i % 2}000/{i:05d}.jpg") for i in range(4)), Path("data/x.jpg"))
    for _ in range(2):
        preprocess_here("data")
        assert named(Path("data")) == ["00000__00000", "00000__00002", "01000__00001", "01000__00003", "x"]
    assert skips(Path("data")) == {"64/": "crops of preprocess.py"}


@pytest.mark.parametrize("flags, keeps_note", [((), True), ((), False), (("--dataroot", "other"), True)])
def test_crops_are_not_photos(tmp_path, monkeypatch, capsys, flags, keeps_note):
    """Also those of older versions, which wrote no crop.txt. Neither is the list of what was skipped."""
    monkeypatch.chdir(tmp_path)
    write(Path("a.jpg"))
    preprocess_here(".")
    if not keeps_note:
        Path("data/64/crop.txt").unlink()
    preprocess_here(".", *flags)
    out = Path(flags[-1] if flags else "data")
    assert named(out) == ["a"] and skips(out) == {"data/64/": "crops of preprocess.py"}
    assert "1 crops of preprocess.py" in capsys.readouterr().out


def test_crops_in_a_zip_are_not_photos(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("a.jpg", "data/64/train/a.png", "data/64/crop.txt", "00000/b.jpg"):
            archive.writestr(name, jpeg())
    preprocess_here(str(tmp_path / "photos.zip"), "--dataroot", str(tmp_path / "out"))
    assert named(tmp_path / "out") == ["00000__b", "a"]
    assert skips(tmp_path / "out") == {"data/64/": "crops of preprocess.py"}


@pytest.mark.parametrize("order", ["a", "z"])
def test_links_to_folders_are_followed_once(tmp_path, convert, order):
    """By preprocess.py and by what reads crops. Folders keep their names where a link leads to them, too."""
    src, elsewhere = tmp_path / "src", tmp_path / "elsewhere"
    write(src / "m" / "1.jpg", elsewhere / "deep" / "2.jpg", tmp_path / "outside" / "3.jpg")
    links = {"same": src / "m", "out": elsewhere, "deeper": elsewhere / "deep", "loop": src, "up": tmp_path}
    for name, target in links.items():
        (src / f"{order}_{name}").symlink_to(target)
    (elsewhere / "deep" / "back").symlink_to(elsewhere)
    assert len(find_images(src)) == 2
    out = convert()
    assert set(named(out)) == {f"{order}_deeper__2", "m__1"}
    read = "link to a folder that is read already"
    reasons = {"deeper/back": read, "loop": read, "out/deep": read, "same": read, "up": "link to a folder above"}
    assert skips(out) == {f"{order}_{name}/": reason for name, reason in reasons.items()}


def test_a_source_without_photos_is_refused(tmp_path, convert):
    write(tmp_path / "src" / ".hidden" / "a.jpg")
    with pytest.raises(UserError, match="gave no crop"):
        convert()
    assert skips(tmp_path / "out") == {".hidden/": "hidden folder"}


def test_a_file_that_a_zip_holds_twice_gives_the_later_crop(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a.jpg", b"old")
        archive.writestr("a.jpg", jpeg())
    preprocess_here(str(tmp_path / "photos.zip"), "--dataroot", str(tmp_path / "out"))
    assert named(tmp_path / "out") == ["a"]
    assert skips(tmp_path / "out") == {}
