"""Batches of faces + networks -> runs/<size>/generator.params.

    python train.py                              # the report: DCGAN at 64x64, BCE, Adam 2e-4/0.5, batch 128, 5 epochs
    python train.py --recipe best                # better faces from as many images
    python train.py --image-size 128             # the same at 128x128
    python train.py --resume                     # goes on from the last checkpoint, bit for bit
    python train.py --demo                       # no data at hand: on drawn faces, a few minutes on two cores
    torchrun --nproc-per-node 4 train.py         # four GPUs; --batch-size is the total

Writes into --outdir: generator.params (the average of the generator, what you want), generator_raw.params (its last
iterate), checkpoint.pt and checkpoint_previous.pt, log.jsonl, losses.png, args.json, samples/ (a grid an epoch) and
training.gif; with --eval-every also generator_best.params (the average that had the lowest FID) and fid.png.
"""

import argparse
import copy
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.functional import softplus
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import network
import network_128
import preprocess
from dataloader import DataGenerater, make_loader, to_float, to_uint8
from support.augment import augment
from support.checkpoint import (
    CHECKPOINTS,
    State,
    continue_log,
    load_checkpoint,
    open_outdir,
    read_log,
    save_args,
    save_checkpoint,
    save_params,
)
from support.cli import Formatter, natural, real
from support.cuda_graph import CudaGraph
from support.devices import fits_in_memory, keep_freed_memory, pick_precision
from support.distributed import agree_on_signal, average_over_ranks, catch_signals, join_ranks, rank_and_world_size
from support.files import cannot_write
from support.images import image_grid, plot, save_animation, save_image
from support.seeding import augmentation, latents, step_latents
from support.weights import save_tensors

NETWORKS = {64: network, 128: network_128}
Augmentation = torch.Tensor | None  # of a step: three times what augment() is told, or None
LOG_EVERY = 20  # steps: the only moments at which the processor waits for the GPU
# Flags by a name; benchmarks/ablation.md says what each is worth.
RECIPES = {"report": "", "best": "--batch-size 16 --augment --group-norm --ema 0.9998"}
# A narrow D: the full one soon tells drawn faces from generated ones too well for G to learn in so few steps.
DEMO = "--dataroot data/demo --outdir runs/demo --ndf 32 --batch-size 16 --epochs 6 --ema 0.99"


def make_state(args: argparse.Namespace, device: torch.device) -> State:
    """Fresh networks, their average and optimisers; the same for the same seed."""
    torch.manual_seed(args.seed)
    nets = NETWORKS[args.image_size]
    netG = nets.Generator(args.nz, args.ngf).to(device, memory_format=torch.channels_last)
    netD = nets.Discriminator(args.ndf, group_norm=args.group_norm).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(netG).requires_grad_(False).eval()
    adams = [torch.optim.Adam(net.parameters(), args.lr, (args.beta1, 0.999), fused=True) for net in (netG, netD)]
    if args.compile:
        netG.compile()
        netD.compile()
    state = State(netG, netD, average, *adams, totals=torch.zeros(4, device=device))
    # Neither what torch compiles nor NCCL was tried in a graph: there, each kernel is launched from Python.
    if device.type == "cuda" and not (args.compile or dist.is_initialized()):
        state.graph = CudaGraph(update_networks)
    return state


def train_step(
    state: State, real: torch.Tensor, z: torch.Tensor, autocast: torch.autocast, ema: float, u: Augmentation = None
) -> None:
    """One step of D and one of G, by update_networks(), and one of the average."""
    inputs = (real, z) if u is None else (real, z, u)
    (state.graph or update_networks)(state, autocast, *inputs)
    state.step += 1
    update_average(state, ema)


