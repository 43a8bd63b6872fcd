"""Batches of faces + networks -> runs/<size>/generator.params.

    python train.py                              # the report: DCGAN at 64x64, BCE, Adam 2e-4/0.5, batch 128, 5 epochs
    python train.py --recipe best                # better faces from as many images
    python train.py --image-size 128             # the same at 128x128
    python train.py --resume                     # continues from the last checkpoint; on a CPU, bit for bit
    python train.py --demo                       # no data needed: trains on drawn faces, in 3 to 8 minutes on two cores
    torchrun --nproc-per-node 4 train.py         # four GPUs; --batch-size is the total

Writes generator.params (EMA weights, which draw the better faces), generator_raw.params (raw weights), checkpoint.pt,
checkpoint_previous.pt, log.jsonl, losses.png, args.json, samples/ (a grid each epoch) and training.gif. --eval-every
adds generator_best.params (the EMA weights of the lowest FID) and fid.png.
"""

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support.cli import HelpFormatter, float_below, int_at_least, prepare, run, user_path
from support.files import UserError, cannot_write, open_outdir

SIZES = (16, 32, 64, 128, 256)
WIDTHS = {256: 32}  # default --ngf and --ndf, where it is not 64: a step at 256x256 then fits in 16 GB of GPU memory
BEST = {"batch_size": 16, "augment": True, "group_norm": True, "colour_weight": 3.0, "ema": 0.9998}
RECIPES = {"report": {}, "best": BEST}
# Takes three to eight minutes on two CPU cores. A GPU takes more epochs; half a minute is the goal, not measured.
DEMO = {"dataroot": Path("data/demo"), "outdir": Path("runs/demo")}
DEMO |= {"ngf": 32, "ndf": 32, "batch_size": 16, "group_norm": True, "augment": True, "ema": 0.998}
DEMO_EPOCHS = {"cuda": 100}  # on all other devices 20
INIT_IMAGES = 60_000  # training images that --init sees: ten minutes on two CPU cores with bf16 support


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES, default="report", help=f"flag values to start from; best: {RECIPES['best']}")
    add("--demo", action="store_true", help="train on drawn faces, drawing them first if needed")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataroot", type=user_path, default=Path("data"), help="folder that preprocess.py made")
    add("--image-size", type=int, choices=SIZES, default=64, help="side of the faces in pixels")
    add("--outdir", type=user_path, help="folder for the results (default: runs/<image size>)")
    add("--resume", action="store_true", help="go on with the training in --outdir and its flags; without one, start")
    add("--init", type=user_path, metavar="FILE", help="networks to start from, such as pretrained/networks_64.pt")
    add("--checkpoint-every", type=int_at_least(0), default=0, help="steps between checkpoints; 0: one an epoch")
    add = parser.add_argument_group("model").add_argument
    add("--nz", type=int_at_least(1), default=100, help="length of a latent")
    add("--ngf", type=int_at_least(1), help="channels of G before its last layer (default: 64; 32 at 256x256)")
    add("--ndf", type=int_at_least(1), help="channels of D after its first layer (default: 64; 32 at 256x256)")
    add("--group-norm", action=argparse.BooleanOptionalAction, default=False, help="use GroupNorm in D, not BatchNorm")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int_at_least(1), help="number of epochs in total (default: 5; more for --demo and --init)")
    add("--batch-size", type=int_at_least(2), default=128, help="real images in a step, over all processes")
    add("--lr", type=float_below(), default=2e-4, help="learning rate of Adam, for G and D")
    add("--beta1", type=float_below(1), default=0.5, help="beta1 of Adam, for G and D")
    add("--ema", type=float_below(1), default=0.999, help="decay of G's EMA weights; 0 keeps the raw weights")
    add("--augment", action=argparse.BooleanOptionalAction, default=False, help="DiffAugment (color, translation)")
    add("--colour-weight", type=float_below(), default=0.0, help="weight of a loss that gives fakes real colours")
    add("--seed", type=int_at_least(0), default=0, help="random seed of weights, latents and batches")
    add = parser.add_argument_group("hardware").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 where supported")
    add("--compile", action="store_true", help="fuse layers by torch.compile; it starts slowly")
    add("--deterministic", action="store_true", help="give the same bits for the same seed on a GPU too; slower")
    add("--workers", type=int_at_least(0), help="processes that read images which do not fit in memory (default: 2)")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int_at_least(0), default=0, metavar="N", help="measure FID every N epochs; 0: never")
    add("--eval-flags", type=shlex.split, metavar="FLAGS", default="", help='of evaluate.py, such as "--num 2000"')
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in given.items() if value is not None}
    recipe = RECIPES[given.get("recipe", defaults["recipe"])]
    args = argparse.Namespace(**(defaults | recipe | (DEMO if "demo" in given else {}) | given))
    args.given = list(given)  # all others may change to those of --resume or --init
    args.outdir = args.outdir or Path("runs") / str(args.image_size)
    args.ngf = args.ngf or WIDTHS.get(args.image_size, 64)
    args.ndf = args.ndf or WIDTHS.get(args.image_size, 64)
    return args


