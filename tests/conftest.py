"""What several tests share: small crops, and the scripts run as a user runs them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.inception import Inception3

import preprocess

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataroot(tmp_path_factory):
    """48 drawn faces at 64x64 and 128x128."""
    folder = tmp_path_factory.mktemp("data")
    preprocess.main(["--demo", "48", "--dataroot", str(folder), "--workers", "0"])
    return folder


@pytest.fixture
def run_script(tmp_path):
    """Runs `python <script> <arguments>` in an empty folder; returns the finished process."""

    def run(script, *arguments, cwd=tmp_path):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_HOME": str(tmp_path / "empty")}
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def refused():
    """Asserts that a process ended by one sentence that holds `words`, with a non-zero exit and no traceback."""

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


def random_inception(tf2015):
    """A network with the names and shapes of the real files, and features that vary."""
    torch.manual_seed(0)
    net = Inception3(aux_logits=not tf2015, init_weights=False, num_classes=1008 if tf2015 else 1000)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.02, 0.1)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of Inception weights as pytorch-fid's is."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(random_inception(tf2015=True).state_dict(), path)
    return path