def update_networks(
    state: State, autocast: torch.autocast, real: torch.Tensor, z: torch.Tensor, u: Augmentation = None
) -> None:
    """One step of D and one of G on `real` (N,3,S,S) in [-1,1] and latents `z`, as in the DCGAN paper and the report.

    D sees all images through augment(): u[0] is for the real ones, u[1] for the fakes, u[2] for them in G's step.
    The losses are nn.BCELoss of D's probabilities, written on its logits x: -log D = softplus(-x), and
    -log(1 - D) = softplus(x). So they keep a gradient where a probability has rounded to 0 or 1.
    """
    netG, netD = state.netG, state.netD
    u = (None, None, None) if u is None else u  # as they are
    state.optD.zero_grad()
    with autocast:
        fake = netG(z)
        d_real, d_fake = netD(augment(real, u[0]), logits=True), netD(augment(fake.detach(), u[1]), logits=True)
    errD = softplus(-d_real).mean() + softplus(d_fake).mean()
    errD.backward()
    average_over_ranks([p.grad for p in netD.parameters()])
    state.optD.step()

    state.optG.zero_grad()
    netD.requires_grad_(False)  # G's step needs the gradient through D, not the gradients of D's weights
    with autocast:
        judged = netD(augment(fake, u[2]), logits=True)
    errG = softplus(-judged).mean()
    errG.backward()
    netD.requires_grad_(True)
    means = [errD, errG, d_real.sigmoid().mean(), d_fake.sigmoid().mean()]
    sums = torch.stack([mean.detach() for mean in means])
    statistics = [buffer for buffer in netG.buffers() if buffer.is_floating_point()]
    average_over_ranks([p.grad for p in netG.parameters()] + statistics + [sums])
    state.optG.step()

    state.totals += sums


@torch.no_grad()
def update_average(state: State, ema: float) -> None:
    """Moves the parameters of the average towards those of G. Short at first, so that few steps do too."""
    decay = min(ema, state.step / (state.step + 10))
    torch._foreach_lerp_(list(state.average.parameters()), list(state.netG.parameters()), 1 - decay)


