"""The script preprocess.py: second runs, kills, worker processes, paths, downloads and real photos."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from helpers import (
    PROGRAMS,
    ROOT,
    assert_whole_pngs,
    child_processes,
    crop_of,
    gradient,
    jpeg,
    named,
    run_python,
    skips,
)
from PIL import Image

import preprocess
from support.files import UserError
from support.sources import SPLITS


def start_preprocess(outdir, workers, **options):
    """Starts to draw 5,000 faces and returns the process once 20 crops are there."""
    command = [sys.executable, ROOT / "preprocess.py", "--demo", "5000", "--dataroot", outdir, "--workers", workers]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    while len(list(outdir.rglob("*.png"))) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


# ---------------------------------------------------------------------------------------------- second runs


def test_second_run_does_only_what_is_missing(tmp_path, convert, capsys):
    for i in range(3):
        gradient().save(tmp_path / "src" / f"{i}.jpg")
    out = convert()
    kept, gone, _ = sorted(out.rglob("*.png"))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    capsys.readouterr()
    convert()
    assert "1 written" in (last := capsys.readouterr().out) and "2 there already" in last
    assert kept.stat().st_mtime_ns == before and gone.exists()


def level(folder, name):
    return crop_of(folder, name)[0, 0, 0]


def grey(path, number):
    Image.new("RGB", (80, 80), (number,) * 3).save(path)


def zip_folder(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for photo in sorted(folder.iterdir()):
            archive.write(photo, photo.name)
    return path


@pytest.mark.parametrize("zipped", [False, True])
def test_a_changed_photo_gives_a_new_crop(tmp_path, capsys, zipped):
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()

    def preprocess_src():
        photos = zip_folder(src, tmp_path / "src.zip") if zipped else src
        preprocess.main([str(photos), "--dataroot", str(out), "--sizes", "64", "32", "--workers", "0"])
        return capsys.readouterr().out

    grey(src / "a.png", 10)
    grey(src / "b.png", 20)
    preprocess_src()
    grey(src / "b.png", 99)
    last = preprocess_src()
    assert "64: 1 written (1 train), 1 there already" in last and "32: 1 written" in last
    assert (level(out, "a"), level(out, "b")) == (10, 99)
    (src / "b.png").write_bytes(b"damaged")
    preprocess_src()
    assert named(out) == named(out, 32) == ["a"]  # no crop of a photo that is not there any more


@pytest.mark.parametrize("new", ["a.jpg", "A.png", "a.bmp"])  # before and after a.png in sorted order
def test_names_of_crops_stay_with_their_photos(tmp_path, convert, new):
    src = tmp_path / "src"
    grey(src / "a.png", 10)
    convert("--sizes", "32")
    grey(src / new, 99)
    for size in (64, 32):  # the tables of all sizes count
        out = convert("--sizes", str(size))
        assert sorted(crop_of(out, name, size)[0, 0, 0] for name in named(out, size)) == [10, 99]
        assert crop_of(out, "a", size)[0, 0, 0] == 10
    (src / "a.png").unlink()
    grey(src / "a.tif", 50)  # converted: the name is free
    assert level(convert(), "a") == 50


def test_crops_without_a_photo_are_named(tmp_path, convert, capsys):
    """Their photo is gone, or the list does not name it any more. They stay, since a user may want them."""
    src, partition = tmp_path / "src", tmp_path / "list.txt"
    for name in "abc":
        grey(src / f"{name}.png", 10)
    partition.write_text("a.png 0\nb.png 0\nc.png 0\n")
    convert("--partition", str(partition))
    assert "warning" not in capsys.readouterr().out
    (src / "b.png").unlink()
    partition.write_text("a.png 0\nb.png 0\n")
    for _ in range(2):
        out = convert("--partition", str(partition))
        assert "warning: 2 crops are of photos that are not in SRC or its list any more" in capsys.readouterr().out
        gone = {str(out / "64" / "train" / f"{name}.png") for name in "bc"}
        assert {name for name, reason in skips(out).items() if "not in SRC" in reason} == gone and len(named(out)) == 3
    partition.write_text("a.png 0\nc.png 0\n")
    convert("--partition", str(partition))
    assert "64: 0 written, 2 there already" in capsys.readouterr().out


def test_crops_of_another_source_are_refused(tmp_path, convert):
    """Of the same names, or drawn faces. The same photos in another place go on."""
    grey(tmp_path / "src" / "0.png", 10)
    out = convert()
    (tmp_path / "two").mkdir()
    grey(tmp_path / "two" / "0.png", 99)
    flags = ["--dataroot", str(out), "--sizes", "64"]
    for source in ([str(tmp_path / "two")], ["--demo", "3"]):
        with pytest.raises(UserError, match=f"64 holds crops of {tmp_path / 'src'}; choose another --dataroot for"):
            preprocess.main([*source, *flags])
    assert level(out, "0") == 10 and named(out) == ["0"]
    (tmp_path / "src").rename(tmp_path / "moved")
    preprocess.main([str(tmp_path / "moved"), *flags])
    grey(tmp_path / "moved" / "0.png", 50)
    preprocess.main([str(tmp_path / "moved"), *flags])
    assert level(out, "0") == 50


@pytest.mark.parametrize("table", [None, b"", b"[]\n", b'"x"\n[1]\n', b'"x"\n["../../a", "0.png", 1, 2]\n', b"\xff"])
def test_crops_of_older_versions_and_damaged_tables(tmp_path, convert, capsys, table):
    """The crops are taken as they are, with one line, and have a table from then on. No table leads out of data."""
    grey(tmp_path / "src" / "0.png", 10)
    out = convert()
    (out / "64" / "photos.jsonl").unlink()
    if table is not None:
        (out / "64" / "photos.jsonl").write_bytes(table)
    capsys.readouterr()
    if table and b".." in table:
        with pytest.raises(UserError, match="holds crops of x"):
            convert()
        (out / "64" / "train" / "0.png").unlink()
    convert()
    assert ("no sound photos.jsonl" in capsys.readouterr().out) == (not table or b".." not in table)
    grey(tmp_path / "src" / "0.png", 99)
    out = convert()
    assert "no sound" not in capsys.readouterr().out and level(out, "0") == 99 and named(out) == ["0"]
    assert not (tmp_path / "a.png").exists()


def test_a_demo_that_was_cut_short_is_completed(tmp_path, capsys):
    folder = tmp_path / "64" / "train"
    preprocess.draw_demo(tmp_path, 64, number=40)
    whole = sorted(folder.parent.rglob("*.png"))
    assert len(whole) == 40
    folder.joinpath(whole[-1].name).unlink()
    capsys.readouterr()
    preprocess.draw_demo(tmp_path, 64, number=40)
    assert "1 written" in capsys.readouterr().out and sorted(folder.parent.rglob("*.png")) == whole
    preprocess.draw_demo(tmp_path, 64, number=40)
    (tmp_path / "src").mkdir()
    grey(tmp_path / "src" / "photo.png", 10)
    preprocess.main([str(tmp_path / "src"), "--dataroot", str(tmp_path / "own"), "--sizes", "64"])
    capsys.readouterr()
    preprocess.draw_demo(tmp_path / "own", 64, number=40)
    assert capsys.readouterr().out == "" and named(tmp_path / "own") == ["photo"]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path, convert):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    out = convert()
    old, new = out / "64" / "train" / ".1.tmp", out / "64" / "train" / ".2.tmp"
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    convert()
    assert not old.exists() and new.exists()  # the new file may belong to another run


def test_kill_leaves_whole_files_only(tmp_path):
    process = start_preprocess(tmp_path, "1")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert_whole_pngs(tmp_path)


# ---------------------------------------------------------------------------------------------- workers


def test_worker_processes_write_the_same_bytes_as_one_process(tmp_path):
    for workers in ("0", "2"):
        preprocess.main(["--demo", "40", "--dataroot", str(tmp_path / workers), "--workers", workers])
    paths = sorted((tmp_path / "0").rglob("*.png"))
    assert len(paths) == 80
    assert all(path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "0")).read_bytes() for path in paths)


DEMO_FLAGS = ["--demo", "40", "--sizes", "64", "--workers", "2", "--dataroot", "out"]


def test_works_with_spawned_processes(tmp_path):
    """Windows and macOS start processes in this way."""
    done = run_python(PROGRAMS / "spawn_preprocess.py", *DEMO_FLAGS, cwd=tmp_path)
    assert done.returncode == 0 and "40 written" in done.stdout, done.stderr


def test_works_without_shared_memory(run_without_shared_memory):
    done = run_without_shared_memory(ROOT / "preprocess.py", *DEMO_FLAGS)
    assert done.returncode == 0 and "40 written" in done.stdout, done.stderr


@pytest.fixture
def running(tmp_path):
    """A run with two worker processes that has begun to write, and the process IDs of the workers."""
    # A test suite in the background of a shell ignores SIGINT and its children inherit that. A terminal does not.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = start_preprocess(tmp_path / "out", "2", preexec_fn=listen)
    workers = child_processes(process)
    if workers is None:
        process.kill()
        pytest.skip("needs /proc")
    yield process, workers
    process.kill()
    process.communicate()


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent(tmp_path, running, number, code):
    process, workers = running
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == code and "Traceback" not in errors
    assert number == signal.SIGKILL or "run the same command again" in errors
    end = time.time() + 10
    while any(map(alive, workers)) and time.time() < end:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(alive, workers))
    assert_whole_pngs(tmp_path)


def test_a_killed_worker_gives_one_clear_error(running):
    process, workers = running
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "worker process was killed" in errors and "--workers" in errors


# ---------------------------------------------------------------------------------------------- paths and data


def test_paths_with_spaces_and_unicode_from_another_folder(tmp_path, run_script):
    (tmp_path / "my photos é").mkdir()
    (tmp_path / "my photos é" / "a b.jpg").write_bytes(jpeg())
    done = run_script("preprocess.py", "my photos é", "--dataroot", "out ü", "--sizes", "64")
    assert done.returncode == 0 and named(tmp_path / "out ü") == ["a b"], done.stderr


def test_failed_download_names_the_files_and_their_folder(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision").datasets
    monkeypatch.setattr(datasets, "CelebA", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("quota\nexceeded")))
    with pytest.raises(UserError) as stop:
        preprocess.main(["--download", "--dataroot", str(tmp_path)])
    for words in ("img_align_celeba.zip", "list_eval_partition.txt", str(tmp_path / "celeba"), "python preprocess.py"):
        assert words in str(stop.value)
    assert "\n" not in str(stop.value)
    (tmp_path / "celeba").mkdir()  # the user downloads the files by hand; the same command continues
    with zipfile.ZipFile(tmp_path / "celeba" / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", jpeg())
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 2\n")
    preprocess.main(["--download", "--dataroot", str(tmp_path), "--sizes", "64"])
    assert "1 written (1 test)" in capsys.readouterr().out


def test_real_photos(tmp_path, shared):
    """200 photos of CelebA: every photo gives a crop, in the split of CelebA's partition file."""
    with (
        zipfile.ZipFile(shared / "data" / "img_align_celeba_16k.zip") as whole,
        zipfile.ZipFile(tmp_path / "part.zip", "w") as part,
    ):
        for name in whole.namelist()[:200]:
            part.writestr(name, whole.read(name))
    partition = shared / "data" / "list_eval_partition.txt"
    flags = ["--partition", str(partition), "--dataroot", str(tmp_path / "out")]
    preprocess.main([str(tmp_path / "part.zip"), *flags])
    assert len(named(tmp_path / "out")) == 200 and 0 < len(named(tmp_path / "out", 128)) < 200
    assert skips(tmp_path / "out") == {}
    rows = dict(line.split() for line in partition.read_text().splitlines())
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.parent.name == SPLITS[int(rows[path.stem + ".jpg"])]
