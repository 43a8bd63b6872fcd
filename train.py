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
from functools import partial
from pathlib import Path

from support.cli import HelpFormatter, float_below, int_at_least, prepare, run
from support.files import UserError, cannot_write, open_outdir

SIZES = (16, 32, 64, 128, 256)
WIDTHS = {256: 32}  # default --ngf and --ndf, where it is not 64: a step at 256x256 then fits in 16 GB of GPU memory
BEST = {"batch_size": 16, "augment": True, "group_norm": True, "colour_weight": 3.0, "ema": 0.9998}
RECIPES = {"report": {}, "best": BEST}
# Takes three to eight minutes on two CPU cores. A GPU takes more epochs; half a minute is the goal, not measured.
DEMO = {"dataroot": Path("data/demo"), "outdir": Path("runs/demo")}
DEMO |= {"ngf": 32, "ndf": 32, "batch_size": 16, "group_norm": True, "augment": True, "ema": 0.998}
DEMO_EPOCHS = {"cuda": 100}  # on all other devices 20


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("recipe").add_argument
    add("--recipe", choices=RECIPES, default="report", help=f"flag values to start from; best: {RECIPES['best']}")
    add("--demo", action="store_true", help="train on drawn faces, drawing them first if needed")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--image-size", type=int, choices=SIZES, default=64, help="side of the faces in pixels")
    add("--outdir", type=Path, help="folder for the results (default: runs/<image size>)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --outdir")
    add("--checkpoint-every", type=int_at_least(0), default=0, help="steps between checkpoints; 0: one an epoch")
    add = parser.add_argument_group("model").add_argument
    add("--nz", type=int_at_least(1), default=100, help="length of a latent")
    add("--ngf", type=int_at_least(1), help="channels of G before its last layer (default: 64; 32 at 256x256)")
    add("--ndf", type=int_at_least(1), help="channels of D after its first layer (default: 64; 32 at 256x256)")
    add("--group-norm", action=argparse.BooleanOptionalAction, default=False, help="use GroupNorm in D, not BatchNorm")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=int_at_least(1), help="number of epochs in total (default: 5; more for --demo)")
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
    add("--workers", type=int_at_least(0), default=2, help="processes that read images which do not fit in memory")
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-every", type=int_at_least(0), default=0, metavar="N", help="measure FID every N epochs; 0: never")
    add("--eval-flags", type=shlex.split, metavar="FLAGS", default="", help='of evaluate.py, such as "--num 2000"')
    chosen = parser.parse_args(argv)
    parser.set_defaults(**RECIPES[chosen.recipe] | (DEMO if chosen.demo else {}))
    args = parser.parse_args(argv)  # flags on the command line override the recipe
    args.outdir = args.outdir or Path("runs") / str(args.image_size)
    args.ngf, args.ndf = (width or WIDTHS.get(args.image_size, 64) for width in (args.ngf, args.ndf))
    return args


if __name__ == "__main__":  # answers --help and refuses bad flags before the imports below, which take seconds
    prepare(parse_args)

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce_with_logits
from tqdm import tqdm

import network
import network_128
import preprocess
from dataloader import DataGenerater, make_loader, to_float, to_uint8
from support import checkpoint, distributed
from support.augment import augment, draw_augmentations
from support.checkpoint import load_checkpoint, save_args, save_checkpoint, save_params
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
from support.train_state import Setup, Throughput, TrainState
from support.training_log import continue_log, log_row, measure_fid, next_commands, save_summary

LOG_EVERY = 20  # steps; only then does the CPU wait for the GPU
COUNTERS = ("step", "epoch", "images_seen")  # fields of the log that the progress bar leaves out