if __name__ == "__main__":  # answers --help and refuses bad flags before the imports below, which take seconds
    prepare(parse_args)

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce_with_logits
from tqdm import tqdm

import network
import network_128
import preprocess
from dataloader import DataGenerater, make_loader, to_float, to_uint8
from support import distributed
from support.augment import augment, draw_augmentations
from support.checkpoint import (
    TrainState,
    load_checkpoint,
    load_networks,
    refuse_unequal_ranks,
    save_args,
    save_checkpoint,
    save_params,
    settle_args,
)
from support.colour import colour_loss
from support.cuda_graph import as_cuda_graph
from support.devices import (
    explain_out_of_memory,
    fits_in_memory,
    memory_format,
    pick_precision,
    place_on_device,
    refuse_missing_compiler,
    set_up_training,
)
from support.ema import ema_weight, recalibrate_batchnorm, update_ema
from support.images import image_grid, save_image
from support.seeding import latents, step_latents
from support.training_log import TrainingLog, next_commands, save_summary
from support.workers import count_cores

LOG_EVERY = 20  # steps; only then does the CPU wait for the GPU


class StepInputs(NamedTuple):
    """The inputs of a training step. A CUDA graph keeps these tensors and replaces their values."""

    batch: Tensor  # indices int64 (N,) into the training images on the device, or images uint8 (N,3,S,S)
    z: Tensor  # latents (N,nz,1,1) from N(0,1)
    ema_weight: Tensor  # (), the share of G in the EMA weights
    augmentations: Tensor | None  # (3,N,6) of draw_augmentations(); None without --augment

    def to(self, device: torch.device) -> "StepInputs":
        return StepInputs(*(None if x is None else x.to(device) for x in self))


def step_inputs(args: argparse.Namespace, step: int, batch: Tensor) -> StepInputs:
    """The inputs of training step `step`, on the CPU. Each process of torchrun takes its share of them."""
    rank, world_size = distributed.rank_and_world_size()
    z = step_latents(args.seed, step, args.batch_size, args.nz)[rank::world_size].contiguous()
    weight = torch.tensor(ema_weight(step + 1, args.ema, trained=args.init is not None))
    augmentations = None
    if args.augment:
        augmentations = draw_augmentations(args.seed, step, args.batch_size, args.image_size)
        augmentations = augmentations[:, rank::world_size].contiguous()
    return StepInputs(batch, z, weight, augmentations)


