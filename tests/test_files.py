"""Files appear whole or not at all: support/files.py, and the scripts on full and read-only disks."""

import errno
import os
import shutil
import stat
import subprocess

import pytest
import torch
from helpers import ROOT, SMALL, assert_same_training, assert_whole_pngs, run_python, run_training

from support import files
from support.files import UserError, atomic_write


def remount(disk, access):
    """Makes a mounted file system read-only ("ro") or writable ("rw")."""
    subprocess.run(["mount", "-o", f"remount,{access}", disk], check=True)


def test_atomic_write_leaves_nothing_half_written(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="cannot write"), atomic_write(tmp_path / "no" / "file"):
        pass


def test_the_commit_is_not_that_of_a_repository_around_the_files(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert len(files.git_commit()) == 40
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(files, "ROOT", tmp_path / "unpacked")
    assert files.git_commit() is None


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    """Lustre without flock, NFS without a lock daemon. A lock that another training holds stays a refusal."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "lock_file", no_locks)
    files.open_outdir(tmp_path / "run", resume=False).close()
    assert "has no locks" in capsys.readouterr().err


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    sync = os.fsync

    def sync_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_files_only)
    with atomic_write(tmp_path / "file", durable=True) as file:
        file.write(b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_atomic_write_to_a_name_of_255_bytes(tmp_path):
    with atomic_write(tmp_path / ("n" * 255), durable=True) as file:
        file.write(b"whole")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"whole"
    with pytest.raises(UserError, match="name too long"), atomic_write(tmp_path / ("n" * 256)):
        pass


def test_atomic_write_explains_the_error_of_torch_save_on_a_full_disk(small_disk):
    """torch.save raises a RuntimeError there."""
    (small_disk / "params").write_bytes(b"before")
    with (
        pytest.raises(UserError, match="No space left"),
        atomic_write(small_disk / "params", durable=True) as file,
    ):
        torch.save(torch.zeros(2 * 10**6), file)
    assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("params", b"before")]


@pytest.mark.parametrize("workers", [0, 2])
def test_preprocess_on_a_full_disk(small_disk, run_script, refused, workers):
    (small_disk / "filler").write_bytes(bytes(3_900_000))
    done = run_script("preprocess.py", "--demo", 200, "--dataroot", small_disk, "--sizes", 64, "--workers", workers)
    refused(done, "cannot write", "No space left", "free some space")
    assert not list(small_disk.rglob("*.tmp"))
    assert_whole_pngs(small_disk)


def test_preprocess_on_a_read_only_disk(small_disk, run_script, refused):
    remount(small_disk, "ro")
    refused(run_script("preprocess.py", "--demo", 2, "--dataroot", small_disk), "cannot write", "Read-only")


def test_training_on_a_full_and_on_a_read_only_disk(dataroot, tmp_path, small_disk):
    """The error is one sentence. The training resumes from its last checkpoint once the disk has space again."""
    run_training(dataroot, tmp_path / "whole", "--epochs", 3)
    run_training(dataroot, small_disk / "run", "--epochs", 1)
    resume = ["--epochs", 3, "--resume"]
    kept = (small_disk / "run" / "checkpoint.pt").read_bytes()
    with pytest.raises(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    with pytest.raises(UserError, match=f"cannot write {small_disk / 'run'}.*No space left.*free some space"):
        run_training(dataroot, small_disk / "run", *resume)
    remount(small_disk, "ro")
    with pytest.raises(UserError, match=f"cannot write .*{small_disk / 'run'}.*Read-only"):
        run_training(dataroot, small_disk / "run", *resume)
    remount(small_disk, "rw")
    assert (small_disk / "run" / "checkpoint.pt").read_bytes() == kept
    (small_disk / "filler").unlink()
    run_training(dataroot, small_disk / "run", *resume)
    assert_same_training(tmp_path / "whole", small_disk / "run")


def test_training_from_a_read_only_checkout(dataroot, tmp_path, small_disk):
    for script in ROOT.glob("*.py"):
        shutil.copy(script, small_disk)
    shutil.copytree(ROOT / "support", small_disk / "support", ignore=shutil.ignore_patterns("__pycache__"))
    remount(small_disk, "ro")
    done = run_python(small_disk / "train.py", *SMALL, "--dataroot", dataroot, "--epochs", 1, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "runs" / "64" / "generator.params").exists(), done.stderr