def make_state(args: argparse.Namespace, device: torch.device) -> TrainState:
    """New networks, EMA weights and optimisers. The same seed gives the same ones."""
    torch.manual_seed(args.seed)
    if args.image_size == 128:  # the report's second network
        nets = network_128.Generator(args.nz, args.ngf), network_128.Discriminator(args.ndf, args.group_norm)
    else:
        size = args.image_size
        nets = network.Generator(args.nz, args.ngf, size), network.Discriminator(args.ndf, size, args.group_norm)
    layout = memory_format(device, args.precision)
    netG, netD = (net.to(device, memory_format=layout) for net in nets)
    netG_ema = copy.deepcopy(netG).requires_grad_(False).eval()
    optG, optD = (torch.optim.Adam(net.parameters(), args.lr, (args.beta1, 0.999), fused=True) for net in (netG, netD))
    if args.compile:
        netG.compile()
        netD.compile()
    totals = torch.zeros(4, device=device)
    return TrainState(netG, netD, netG_ema, optG, optD, totals, args.colour_weight, memory_format=layout)


def step_inputs(args: argparse.Namespace, step: int, batch: torch.Tensor) -> list[torch.Tensor]:
    """What train_step() takes in step `step`, on the CPU: batch, z, weight and, with --augment, augmentations."""
    rank, world_size = distributed.rank_and_world_size()
    z = step_latents(args.seed, step, args.batch_size, args.nz)[rank::world_size]
    inputs = [batch, z, torch.tensor(ema_weight(step + 1, args.ema))]
    if args.augment:
        augmentations = draw_augmentations(args.seed, step, args.batch_size, args.image_size)
        inputs.append(augmentations[:, rank::world_size])
    return inputs


def train_step(
    state: TrainState, autocast: torch.autocast, images: torch.Tensor | None, *inputs: torch.Tensor
) -> None:
    """One step of D, of G and of the EMA weights on step_inputs(). On a GPU, one CUDA graph holds all of it.

    The batch holds indices (N,) into the training `images` on the device, or uint8 images (N,3,S,S) if that is None.
    """
    batch, z, weight, *augmentations = (x.to(state.totals.device, non_blocking=True) for x in inputs)
    real = to_float(batch if images is None else images[batch]).contiguous(memory_format=state.memory_format)
    update_networks(state, autocast, real, z, *augmentations)
    update_ema(state.netG_ema, state.netG, weight)


def update_networks(
    state: TrainState,
    autocast: torch.autocast,
    real: torch.Tensor,
    z: torch.Tensor,
    augmentations: torch.Tensor | None = None,
) -> None:
    """One step of D and one of G, as in the DCGAN paper. `real` (N,3,S,S) is in [-1,1], `z` (N,nz,1,1) from N(0,1).

    `augmentations` (3,N,6) are the parameters of augment() for real images, for fakes in D's step and for fakes in G's
    step. The losses are nn.BCELoss of D's probabilities, computed from logits so that no gradient rounds to 0.
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
    ones, zeros = torch.ones_like(logits_real), torch.zeros_like(logits_real)
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
    if state.colour_weight:
        errG = errG + state.colour_weight * colour_loss(real, fake.to(real.dtype))
    errG.backward()
    netD.requires_grad_(True)
    sums = torch.stack([errD, errG, logits_real.sigmoid().mean(), logits_fake.sigmoid().mean()]).detach()
    running_stats = [buffer for buffer in netG.buffers() if buffer.is_floating_point()]
    distributed.average_over_ranks([p.grad for p in netG.parameters()] + running_stats + [sums])
    optG.step()
    state.totals += sums


def train_epoch(state: TrainState, setup: Setup, epoch: int) -> int:
    """The steps of `epoch` from state.step on. Returns the signal that stopped them, or 0."""
    args, (rank, world_size) = setup.args, distributed.rank_and_world_size()
    steps = len(setup.dataset) // args.batch_size
    first, pin = state.step % steps, setup.device.type == "cuda"
    data = (setup.dataset, args.batch_size, args.seed, epoch, first, args.workers, pin, rank, world_size)
    batches = make_loader(*data, as_indices=setup.images is not None)
    bar = tqdm(batches, f"epoch {epoch + 1}/{args.epochs}", steps, initial=first, disable=rank > 0 or None)
    for done, batch in enumerate(bar, first + 1):
        setup.launch(*step_inputs(args, state.step, batch))
        state.step += 1
        stop = distributed.agree_on_signal(setup.signals)
        if done == steps or done % LOG_EVERY == 0:
            fid = end_epoch(state, setup, epoch + 1) if done == steps else None
            row = log_row(state, args, epoch + 1, (done - 1) % LOG_EVERY + 1, setup.throughput, setup.log, fid)
            bar.set_postfix({name: f"{row[name]:.3g}" for name in row if name not in COUNTERS})
        if done == steps or stop or args.checkpoint_every and state.step % args.checkpoint_every == 0:
            save_checkpoint(state, args, setup.log)
        if stop:
            return stop
    return 0


def end_epoch(state: TrainState, setup: Setup, epoch: int) -> float | None:
    """Fit the EMA weights' BatchNorm, write parameters and a grid of faces, and return the FID, if it is due."""
    args = setup.args
    state.refuse_divergence(args.outdir)
    with setup.autocast:
        recalibrate_batchnorm(state.netG_ema, args.seed, state.step, args.batch_size, setup.device)
    is_eval_epoch = args.eval_every > 0 and (epoch % args.eval_every == 0 or epoch == args.epochs)
    fid = measure_fid(state, setup) if is_eval_epoch else None
    if setup.log:
        faces = to_uint8(state.netG_ema(latents(range(64), args.nz).to(setup.device))).cpu()
        save_image(image_grid(faces), args.outdir / "samples" / f"epoch_{epoch:03d}.png")
        save_params(state, args.outdir)
    return fid


