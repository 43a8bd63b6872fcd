"""A training on disk: parameters and checkpoints. --resume goes on from these files.

    save_checkpoint(state, args, log)
    load_checkpoint(state, args)

Each file is written under another name, flushed to the disk and renamed, so it is whole or absent. The previous
checkpoint stays until the newest is whole, and replaces it when the newest turns out to be damaged.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import TextIO

import numpy as np
import PIL
import torch

from support import distributed
from support.files import CHECKPOINTS, UserError, atomic_write, git_commit, hash_file, printable
from support.train_state import TrainState
from support.weights import load_tensors, nested_tensors, save_tensors

# A resumed training is the same training only if these are the same.
FIXED = ("image_size", "batch_size", "lr", "beta1", "nz", "ngf", "ndf", "ema", "augment", "group_norm")
FIXED += ("colour_weight", "precision", "seed", "images_sha256")
# All processes of a training take the same steps only if these are the same too.
SHARED = (*FIXED, "epochs", "resume", "checkpoint_every", "eval_every", "eval_flags")


def refuse_unequal_ranks(args: argparse.Namespace, device: torch.device) -> None:
    """Raise UserError unless all processes have the same images and flags, and an equal share of each batch."""
    other_images = "the training images of {} and {} differ; copy the same crops to all machines"
    settings = {name: getattr(args, name) for name in SHARED} | {"device": device.type}
    distributed.refuse_differences(settings, {"images_sha256": other_images})
    _, world_size = distributed.rank_and_world_size()
    if args.batch_size % world_size:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {world_size} processes evenly")
    if args.colour_weight and args.batch_size < 2 * world_size:
        raise UserError(f"--colour-weight needs a --batch-size of {2 * world_size} or more: two images a process")
    share = args.batch_size // world_size
    if share < 8 and world_size > 1 and distributed.is_first_rank():
        print(f"warning: each process normalises its own {share} images of a batch (BatchNorm), so the result differs "
              "from that of one process; raise --batch-size", file=sys.stderr)


def save_params(state: TrainState, outdir: Path) -> None:
    """Write the EMA weights to generator.params and the raw weights to generator_raw.params.

    args.json gets the SHA-256 of both, so that a result of evaluate.py leads to its training.
    """
    for net, name in ((state.netG_ema, "generator.params"), (state.netG, "generator_raw.params")):
        save_tensors(net.state_dict(), outdir / name)
    digests = {name: hash_file(outdir / name) for name in ("generator.params", "generator_raw.params")}
    write_args(read_args(outdir) | {"sha256": digests}, outdir)


def save_checkpoint(state: TrainState, args: argparse.Namespace, log: TextIO | None) -> None:
    """Write everything that the next step depends on. Only the process that has the file `log` writes; the others wait.

    The rows of the log reach the disk before the checkpoint does, and the previous checkpoint stays until the new one
    is whole. Raises UserError when a loss is NaN or infinite, so that no checkpoint holds such a state.
    """
    state.refuse_divergence(args.outdir)
    distributed.first_rank_writes(lambda: write_checkpoint(state, args, log))


def write_checkpoint(state: TrainState, args: argparse.Namespace, log: TextIO) -> None:
    """Replace the previous checkpoint by the newest, and the newest by `state`."""
    os.fsync(log.fileno())
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "totals": state.totals, "fixed": {name: getattr(args, name) for name in FIXED}}
    newest, previous = (args.outdir / name for name in CHECKPOINTS)
    with atomic_write(newest, durable=True) as file:
        torch.save(content, file)
        file.flush()
        if newest.exists():
            newest.replace(previous)


def load_checkpoint(state: TrainState, args: argparse.Namespace) -> None:
    """Load the newest whole checkpoint of --outdir into `state`. Raises UserError when none fits.

    The first process reads the file for all, since --outdir may be on its machine alone.
    """
    name, content = distributed.from_first_rank(lambda: read_checkpoint(args.outdir))
    try:
        refuse_other_settings(content["fixed"], args)
        for part, value in state.parts().items():
            value.load_state_dict(content[part])
        state.step = int(content["step"])
        state.totals.copy_(content["totals"])
        if not (state.step >= 0 and all(tensor.isfinite().all() for _, tensor in nested_tensors(content))):
            raise ValueError("NaN or infinite values")
        for parameter, moments in [*state.optG.state.items(), *state.optD.state.items()]:
            if any(moments[moment].shape != parameter.shape for moment in ("exp_avg", "exp_avg_sq")):
                raise ValueError("moments of other parameters")
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        path, why = args.outdir / name, printable(error)[:100]
        raise UserError(f"{path} is not a checkpoint of this training ({why}); choose another --outdir") from None


def read_checkpoint(outdir: Path) -> tuple[str, dict]:
    """(name, content) of the newest whole checkpoint in `outdir`. Raises UserError when all are damaged."""
    problems = []
    for name in CHECKPOINTS:
        try:
            content = load_tensors(outdir / name, "leave out --resume and start again in another --outdir")
        except UserError as problem:
            problems.append(problem)
            continue
        newest = outdir / CHECKPOINTS[0]
        if problems and newest.exists():
            print(f"warning: {newest} is damaged: going on from {name}", file=sys.stderr)
        return name, content
    raise problems[0]


def refuse_other_settings(fixed: dict, args: argparse.Namespace) -> None:
    """Raise UserError when a setting of the checkpoint differs from that of this run."""
    fixed = {"images_sha256": args.images_sha256} | fixed  # older checkpoints hold a hash of another definition
    for name in FIXED:
        if fixed[name] != getattr(args, name):
            message = f"--{name.replace('_', '-')} was {fixed[name]} in {args.outdir}, now {getattr(args, name)}"
            if name == "images_sha256":
                message = f"the training images differ from those of {args.outdir}"
            raise UserError(f"--resume: {message}; use the same, or start again in another --outdir")


def save_args(args: argparse.Namespace, device: torch.device, world_size: int, step: int) -> None:
    """Write args.json: flags, versions, device and data, all that the result depends on.

    A training that goes on from `step` keeps what it began with, and adds what differs to the list "resumed".
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    settings |= {"device_type": device.type, "device_name": device_name, "processes": world_size}
    settings |= {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    settings |= {"python": platform.python_version(), "git_commit": git_commit(), "threads": torch.get_num_threads()}
    first = read_args(args.outdir)
    if first:
        changes = {name: value for name, value in settings.items() if first.get(name) != value}
        settings = first | {"resumed": [*first.get("resumed", []), {"step": step} | changes]}
    write_args(settings, args.outdir)


def read_args(outdir: Path) -> dict:
    """The content of args.json, or {} where it is missing or damaged."""
    try:
        settings = json.loads((outdir / "args.json").read_text())
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def write_args(settings: dict, outdir: Path) -> None:
    with atomic_write(outdir / "args.json") as file:
        file.write(json.dumps(settings, indent=2).encode())
