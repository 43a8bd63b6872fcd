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
    gradient,
    jpeg,
    named,
    run_python,
    skips,
)

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