def open_dataset(args: argparse.Namespace) -> DataGenerater:
    """The training images. With --demo, one process on each machine draws them if they are missing."""
    root = args.dataroot / str(args.image_size) / "train"
    if args.demo and not root.is_dir() and distributed.is_first_on_machine():
        flags = ["--dataroot", str(args.dataroot), "--sizes", str(args.image_size), "--allow-upscale"]
        preprocess.main(["--demo", "2000", *flags])
    distributed.wait_for_ranks()
    dataset = DataGenerater(root, args.image_size)
    if len(dataset) < args.batch_size:
        raise UserError(f"{root} holds {len(dataset)} images, fewer than --batch-size; lower that")
    return dataset


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Everything from the data on disk to the pictures of the finished training. Returns the signal that stopped it."""
    args.epochs = args.epochs or (DEMO_EPOCHS.get(device.type, 20) if args.demo else 5)
    dataset, first_rank = open_dataset(args), distributed.is_first_rank()
    if args.compile:
        refuse_missing_compiler(device)
    lock = open_outdir(args.outdir, args.resume) if first_rank else None
    if all(distributed.gather(fits_in_memory(len(dataset), args.image_size))):
        dataset.decode_all()
    args.precision, args.images_sha256 = pick_precision(args.precision, device), dataset.sha256()
    checkpoint.refuse_unequal_ranks(args, device)
    set_up_training(args.deterministic)
    state, log, score, stop = make_state(args, device), None, None, 0
    if args.eval_every:
        from evaluate import make_scorer  # torchvision and SciPy take seconds to import
        score = make_scorer(["--dataroot", str(args.dataroot), *args.eval_flags], args.image_size, device)
    try:
        if args.resume:
            load_checkpoint(state, args)
        if first_rank:
            log = continue_log(args.outdir / "log.jsonl", state.step)
            save_args(args, device, distributed.rank_and_world_size()[1], state.step)
        if not args.resume:
            save_checkpoint(state, args, log)  # --resume works from here on
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
        images, signals = place_on_device(dataset.images, device), distributed.catch_signals()
        if images is not None:
            dataset.images = None  # batches are indices; the copy on the device is enough
        step = partial(train_step, state, autocast, images)
        with as_cuda_graph(step, (state.optD, state.optG), device) as launch:
            setup = Setup(args, device, dataset, images, launch, log, score, autocast, signals, Throughput(state.step))
            for epoch in range(state.step // (len(dataset) // args.batch_size), args.epochs):
                if stop := train_epoch(state, setup, epoch):
                    break
        if first_rank and stop:
            flags = shlex.join(["--resume", "--outdir", str(args.outdir)])
            print(f"\nstopped at step {state.step}; go on with {flags}", file=sys.stderr)
        elif first_rank:
            save_summary(args.outdir)
            print(next_commands(args.outdir, args.dataroot))
    finally:
        for file in filter(None, (log, lock)):
            file.close()
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
