"""Kills one small CPU training again and again: what --resume makes of it must be what no interruption gives.

    python tests/kill_train.py --kills 30                            # kill -9 at random moments, fp32
    python tests/kill_train.py --kills 30 --precision bf16
    python tests/kill_train.py --kills 30 --processes 2              # both processes of torchrun
    python tests/kill_train.py --kills 30 --signal TERM              # as a spot instance is taken

Every third kill waits for the moment in which a file is being written. Fails (exit 1) unless generator.params,
generator_raw.params, the whole checkpoint, the samples and log.jsonl are those of an uninterrupted training, bit by
bit (but for images_per_sec).
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from support.cli import Formatter, natural

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch  # noqa: E402

import preprocess  # noqa: E402

SMALL = ["--ngf", "4", "--ndf", "4", "--nz", "8", "--batch-size", "8", "--device", "cpu", "--precision", "fp32"]
TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def load(path):
    return torch.load(path, weights_only=True)


def assert_equal(a, b):
    """Bit by bit, through nested dictionaries and lists."""
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
    for name in ("generator.params", "generator_raw.params", "checkpoint.pt"):
        assert_equal(load(one / name), load(other / name))
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, other)]
    for rows in logs:
        for row in rows:
            del row["images_per_sec"]  # the one field that tells of the machine
    assert logs[0] == logs[1]


def start(dataroot: Path, outdir: Path, processes: int, *flags) -> subprocess.Popen:
    """A training of one process, or of `processes` under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if processes > 1 else []
    command = [sys.executable, *torchrun, TRAIN, *SMALL, "--dataroot", dataroot, "--outdir", outdir, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([*map(str, command)], env=environment, text=True, **pipes)


def wait_for(happened, process: subprocess.Popen) -> None:
    """Until happened() is true. Raises AssertionError when the process has ended before."""
    while not happened():
        assert process.poll() is None, f"ended by itself with {process.returncode}: {process.stderr.read()[-2000:]}"
        time.sleep(0.001)


def stamp(outdir: Path) -> int:
    """Changes with each new checkpoint."""
    try:
        return (outdir / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:  # none yet, or between two
        return 0


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 of the process and of those that it has started: torchrun gives each a group of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    for number in (process.pid, *map(int, workers)):
        os.kill(number, signal.SIGKILL)


def kill_at_random(process: subprocess.Popen, outdir: Path, number: int, while_writing: bool, rng: random.Random):
    """Sends signal `number` some moment after the first new checkpoint, and waits for the end of all processes."""
    before = stamp(outdir)
    wait_for(lambda: stamp(outdir) not in (0, before), process)
    time.sleep(rng.uniform(0, 0.5))
    if while_writing:
        wait_for(lambda: any(outdir.rglob(".*.tmp")), process)
    if number == signal.SIGKILL:
        kill_all(process)
    else:
        process.send_signal(number)  # torchrun hands it on
    return process.communicate(timeout=60)[1]


def kill(folder: Path, kills: int, flags: list, processes: int = 1, number: int = signal.SIGKILL, seed: int = 0) -> int:
    """Trains in folder/whole and, killed `kills` times, in folder/killed. Returns how often a file was half-written.

    Raises AssertionError where the two differ, or where a training ends before it is killed.
    """
    preprocess.main(["--demo", "48", "--dataroot", str(folder / "data"), "--workers", "0", "--sizes", "64"])
    flags = [*flags, "--checkpoint-every", 1]
    whole = start(folder / "data", folder / "whole", processes, *flags)
    message = whole.communicate()[1]
    assert whole.returncode == 0, message
    rng, outdir, torn = random.Random(seed), folder / "killed", 0
    for i in range(kills):
        process = start(folder / "data", outdir, processes, *flags, *["--resume"] * (i > 0))
        message = kill_at_random(process, outdir, number, i % 3 == 0, rng)
        assert number == signal.SIGKILL or f"--resume --outdir {outdir}" in message, message
        torn += any(outdir.rglob(".*.tmp"))
        if sys.stdout.isatty() or kills > 5:
            print(f"kill {i + 1} of {kills}, {torn} of them left a half-written file", flush=True)
    last = start(folder / "data", outdir, processes, *flags, "--resume")
    message = last.communicate()[1]
    assert last.returncode == 0, message
    assert_same_training(folder / "whole", outdir)
    samples = [sorted((run / "samples").iterdir()) for run in (folder / "whole", outdir)]
    assert [path.name for path in samples[0]] == [path.name for path in samples[1]], "other samples"
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*samples)), "other samples"
    assert not any(outdir.rglob(".*.tmp")), "a half-written file was left behind"
    return torn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    parser.add_argument("--kills", type=natural(1), default=30, help="times")
    parser.add_argument("--epochs", type=natural(1), default=150, help="of 5 steps each")
    parser.add_argument("--processes", type=natural(1), default=1, help="of torchrun")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=natural(0), default=0, help="of the moments")
    args = parser.parse_args(argv)
    folder, begin = Path(tempfile.mkdtemp(prefix="kill-")), time.perf_counter()
    number = getattr(signal, f"SIG{args.signal}")
    try:
        flags = ["--epochs", args.epochs, "--precision", args.precision]
        torn = kill(folder, args.kills, flags, args.processes, number, args.seed)
    except AssertionError as error:
        raise SystemExit(f"error: {error}; the trainings are in {folder}") from None
    print(f"{args.kills} times SIG{args.signal}, {args.processes} process(es), {args.precision}: the same bits; "
          f"{torn} kills left a half-written file; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
