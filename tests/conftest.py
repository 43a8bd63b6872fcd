"""Fixtures that several test files use: small data, a finished training, and the scripts as a user runs them."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic needs it before cuBLAS is first called

import torch
from helpers import ROOT, random_inception, run_python, run_training

import evaluate
import preprocess

collect_ignore = ["programs"]
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataroot(tmp_path_factory):
    """48 drawn faces at 64x64 and 128x128."""
    folder = tmp_path_factory.mktemp("data")
    preprocess.main(["--demo", "48", "--dataroot", str(folder), "--workers", "0"])
    return folder


@pytest.fixture(scope="session")
def trained(dataroot, tmp_path_factory):
    """The output folder of a finished training of two epochs. Tests that change files work on a copy."""
    outdir = tmp_path_factory.mktemp("trained") / "run"
    run_training(dataroot, outdir, "--epochs", 2)
    return outdir


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of random Inception weights in the format of pytorch-fid."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception(tf2015=True).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def shared():
    """The folder with real photos and real Inception weights."""
    if "FAKEFACEGEN_SHARED" not in os.environ:
        pytest.skip("needs FAKEFACEGEN_SHARED, a folder with data/img_align_celeba_16k.zip, "
                    "data/list_eval_partition.txt and weights/inception_2015-12-05_half.pth")
    return Path(os.environ["FAKEFACEGEN_SHARED"])


@pytest.fixture
def convert(tmp_path):
    """Preprocesses the photos in tmp_path/src at 64x64 and returns the data root."""

    def run(*flags):
        src, out = tmp_path / "src", tmp_path / "out"
        preprocess.main([str(src), "--dataroot", str(out), "--sizes", "64", "--workers", "0", *flags])
        return out

    (tmp_path / "src").mkdir()
    return run


@pytest.fixture
def run_script(tmp_path):
    """Runs `python <script> <arguments>` in an empty folder; returns the finished process."""

    def run(script, *arguments, cwd=tmp_path):
        return run_python(ROOT / script, *arguments, cwd=cwd, TORCH_HOME=str(tmp_path / "empty"))

    return run


@pytest.fixture
def refused():
    """Asserts that a process ended with one sentence that holds `words`, a non-zero exit code and no traceback."""

    def check(process, *words):
        assert process.returncode != 0, process.stdout
        assert "Traceback" not in process.stderr, process.stderr
        message = [line for line in process.stderr.splitlines() if "error:" in line]
        assert len(message) == 1, process.stderr
        for word in words:
            assert str(word) in message[0], message[0]

    return check


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def tf32():
    """TF32 for matrix products, as NVIDIA's containers switch it on. cuDNN uses it for convolutions by default."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def run_evaluate(dataroot, weights, capsys):
    """Runs evaluate.py's main() with random weights and 64 dimensions; returns stdout and stderr."""

    def run(*flags):
        given = ["--weights", weights, "--dims", "64", "--inception", "tf2015", "--dataroot", dataroot]
        flags = [*given, "--device", "cpu", *flags]  # numbers are compared to the last digit
        evaluate.main([str(flag) for flag in flags])
        return capsys.readouterr()

    return run


@pytest.fixture
def run_with_shared_memory(tmp_path):
    """Runs `python <arguments>` with a /dev/shm that is mounted with `options`, such as "size=64k"."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("needs the right to unshare")

    def run(options, *arguments):
        mount = f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def run_without_shared_memory(run_with_shared_memory):
    """Runs `python <arguments>` with a read-only /dev/shm, as many containers have: it can create no semaphores."""
    return partial(run_with_shared_memory, "ro")
