"""A training on the disk: its checkpoints, parameters, log and lock. What --resume goes on from.

    from checkpoint import State, open_outdir, save_checkpoint, load_checkpoint

Every file is written under another name, flushed to the disk and renamed: it is whole or it is not there. The
checkpoint before the newest stays until the newest is whole, and takes its place where that is damaged later.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import nn

from support.files import atomic_write, printable
from support.weights import load_tensors, nested_tensors, save_tensors

CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest first
# What has to be the same for a resumed training to be the same training.
FIXED = ("image_size", "batch_size", "lr", "beta1", "nz", "ngf", "ndf", "ema", "augment", "group_norm")
FIXED += ("precision", "seed", "data_sha256")


@dataclass
class State:
    """All that a step changes. `totals` holds sums of loss_d, loss_g, D(x), D(G(z)) since the last row of the log.

    `graph` is how the step is launched, where not as a plain function.
    """

    netG: nn.Module
    netD: nn.Module
    average: nn.Module
    optG: torch.optim.Optimizer
    optD: torch.optim.Optimizer
    totals: torch.Tensor
    graph: Callable | None = None
    step: int = 0

    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("netG", "netD", "average", "optG", "optD")}


def open_outdir(args: argparse.Namespace):
    """Makes --outdir and locks it: the system lets go of the lock however this process ends."""
    outdir = printable(args.outdir)
    begun = any((args.outdir / name).exists() for name in CHECKPOINTS)
    if begun and not args.resume:
        raise SystemExit(f"error: {outdir} holds a training; go on by --resume, or choose another --outdir")
    if not begun and (args.outdir / "generator.params").exists():
        raise SystemExit(f"error: {outdir} holds the generator.params of another training; choose another --outdir")
    if args.resume and not begun:
        raise SystemExit(f"error: --resume: there is no checkpoint in {outdir}; leave out --resume to start one")
    try:
        (args.outdir / "samples").mkdir(parents=True, exist_ok=True)
        lock = (args.outdir / ".lock").open("w")
    except OSError as error:
        raise SystemExit(f"error: cannot write to --outdir {outdir} ({error.strerror}); choose another") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"error: another training is running in {outdir}; choose another --outdir") from None
    for left in args.outdir.rglob(".*.tmp"):  # by a killed training: the lock says that no other is writing them
        left.unlink(missing_ok=True)
    return lock


def save_params(state: State, outdir: Path) -> None:
    for net, name in ((state.average, "generator.params"), (state.netG, "generator_raw.params")):
        save_tensors(net.state_dict(), outdir / name)


def save_checkpoint(state: State, args: argparse.Namespace) -> None:
    """Everything that the next step depends on. The checkpoint before it stays until the new one is whole."""
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "totals": state.totals, "fixed": {name: getattr(args, name) for name in FIXED}}
    newest, previous = (args.outdir / name for name in CHECKPOINTS)
    with atomic_write(newest, durable=True) as file:
        torch.save(content, file)
        file.flush()
        if newest.exists():
            newest.replace(previous)


def load_checkpoint(state: State, args: argparse.Namespace) -> None:
    """Puts the last whole checkpoint of --outdir into `state`. Raises SystemExit when there is none that fits."""
    problems = []
    for name in CHECKPOINTS:
        try:
            content = load_tensors(args.outdir / name, "leave out --resume to start anew in another --outdir")
            break
        except SystemExit as problem:
            problems.append(str(problem))
    else:
        raise SystemExit(problems[0])
    newest = args.outdir / CHECKPOINTS[0]
    if problems and newest.exists():
        print(f"warning: {newest} is damaged: going on from {name}", file=sys.stderr)
    try:
        refuse_other_settings(content["fixed"], args)
        for part, value in state.parts().items():
            value.load_state_dict(content[part])
        state.step = int(content["step"])
        state.totals.copy_(content["totals"])
        if not (state.step >= 0 and all(tensor.isfinite().all() for _, tensor in nested_tensors(content))):
            raise ValueError("NaN or infinite values")
        for parameter, moments in [*state.optG.state.items(), *state.optD.state.items()]:
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("moments of other parameters")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        where, why = args.outdir / name, printable(error)[:100]
        raise SystemExit(
            f"error: {where} is not a checkpoint of this training ({why}); choose another --outdir"
        ) from None


def refuse_other_settings(fixed: dict, args: argparse.Namespace) -> None:
    for name in FIXED:
        if fixed[name] != getattr(args, name):
            told = f"--{name.replace('_', '-')} was {fixed[name]} in {args.outdir}, now {getattr(args, name)}"
            if name == "data_sha256":
                told = f"the training images are others than those of {args.outdir}"
            raise SystemExit(f"error: --resume: {told}; make it the same again, or start anew in another --outdir")


def read_log(path: Path, last_step: int) -> list[dict]:
    """The rows of log.jsonl up to `last_step`; a killed training may have left later ones, and half a row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if row["step"] <= last_step]


def continue_log(outdir: Path, step: int):
    """log.jsonl, open for further rows: what a killed training wrote after `step` is taken out of it."""
    rows = read_log(outdir / "log.jsonl", step)
    with atomic_write(outdir / "log.jsonl", durable=True) as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
    return (outdir / "log.jsonl").open("a")


def git_commit() -> str | None:
    """The commit of this repository, "-dirty" where files were changed, if it is one and git is there to ask."""
    here, command = Path(__file__).resolve().parent, ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        git = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def save_args(args: argparse.Namespace, device: torch.device, world: int) -> None:
    """args.json: everything that goes into the result."""
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts |= {"device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()}
    facts |= {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    facts |= {"python": platform.python_version(), "git_commit": git_commit()}
    facts |= {"device_type": device.type, "threads": torch.get_num_threads(), "processes": world}
    with atomic_write(args.outdir / "args.json") as file:
        file.write(json.dumps(facts, indent=2).encode())