def estimate_statistics(state: State, args: argparse.Namespace, device: torch.device, autocast: torch.autocast) -> None:
    """Gives the average BatchNorm statistics of its own, from some 1,000 latents in batches of the training's size.

    Those of G are wrong for it: weights that are averaged give maps of a smaller variance than each of them does
    (Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018, section 3.2).
    """
    steps = range(state.step, state.step + max(1, 1024 // args.batch_size))
    with autocast:
        update_bn((step_latents(args.seed, i, args.batch_size, args.nz) for i in steps), state.average, device)


# ---------------------------------------------------------------------------------------------- pictures


@torch.inference_mode()
def save_samples(state: State, args: argparse.Namespace, epoch: int, device: torch.device) -> None:
    """The average's faces of seeds 0-63, after each epoch the same."""
    faces = to_uint8(state.average(latents(range(64), args.nz).to(device))).cpu()
    save_image(image_grid(faces), args.outdir / "samples" / f"epoch_{epoch:03d}.png")


def finish(args: argparse.Namespace) -> None:
    """The pictures of a whole training, and what to do next."""
    rows = read_log(args.outdir / "log.jsonl", sys.maxsize)
    plot(rows, {"loss_d": "#1f77b4", "loss_g": "#d62728"}, args.outdir / "losses.png")
    measured = [row for row in rows if "fid" in row]
    if measured:
        plot(measured, {"fid": "#2ca02c"}, args.outdir / "fid.png")
    grids = [Image.open(path).convert("RGB") for path in sorted((args.outdir / "samples").glob("epoch_*.png"))]
    save_animation(grids, args.outdir / "training.gif", milliseconds=400)
    print(f"\ntrained: {args.outdir / 'generator.params'}; look at {args.outdir / 'samples'}; next:")
    print(f"  python generator.py --params {args.outdir / 'generator.params'} --grid --interpolate")
    print(f"  python evaluate.py --params {args.outdir / 'generator.params'} --dataroot {args.dataroot}")


# ---------------------------------------------------------------------------------------------- the training


def log_row(
    state: State, args: argparse.Namespace, epoch: int, steps: int, since: list, file, fid: float | None = None
) -> dict:
    """Appends a row, means over the last `steps`, to log.jsonl, and warns where D has won."""
    now = time.perf_counter()
    means = (state.totals / steps).tolist()
    state.totals.zero_()
    speed = (state.step - since[0]) * args.batch_size / (now - since[1])
    since[:] = state.step, now
    row = {"step": state.step, "epoch": epoch, "images_seen": state.step * args.batch_size}
    row |= {name: round(mean, 6) for name, mean in zip(("loss_d", "loss_g", "d_real", "d_fake"), means)}
    row |= {"images_per_sec": round(speed, 1)} | ({} if fid is None else {"fid": round(fid, 4)})
    if file and row["loss_d"] < 1e-3:
        tqdm.write(
            f"warning: D has won at step {state.step} (loss {row['loss_d']:.1e}): G learns next to nothing from it; "
            f"if this stays, start anew with a smaller --ndf or --lr ({last_checkpoint(args)})",
            file=sys.stderr,
        )
    if file:
        file.write(json.dumps(row) + "\n")
        file.flush()
    return row


def refuse_divergence(state: State, args: argparse.Namespace) -> None:
    """Raises SystemExit once a loss is no number any more: before a checkpoint is written, which would hold it."""
    if not state.totals.isfinite().all():
        raise SystemExit(
            f"error: a loss is NaN or infinite near step {state.step}: training has diverged; {last_checkpoint(args)}; "
            "start anew in another --outdir with another --seed or a lower --lr"
        )


def last_checkpoint(args: argparse.Namespace) -> str:
    newest = args.outdir / CHECKPOINTS[0]
    return f"the last good checkpoint is {newest}" if newest.exists() else "there is no checkpoint yet"


def train(state: State, dataset: DataGenerater, args: argparse.Namespace, device: torch.device, log, score) -> None:
    """The loop: from state.step to the end of --epochs. `log` is None in all processes but the first.

    `score` gives the FID of a generator, every --eval-every epochs.
    """
    rank, world = rank_and_world_size()
    caught, steps_per_epoch = catch_signals(world), len(dataset) // args.batch_size
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    since = [state.step, time.perf_counter()]
    for epoch in range(state.step // steps_per_epoch, args.epochs):
        first, pin = state.step % steps_per_epoch, device.type == "cuda"
        loader = make_loader(dataset, args.batch_size, args.seed, epoch, first, args.workers, pin, rank, world)
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", steps_per_epoch, initial=first, disable=rank > 0 or None)
        for batch in bar:
            real = to_float(batch.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            z = step_latents(args.seed, state.step, args.batch_size, args.nz)[rank::world]
            u = augmentation(args, state.step)[:, rank::world].to(device, non_blocking=True) if args.augment else None
            train_step(state, real, z.to(device, non_blocking=True), autocast, args.ema, u)
            done, number = state.step - epoch * steps_per_epoch, agree_on_signal(caught)
            last = done == steps_per_epoch
            if last:
                estimate_statistics(state, args, device, autocast)
            if done % LOG_EVERY == 0 or last:
                refuse_divergence(state, args)
                fid = measure_fid(state, args, score, since) if last and due(epoch + 1, args) else None
                row = log_row(state, args, epoch + 1, (done - 1) % LOG_EVERY + 1, since, log, fid)
                bar.set_postfix({name: f"{row[name]:.3g}" for name in list(row)[3:]})
            if last or number or (args.checkpoint_every and state.step % args.checkpoint_every == 0):
                refuse_divergence(state, args)
                if rank == 0:
                    save(state, args, log, epoch + 1 if last else 0, device)
            if number:
                if rank == 0:
                    told = f"\nstopped at step {state.step}; go on with --resume --outdir {args.outdir}"
                    print(told, file=sys.stderr)
                sys.exit(128 + number)


def due(epoch: int, args: argparse.Namespace) -> bool:
    return args.eval_every > 0 and (epoch % args.eval_every == 0 or epoch == args.epochs)


def measure_fid(state: State, args: argparse.Namespace, score, since: list) -> float:
    """The FID of the average. Where no earlier one in the log is as low, the average becomes generator_best.params."""
    before = time.perf_counter()
    fid = score(state.average)
    since[1] += time.perf_counter() - before  # images_per_sec is the training's
    best = min([row["fid"] for row in read_log(args.outdir / "log.jsonl", state.step) if "fid" in row], default=fid)
    if fid <= best and rank_and_world_size()[0] == 0:
        save_tensors(state.average.state_dict(), args.outdir / "generator_best.params")
    return fid


def save(state: State, args: argparse.Namespace, log, epoch: int, device: torch.device) -> None:
    """A checkpoint; at the end of an epoch, which is then not 0, also its picture and the parameters."""
    if epoch:
        save_samples(state, args, epoch, device)
        save_params(state, args.outdir)
    os.fsync(log.fileno())  # the rows before it are on the disk once the checkpoint is
    save_checkpoint(state, args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="report", help=f"named flags; best: {RECIPES['best']}")
    add("--image-size", type=int, choices=NETWORKS, default=64, help="side of the faces")
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--outdir", type=Path, help="folder for the results (default: runs/<image size>)")
    add("--epochs", type=natural(1), default=5, help="passes over the training images")
    add("--batch-size", type=natural(2), default=128, help="real images a step, over all processes")
    add("--lr", type=real(), default=2e-4, help="learning rate of both Adams")
    add("--beta1", type=real(1), default=0.5, help="first momentum of both Adams")
    add("--nz", type=natural(1), default=100, help="length of a latent")
    add("--ngf", type=natural(1), default=64, help="channels of G before its last layer")
    add("--ndf", type=natural(1), default=64, help="channels of D after its first layer")
    add("--ema", type=real(1), default=0.999, help="decay of the average of G; 0: no average")
    add("--augment", action=argparse.BooleanOptionalAction, default=False, help="show D other colours and shifts")
    add("--group-norm", action=argparse.BooleanOptionalAction, default=False, help="in D, in place of BatchNorm")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="bf16 by autocast, or fp32")
    add("--compile", action="store_true", help="compile the networks, without a CUDA graph: slower to start")
    add("--workers", type=natural(0), default=2, help="reading processes, where the images do not fit in memory")
    add("--seed", type=natural(0), default=0, help="of weights, latents and order")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--deterministic", action="store_true", help="the same bits from the same seed on a GPU too, at some speed")
    add("--checkpoint-every", type=natural(0), default=0, help="steps between checkpoints; 0: after each epoch only")
    add("--eval-every", type=natural(0), default=0, metavar="N", help="epochs between FIDs of the average; 0: none")
    add("--eval-flags", type=shlex.split, default="", help='of evaluate.py, for these: "--inception tf2015 --num 2000"')
    add("--resume", action="store_true", help="go on from the last checkpoint in --outdir")
    add("--demo", action="store_true", help="draw faces if need be, and train on them for some minutes")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    named = f"{RECIPES[args.recipe]} {DEMO if args.demo else ''}".split()
    args = parser.parse_args([*named, *argv])  # the later wins: a flag of its own over the recipe's
    args.outdir = args.outdir or Path("runs") / str(args.image_size)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = join_ranks(args.device)
    rank, world = rank_and_world_size()
    try:
        run(args, device, rank, world)
    except KeyboardInterrupt:  # before the first step, or after the last: nothing is lost
        raise SystemExit(130) from None
    except OSError as error:
        raise cannot_write(Path(error.filename or args.outdir), error) from None
    except RuntimeError as error:
        if re.search("out of memory|allocate memory|ALLOC_FAILED", str(error)):  # by torch or CUDA, the CPU, cuBLAS
            told = "the device is out of memory; lower --batch-size, or --ngf and --ndf"
        elif world > 1 and re.search("gloo|NCCL|[Cc]onnection", str(error)):
            told = "another process of this training has ended; go on by --resume"
        else:
            raise
        raise SystemExit(f"error: {told}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    """Everything from the data on the disk to the pictures of the finished training."""
    root = args.dataroot / str(args.image_size) / "train"
    if args.demo and not root.is_dir() and rank == 0:
        preprocess.main(["--demo", "2000", "--dataroot", str(args.dataroot), "--sizes", str(args.image_size)])
    if dist.is_initialized():
        dist.barrier()  # the others wait for the faces
    dataset = DataGenerater(root, args.image_size)
    if len(dataset) < args.batch_size:
        raise SystemExit(f"error: {root} holds {len(dataset)} images, fewer than --batch-size; lower that")
    if args.batch_size % world:
        raise SystemExit(f"error: --batch-size {args.batch_size} cannot be shared by {world} processes evenly")
    lock = open_outdir(args) if rank == 0 else None
    if fits_in_memory(len(dataset), args.image_size):
        dataset.decode_all()
    args.precision, args.data_sha256 = pick_precision(args.precision, device), dataset.sha256()
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    torch.use_deterministic_algorithms(args.deterministic)
    torch.backends.cudnn.benchmark = not args.deterministic  # tries its algorithms once: shapes never change
    if device.type == "cpu":
        keep_freed_memory()
    state, log, score = make_state(args, device), None, None
    if args.eval_every:
        from evaluate import make_scorer  # torchvision and SciPy take seconds to import

        flags = ["--dataroot", str(args.dataroot), *args.eval_flags]
        score = make_scorer(flags, args.image_size, device)
    try:
        if args.resume:
            load_checkpoint(state, args)
        if rank == 0:
            log = continue_log(args.outdir, state.step)
            save_args(args, device, world)
            if not args.resume:
                save_checkpoint(state, args)  # from here on --resume has something to go on from
        train(state, dataset, args, device, log, score)
        if rank == 0:
            finish(args)
    finally:
        for file in filter(None, (log, lock)):
            file.close()


if __name__ == "__main__":
    main()
