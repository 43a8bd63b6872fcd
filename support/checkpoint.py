"""A training in memory and on disk: networks, optimisers, checkpoints, parameters and the flags in args.json.

    save_checkpoint(state, args)
    load_checkpoint(state, args)                    # --resume
    load_networks(state, Path("networks_64.pt"))    # --init

Each file is written under another name, flushed to the disk and renamed, so it is whole or absent. The previous
checkpoint stays until the newest is whole, and replaces it when the newest turns out to be damaged.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from torch import nn

from support import distributed
from support.files import (
    CHECKPOINTS,
    UserError,
    atomic_write,
    git_commit,
    hash_file,
    holds_training,
    name_last_checkpoint,
    printable,
)
from support.weights import (
    EMA_NAMES,
    find_dcgans,
    generator_sizes,
    kernels_of,
    load_tensors,
    save_tensors,
)

# The settings that follow from the networks of --init.
SIZES = ("image_size", "nz", "ngf", "ndf", "group_norm")
# A resumed training is the same training only if these are the same.
FIXED = (*SIZES, "batch_size", "lr", "beta1", "ema", "augment", "colour_weight", "precision", "seed", "images_sha256")
INIT_REMEDY = "give a checkpoint.pt of train.py, or pretrained/networks_64.pt, to --init"
# All processes of a training take the same steps only if these are the same too.
SHARED = (*FIXED, "init", "epochs", "resume", "checkpoint_every", "eval_every", "eval_flags")


@dataclass
class TrainState:
    """All that a training step changes. `totals` (4,) sums loss_d, loss_g, D(x) and D(G(z)) since the last log row."""

    netG: nn.Module
    netD: nn.Module
    netG_ema: nn.Module
    optG: torch.optim.Optimizer
    optD: torch.optim.Optimizer
    totals: torch.Tensor
    step: int = 0

    def parts(self) -> dict:
        """Networks and optimisers by their names in a checkpoint."""
        return {name: getattr(self, name) for name in ("netG", "netD", "netG_ema", "optG", "optD")}

    def refuse_divergence(self, outdir: Path) -> None:
        """Raise UserError when a loss is NaN or infinite."""
        if not self.totals.isfinite().all():
            raise UserError(
                f"a loss is NaN or infinite near step {self.step}: training has diverged; "
                f"{name_last_checkpoint(outdir)}; start again in another --outdir with another --seed or a lower --lr"
            )


def settle_args(args: argparse.Namespace) -> None:
    """Give `args` the flags of the training that --resume goes on with, or the sizes of the networks of --init.

    Flags on the command line stay. Afterwards args.resume says whether there is a checkpoint.
    """
    if args.resume:
        args.resume, saved = distributed.from_first_rank(lambda: (holds_training(args.outdir), read_args(args.outdir)))
        if args.resume:
            continue_args(args, saved)
        elif distributed.is_first_rank():
            print(f"--resume: there is no training in {args.outdir} yet; this starts one", file=sys.stderr)
    if args.init and not args.resume:
        _, _, sizes = read_networks(args.init)
        for name, value in sizes.items():
            if name in args.given and getattr(args, name) != value:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} is {getattr(args, name)}, but {args.init} has {value}; leave out --{flag}")
            setattr(args, name, value)


def continue_args(args: argparse.Namespace, saved: dict) -> None:
    """Set the flags of `args` that the command line does not give to those of args.json, in their latest form."""
    for changes in saved.get("resumed", []):
        saved = saved | changes
    if "recipe" in args.given and saved.get("recipe", args.recipe) != args.recipe:
        raise UserError(f"--resume: --recipe was {saved['recipe']} in {args.outdir}, now {args.recipe}; leave it out")
    for name in vars(args).keys() & saved.keys() - {*args.given, "resume", "outdir"}:
        value = saved[name]
        setattr(args, name, Path(value) if name in ("dataroot", "init") and value else value)


def read_networks(path: Path) -> tuple[dict, dict, dict]:
    """(state dict of G, its EMA weights where there are any; state dict of D; {flag: size}) of the file of --init.

    Raises UserError, which names the file, when it holds no such pair.
    """
    generators, discriminators = find_dcgans(load_tensors(path, INIT_REMEDY))
    names = [name for name in (*EMA_NAMES, "netG") if name in generators]
    if len(discriminators) != 1 or not names:
        raise UserError(f"{path} does not hold a generator netG and a discriminator; {INIT_REMEDY}")
    netG = generators[names[0]]
    [netD] = discriminators.values()
    sizes = generator_sizes(netG) | {"ndf": kernels_of(netD)[0].shape[0]}
    sizes["group_norm"] = not any("running_mean" in name for name in netD)
    return netG, netD, sizes


def load_networks(state: TrainState, path: Path) -> None:
    """Start G and its EMA weights from the EMA weights in the file of --init, and D from its D. Raises UserError."""
    netG, netD, _ = read_networks(path)
    try:
        state.netG.load_state_dict(netG)
        state.netG_ema.load_state_dict(netG)
        state.netD.load_state_dict(netD)
    except RuntimeError as error:
        raise UserError(f"{path} holds other networks ({printable(error)[:100]}); {INIT_REMEDY}") from None


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


def save_checkpoint(state: TrainState, args: argparse.Namespace) -> None:
    """Write everything that the next step depends on. The first process writes, and the others wait.

    The rows of the log reach the disk before the checkpoint does, and the previous checkpoint stays until the new one
    is whole. Raises UserError when a loss is NaN or infinite, so that no checkpoint holds such a state.
    """
    state.refuse_divergence(args.outdir)
    distributed.first_rank_writes(lambda: write_checkpoint(state, args))


def write_checkpoint(state: TrainState, args: argparse.Namespace) -> None:
    """Replace the previous checkpoint by the newest, and the newest by `state`."""
    with (args.outdir / "log.jsonl").open("a") as log:
        os.fsync(log.fileno())
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "totals": state.totals, "fixed": fixed_settings(args)}
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
        if "average" in content:  # the name of netG_ema in older checkpoints
            content["netG_ema"] = content.pop("average")
        for part, value in state.parts().items():
            value.load_state_dict(content[part])
        state.step = int(content["step"])
        state.totals.copy_(content["totals"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        path, why = args.outdir / name, printable(error)[:100]
        raise UserError(f"{path} is not a checkpoint of this training ({why}); choose another --outdir") from None


def fixed_settings(args: argparse.Namespace) -> dict:
    """The settings that must not change, as plain data. --init decides how the EMA weights begin."""
    return {name: getattr(args, name) for name in FIXED} | {"init": str(args.init) if args.init else None}


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
    now = fixed_settings(args)
    # Older checkpoints hold a hash of another definition, and know no --init.
    fixed = {"images_sha256": args.images_sha256, "init": None} | fixed
    for name in now:
        if fixed[name] != now[name]:
            message = f"--{name.replace('_', '-')} was {fixed[name]} in {args.outdir}, now {now[name]}"
            if name == "images_sha256":
                message = f"the training images differ from those of {args.outdir}"
            raise UserError(f"--resume: {message}; use the same, or start again in another --outdir")


def save_args(args: argparse.Namespace, device: torch.device, step: int) -> None:
    """Write args.json: flags, versions, device and data, all that the result depends on.

    A training that goes on from `step` keeps what it began with, and adds what differs to the list "resumed".
    """
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    del settings["given"]
    _, world_size = distributed.rank_and_world_size()
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    settings |= {"device_type": device.type, "device_name": device_name, "processes": world_size}
    settings |= {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    settings |= {"python": platform.python_version(), "git_commit": git_commit(), "threads": torch.get_num_threads()}
    first = read_args(args.outdir) if args.resume else {}
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
