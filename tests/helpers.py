"""What the tests, kill_train.py and fuzz_preprocess.py share: photos, small trainings, processes and comparisons.

torch and the scripts are imported inside the functions: fuzz_preprocess.py and its workers run without torch.
"""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "tests" / "programs"
if str(ROOT) not in sys.path:  # `python tests/kill_train.py` searches for modules in tests/ only
    sys.path.insert(0, str(ROOT))


# ---------------------------------------------------------------------------------------------- photos and crops


def gradient(width=100, height=140):
    """A photo whose pixels encode their position: red increases to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8))


def jpeg(image=None):
    """The bytes of a JPEG file."""
    buffer = io.BytesIO()
    (image or gradient()).save(buffer, "JPEG")
    return buffer.getvalue()


def crop_of(folder, name, size=64):
    """The pixels of one crop in the data root `folder`: (size, size, 3), int."""
    path = next((folder / str(size)).rglob(f"{name}.png"))
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (size, size)
        return np.asarray(image).astype(int)


def named(folder, size=64):
    """The sorted names of all crops in the data root `folder`, without .png."""
    return sorted(path.stem for path in (folder / str(size)).rglob("*.png"))


def skips(folder):
    """skipped.txt in the data root `folder` as {photo: reason}."""
    return dict(line.split(": ", 1) for line in (folder / "skipped.txt").read_text(encoding="utf-8").splitlines())


def assert_whole_pngs(folder):
    """Every PNG file below `folder` decodes."""
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


# ---------------------------------------------------------------------------------------------- processes


def run_python(*arguments, cwd, **environment):
    """Runs `python <arguments>` with one thread; returns the finished process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def torchrun(processes):
    """The arguments of Python that start `processes` processes of the script that follows."""
    # Without "--", torchrun takes flags of the script for abbreviations of its flags, such as --num.
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]


def rank_environment(rank, processes, address="127.0.0.1", port=29500):
    """The environment of a process that torchrun would start as number `rank`. Without its launcher, seconds less."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": address, "MASTER_PORT": port}
    return os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in variables.items()}


def start_ranks(script, *flags_of_ranks, cwd):
    """A process of `script` for each list of flags. All are joined, as those of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = []
    for rank, flags in enumerate(flags_of_ranks):
        environment = rank_environment(rank, len(flags_of_ranks), port=port)
        command = [sys.executable, *map(str, (ROOT / script, *flags))]
        processes.append(subprocess.Popen(command, cwd=cwd, env=environment, **pipes))
    return processes


def errors(message):
    """The lines of standard error that a UserError or the loss of another process has written."""
    assert "Traceback" not in message, message
    return [line for line in message.splitlines() if line.startswith("error: ")]


def wait_for(happened, process: subprocess.Popen) -> None:
    """Until happened() is true. Raises AssertionError when the process has ended before."""
    while not happened():
        assert process.poll() is None, f"ended by itself with {process.returncode}: {process.stderr.read()[-2000:]}"
        time.sleep(0.001)


def child_processes(process: subprocess.Popen) -> list[int] | None:
    """The process IDs of the children; None on a system without /proc."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in children.read_text().split()] if children.exists() else None


# ---------------------------------------------------------------------------------------------- trainings

# Flags of a training that takes about a second per epoch.
SMALL = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]


def small_args(*flags):
    """The parsed arguments of a small training."""
    import train

    return train.parse_args([*SMALL, *flags])


def run_training(dataroot, outdir, *flags):
    """A small training in this process."""
    import train

    train.main([*SMALL, "--dataroot", str(dataroot), "--outdir", str(outdir), *map(str, flags)])


def start(dataroot: Path, outdir: Path, processes: int, *flags) -> subprocess.Popen:
    """Starts a small training in one process, or in `processes` processes under torchrun."""
    launcher = torchrun(processes) if processes > 1 else []
    command = [sys.executable, *launcher, ROOT / "train.py", *SMALL, "--dataroot", dataroot, "--outdir", outdir, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    options = {"preexec_fn": listen_to_ctrl_c} if os.name == "posix" else {}
    return subprocess.Popen([*map(str, command)], env=environment, text=True, **pipes, **options)


def listen_to_ctrl_c():
    """For a child process: a suite in a shell's background ignores SIGINT, and a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_one_of_two(dataroot, folder, *flags):
    """Kills one of two processes of a small training. The other must say so and end, without a wait for it."""
    flags = [*SMALL, "--dataroot", dataroot, "--outdir", folder / "run", "--epochs", 500, *flags]
    first, second = start_ranks("train.py", flags, flags, cwd=folder)
    wait_for(lambda: (folder / "run" / "log.jsonl").exists() and len(log_rows(folder / "run")) > 2, first)
    second.kill()
    second.communicate()
    _, message = first.communicate(timeout=60)
    assert first.returncode == 1
    assert len(errors(message)) == 1 and "another process has ended" in errors(message)[0], message


def load(path):
    """The content of a checkpoint or of a file of weights."""
    import torch

    return torch.load(path, weights_only=True)


def log_rows(outdir):
    """The rows of log.jsonl."""
    return [json.loads(line) for line in (outdir / "log.jsonl").read_text().splitlines()]


def assert_equal(a, b):
    """Bit by bit, through nested dictionaries and lists."""
    import torch

    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_training(one, other):
    """Two output folders hold the same weights, checkpoint and log, bit by bit, except for images_per_sec."""
    for name in ("generator.params", "generator_raw.params", "checkpoint.pt"):
        assert_equal(load(one / name), load(other / name))
    logs = [log_rows(folder) for folder in (one, other)]
    for rows in logs:
        for row in rows:
            del row["images_per_sec"], row["epoch_images_per_sec"]  # these depend on the speed of the machine
    assert logs[0] == logs[1]


# ---------------------------------------------------------------------------------------------- Inception and FID


def random_inception(tf2015):
    """Inception-v3 with the names and shapes of the published weights, and random weights whose features vary."""
    import torch
    from torch import nn
    from torchvision.models.inception import Inception3

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


def fid(a, b):
    """The FID of two sets of features."""
    import torch

    from support.metrics import frechet_distance, mean_and_covariance

    return frechet_distance(*(x for side in (a, b) for x in mean_and_covariance(torch.as_tensor(side))))