def mixed_precision(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def make_step(state: TrainState, args: argparse.Namespace, images: Tensor | None) -> Callable[[StepInputs], None]:
    """train_step() with everything that stays the same in a training."""
    device = state.totals.device
    layout = memory_format(device, args.precision)
    return partial(train_step, state, images, layout, mixed_precision(args, device), args.colour_weight)


def train_step(
    state: TrainState,
    images: Tensor | None,
    layout: torch.memory_format,
    autocast: torch.autocast,
    colour_weight: float,
    inputs: StepInputs,
) -> None:
    """One step of D, of G and of the EMA weights. On a GPU, one CUDA graph holds all of it.

    `images` uint8 (M,3,S,S) are all training images on the device. With None, the batch holds images, not indices.
    """
    batch, z, weight, augmentations = inputs.to(state.totals.device)
    real = to_float(batch if images is None else images[batch]).contiguous(memory_format=layout)
    update_networks(state, autocast, colour_weight, real, z, augmentations)
    update_ema(state.netG_ema, state.netG, weight)


def update_networks(
    state: TrainState,
    autocast: torch.autocast,
    colour_weight: float,
    real: Tensor,
    z: Tensor,
    augmentations: Tensor | None,
) -> None:
    """One step of D and one of G, as in the DCGAN paper. `real` (N,3,S,S) is in [-1,1], `z` (N,nz,1,1) from N(0,1).

    The losses are nn.BCELoss of D's probabilities, computed from logits so that no gradient rounds to 0.
    colour_loss() tells G what D with GroupNorm cannot see: D(c x) = D(x) for all c > 0.
    """
    netG, netD, optG, optD = state.netG, state.netD, state.optG, state.optD
    for_real, for_fake, for_fake_again = (None, None, None) if augmentations is None else augmentations

    # D: maximize log(D(x)) + log(1 - D(G(z)))
    optD.zero_grad()
    with autocast:
        fake = netG(z)
        logits_real = netD(augment(real, for_real), logits=True)
        logits_fake = netD(augment(fake.detach(), for_fake), logits=True)
    ones = torch.ones_like(logits_real)
    zeros = torch.zeros_like(logits_real)
    errD_real = bce_with_logits(logits_real, ones)
    errD_fake = bce_with_logits(logits_fake, zeros)
    errD = errD_real + errD_fake
    errD.backward()
    distributed.average_over_ranks([p.grad for p in netD.parameters()])
    optD.step()

    # G: maximize log(D(G(z)))
    optG.zero_grad()
    netD.requires_grad_(False)  # G needs the gradient through D, not the gradients of D's weights
    with autocast:
        logits = netD(augment(fake, for_fake_again), logits=True)
    errG = bce_with_logits(logits, ones)
    if colour_weight:
        errG = errG + colour_weight * colour_loss(real, fake.to(real.dtype))
    errG.backward()
    netD.requires_grad_(True)
    sums = torch.stack([errD, errG, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()
    running_stats = [buffer for buffer in netG.buffers() if buffer.is_floating_point()]
    distributed.average_over_ranks([p.grad for p in netG.parameters()] + running_stats + [sums])
    optG.step()
    state.totals += sums


def make_state(args: argparse.Namespace, device: torch.device) -> TrainState:
    """New networks, EMA weights and optimisers. The same seed gives the same ones."""
    torch.manual_seed(args.seed)
    if args.image_size == 128:  # the report's second network
        netG = network_128.Generator(args.nz, args.ngf)
        netD = network_128.Discriminator(args.ndf, args.group_norm)
    else:
        netG = network.Generator(args.nz, args.ngf, args.image_size)
        netD = network.Discriminator(args.ndf, args.image_size, args.group_norm)
    layout = memory_format(device, args.precision)
    netG = netG.to(device, memory_format=layout)
    netD = netD.to(device, memory_format=layout)
    netG_ema = copy.deepcopy(netG).requires_grad_(False).eval()
    optG = torch.optim.Adam(netG.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    optD = torch.optim.Adam(netD.parameters(), args.lr, (args.beta1, 0.999), fused=True)
    if args.compile:
        netG.compile()
        netD.compile()
    return TrainState(netG, netD, netG_ema, optG, optD, torch.zeros(4, device=device))


def train_epoch(bar: tqdm, state: TrainState, args: argparse.Namespace, launch: Callable, log: TrainingLog) -> int:
    """The steps of the batches that `bar` has left of an epoch. Returns the signal that stopped them, or 0."""
    for done, batch in enumerate(bar, bar.n + 1):
        launch(step_inputs(args, state.step, batch))
        state.step += 1
        stop = distributed.agree_on_signal(log.signals)
        if done == bar.total:  # end_epoch() writes
            return stop
        if done % LOG_EVERY == 0:
            bar.set_postfix(log.add_row(state, LOG_EVERY))
        if stop or args.checkpoint_every and state.step % args.checkpoint_every == 0:
            save_checkpoint(state, args)
        if stop:
            return stop
    return 0


def end_epoch(state: TrainState, args: argparse.Namespace, log: TrainingLog, stop: int) -> None:
    """Fit the EMA weights' BatchNorm, measure the FID if that is due, write parameters, a grid of faces, a checkpoint.

    On a GPU, where an epoch may take less than a second, it writes every 30 seconds, and whenever it must.
    """
    state.refuse_divergence(args.outdir)
    device = state.totals.device
    epoch = state.step // log.steps_per_epoch
    is_last = epoch == args.epochs
    is_eval_epoch = args.eval_every > 0 and (epoch % args.eval_every == 0 or is_last)
    writes = is_last or is_eval_epoch or stop > 0 or log.is_time_to_write(device)
    fid = None
    if writes:
        with mixed_precision(args, device):
            recalibrate_batchnorm(state.netG_ema, args.seed, state.step, args.batch_size, device)
        fid = log.measure_fid(state) if is_eval_epoch else None
        distributed.first_rank_writes(partial(write_faces, state, args, epoch))
    log.add_row(state, (log.steps_per_epoch - 1) % LOG_EVERY + 1, fid)
    if writes:
        save_checkpoint(state, args)


def write_faces(state: TrainState, args: argparse.Namespace, epoch: int) -> None:
    """Write the grid of 64 faces of the EMA weights, and the parameters."""
    faces = to_uint8(state.netG_ema(latents(range(64), args.nz).to(state.totals.device))).cpu()
    save_image(image_grid(faces), args.outdir / "samples" / f"epoch_{epoch:03d}.png")
    save_params(state, args.outdir)


def open_dataset(args: argparse.Namespace) -> DataGenerater:
    """The training images. With --demo, one process on each machine draws those that are missing."""
    root = args.dataroot / str(args.image_size) / "train"
    if args.demo and distributed.is_first_on_machine():
        preprocess.draw_demo(args.dataroot, args.image_size)
    distributed.wait_for_ranks()
    dataset = DataGenerater(root, args.image_size)
    if len(dataset) < args.batch_size:
        raise UserError(f"{root} holds {len(dataset)} images, fewer than --batch-size; lower that")
    return dataset


def default_epochs(args: argparse.Namespace, device: torch.device, images: int) -> int:
    """--epochs where it is not given. With --init, few photos need many epochs."""
    if args.demo:
        return DEMO_EPOCHS.get(device.type, 20)
    return max(5, round(INIT_IMAGES / images)) if args.init else 5


def run_epochs(state: TrainState, args: argparse.Namespace, dataset: DataGenerater, log: TrainingLog) -> int:
    """All steps from state.step on. Returns the signal that stopped them, or 0."""
    device = state.totals.device
    rank, world_size = distributed.rank_and_world_size()
    images = place_on_device(dataset.images, device)
    if images is not None:
        dataset.images = None  # batches are indices; the copy on the device is enough
    options = {"rank": rank, "world_size": world_size, "as_indices": images is not None}
    options |= {"workers": args.workers, "pin_memory": device.type == "cuda"}
    with as_cuda_graph(make_step(state, args, images), (state.optD, state.optG), device) as launch:
        for epoch in range(state.step // log.steps_per_epoch, args.epochs):
            first = state.step % log.steps_per_epoch
            batches = make_loader(dataset, args.batch_size, args.seed, epoch, first, **options)
            label = f"epoch {epoch + 1}/{args.epochs}"
            hidden = None if rank == 0 else True
            bar = tqdm(batches, label, log.steps_per_epoch, initial=first, disable=hidden)
            stop = train_epoch(bar, state, args, launch, log)
            if state.step % log.steps_per_epoch == 0:
                end_epoch(state, args, log, stop)
            if stop:
                return stop
    return 0


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Everything from the data on disk to the pictures of the finished training. Returns the signal that stopped it."""
    settle_args(args)
    if args.workers is None:
        args.workers = count_cores() if device.type == "cuda" else 2
    if args.compile:
        refuse_missing_compiler(device)
    args.precision = pick_precision(args.precision, device)
    dataset = open_dataset(args)
    args.epochs = args.epochs or default_epochs(args, device, len(dataset))
    first_rank = distributed.is_first_rank()
    lock = open_outdir(args.outdir, args.resume) if first_rank else None
    if all(distributed.gather(fits_in_memory(len(dataset), args.image_size))):
        dataset.decode_all()
    args.images_sha256 = dataset.sha256()
    refuse_unequal_ranks(args, device)
    set_up_training(args.deterministic)
    state = make_state(args, device)
    log = None
    score = None
    if args.eval_every:
        from evaluate import make_scorer  # torchvision and SciPy take seconds to import

        score = make_scorer(["--dataroot", str(args.dataroot), *args.eval_flags], args.image_size, device)
    try:
        if args.resume:
            load_checkpoint(state, args)
        elif args.init:
            load_networks(state, args.init)
        log = TrainingLog(args.outdir, state.step, len(dataset), args.batch_size, distributed.catch_signals(), score)
        if first_rank:
            save_args(args, device, state.step)
        if not args.resume:
            save_checkpoint(state, args)  # --resume works from here on
        stop = run_epochs(state, args, dataset, log)
    finally:
        for file in filter(None, (log, lock)):
            file.close()
    if first_rank and stop:
        flags = shlex.join(["--resume", "--outdir", str(args.outdir)])
        print(f"\nstopped at step {state.step}; go on with {flags}", file=sys.stderr)
    elif first_rank:
        if not (args.outdir / "generator.params").exists():  # deleted after the training
            save_params(state, args.outdir)
        save_summary(args.outdir)
        print(next_commands(args.outdir, args.dataroot))
    return stop


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    remedy = "lower --batch-size, or --ngf and --ndf"
    try:
        with distributed.joined_ranks(args.device) as device, explain_out_of_memory(remedy):
            stop = train(args, device)
    except OSError as error:
        raise cannot_write(Path(error.filename or args.outdir), error) from None
    if stop:
        sys.exit(128 + stop)


if __name__ == "__main__":
    run(main)
