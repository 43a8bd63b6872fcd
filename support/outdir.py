"""The output folder of a training: the names in it, what refuses it, and its lock. Imports no torch.

    lock = open_outdir(args.outdir, args.resume)
    params = args.params or default_params()
"""

import os
from pathlib import Path
from typing import TextIO

from support.files import UserError, printable

CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest first
TRAINED = Path("runs/64/generator.params")
PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained" / "generator_64.params"
PARAMS_REMEDY = "make one with `python train.py`, or pass another to --params"


def default_params() -> Path:
    """The generator that train.py made here. If there is none, the pretrained one."""
    return TRAINED if TRAINED.exists() or not PRETRAINED.exists() else PRETRAINED


def name_last_checkpoint(outdir: Path) -> str:
    newest = outdir / CHECKPOINTS[0]
    return f"the last good checkpoint is {newest}" if newest.exists() else "there is no checkpoint yet"


def check_outdir(outdir: Path, resume: bool) -> None:
    """Raise UserError when `outdir` holds a training, or with `resume` when it holds none."""
    shown = printable(outdir)
    has_checkpoint = any((outdir / name).exists() for name in CHECKPOINTS)
    if has_checkpoint and not resume:
        raise UserError(f"{shown} holds a training; go on by --resume, or choose another --outdir")
    if not has_checkpoint and (outdir / "generator.params").exists():
        raise UserError(f"{shown} holds the generator.params of another training; choose another --outdir")
    if resume and not has_checkpoint:
        raise UserError(f"--resume: there is no checkpoint in {shown}; leave out --resume to start one")


def open_outdir(outdir: Path, resume: bool) -> TextIO:
    """Make `outdir` and lock it. The system releases the lock however this process ends. Raises UserError."""
    check_outdir(outdir, resume)
    shown = printable(outdir)
    try:
        (outdir / "samples").mkdir(parents=True, exist_ok=True)
        lock = (outdir / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to --outdir {shown} ({error.strerror}); choose another") from None
    try:
        lock_file(lock)
    except OSError:
        raise UserError(f"another training is running in {shown}; choose another --outdir") from None
    for leftover in outdir.rglob(".*.tmp"):  # of a killed training: the lock proves that no other is writing them
        leftover.unlink(missing_ok=True)
    return lock


def lock_file(file: TextIO) -> None:
    """Lock an open file for this process alone. Raises OSError when another process has locked it."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
