"""Kills a small CPU training many times and resumes it: the result must equal that of an uninterrupted training.

    python tests/kill_train.py --kills 30                            # kill -9 at random moments, fp32
    python tests/kill_train.py --kills 30 --precision bf16
    python tests/kill_train.py --kills 30 --processes 2              # both processes of torchrun
    python tests/kill_train.py --kills 30 --signal TERM              # the signal that a spot instance gets

Every third kill waits until a file is being written. The exit code is 1 unless generator.params,
generator_raw.params, the whole checkpoint, the samples and log.jsonl equal those of an uninterrupted training, bit by
bit. The only exception is images_per_sec in log.jsonl.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import assert_same_training, child_processes, start, wait_for

import preprocess
from support.cli import HelpFormatter, int_at_least, run
from support.files import UserError


def stamp(outdir: Path) -> int:
    """The time of the newest checkpoint in ns; 0 before the first one and while a new one replaces the last."""
    try:
        return (outdir / "checkpoint.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def kill_all(process: subprocess.Popen) -> None:
    """kill -9 of the process and its children, one by one: torchrun puts each child into a separate process group."""
    for number in (process.pid, *(child_processes(process) or [])):
        os.kill(number, signal.SIGKILL)


def kill_at_random(process: subprocess.Popen, outdir: Path, number: int, while_writing: bool, rng: random.Random):
    """Sends signal `number` at a random moment after a new checkpoint; returns stderr once all processes have ended."""
    before = stamp(outdir)
    wait_for(lambda: stamp(outdir) not in (0, before), process)
    time.sleep(rng.uniform(0, 0.5))
    if while_writing:
        wait_for(lambda: any(outdir.rglob(".*.tmp")), process)
    if number == signal.SIGKILL:
        kill_all(process)
    else:
        process.send_signal(number)  # torchrun forwards it to its processes
    return process.communicate(timeout=60)[1]


def kill(folder: Path, kills: int, flags: list, processes: int = 1, number: int = signal.SIGKILL, seed: int = 0) -> int:
    """Trains in folder/whole without interruption and in folder/killed with `kills` interruptions.

    Returns how many kills left a half-written file. Raises AssertionError when the two trainings differ, or when a
    training ends before its kill.
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--kills", type=int_at_least(1), default=30, help="number of kills")
    parser.add_argument("--epochs", type=int_at_least(1), default=150, help="epochs of 5 steps")
    parser.add_argument("--processes", type=int_at_least(1), default=1, help="processes of torchrun")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the moments")
    args = parser.parse_args(argv)
    folder, begin = Path(tempfile.mkdtemp(prefix="kill-")), time.perf_counter()
    number = getattr(signal, f"SIG{args.signal}")
    try:
        flags = ["--epochs", args.epochs, "--precision", args.precision]
        torn = kill(folder, args.kills, flags, args.processes, number, args.seed)
    except AssertionError as error:
        raise UserError(f"{error}; the trainings are in {folder}") from None
    print(f"{args.kills} times SIG{args.signal}, {args.processes} process(es), {args.precision}: the same bits; "
          f"{torn} kills left a half-written file; {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    run(main)
