"""Batches of faces + networks -> runs/<size>/generator.params.

    python train.py                              # the report: DCGAN at 64x64, BCE, Adam 2e-4/0.5, batch 128, 5 epochs
    python train.py --image-size 128             # the same at 128x128
    python train.py --resume                     # goes on from the last checkpoint, bit for bit
    python train.py --demo                       # no data at hand: on drawn faces, a few minutes on two cores
    torchrun --nproc-per-node 4 train.py         # four GPUs; --batch-size is the total

Writes into --outdir: generator.params (the average of the generator, what you want), generator_raw.params (its last
iterate), checkpoint.pt and checkpoint_previous.pt, log.jsonl, losses.png, args.json, samples/ (a grid an epoch) and
training.gif.
"""

import argparse
import copy
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import network
import network_128
import preprocess
from dataloader import (
    DataGenerater,
    fingerprint,
    fits_in_memory,
    image_grid,
    make_loader,
    save_animation,
    save_image,
    to_float,
    to_uint8,
)
from preprocess import atomic_write

NETWORKS = {64: network, 128: network_128}
CHECKPOINTS = ("checkpoint.pt", "checkpoint_previous.pt")  # the newest first
LOG_EVERY = 20  # steps: the only moments at which the processor waits for the GPU
DEMO = {"dataroot": Path("data/demo"), "outdir": Path("runs/demo")}
# A narrow D: the full one soon tells drawn faces from generated ones too well for G to learn in so few steps.
DEMO |= {"ndf": 32, "batch_size": 32, "epochs": 6, "ema": 0.99}
# What has to be the same for a resumed training to be the same training.
FIXED = ("image_size", "batch_size", "lr", "beta1", "nz", "ngf", "ndf", "ema", "precision", "seed", "images")


@dataclass
class State:
    """All that a step changes. `totals` holds sums of loss_d, loss_g, D(x), D(G(z)) since the last row of the log."""

    netG: nn.Module
    netD: nn.Module
    average: nn.Module
    optG: torch.optim.Optimizer
    optD: torch.optim.Optimizer
    totals: torch.Tensor
    step: int = 0

    def parts(self) -> dict:
        return {name: getattr(self, name) for name in ("netG", "netD", "average", "optG", "optD")}


def make_state(args: argparse.Namespace, device: torch.device) -> State:
    """Fresh networks, their average and optimisers; the same for the same seed."""
    torch.manual_seed(args.seed)
    nets = NETWORKS[args.image_size]
    netG = nets.Generator(args.nz, args.ngf).to(device, memory_format=torch.channels_last)
    netD = nets.Discriminator(args.ndf).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(netG).requires_grad_(False).eval()
    adams = [torch.optim.Adam(net.parameters(), args.lr, (args.beta1, 0.999), foreach=True) for net in (netG, netD)]
    if args.compile:
        netG.compile()
        netD.compile()
    return State(netG, netD, average, *adams, totals=torch.zeros(4, device=device))


def train_step(state: State, real: torch.Tensor, z: torch.Tensor, autocast: torch.autocast, ema: float) -> None:
    """One step of D and one of G on `real` (N,3,S,S) in [-1,1] and latents `z`, as in the DCGAN paper and the report.

    The losses are taken outside autocast: BCE is not safe in bf16, and CUDA refuses it there.
    """
    netG, netD, bce = state.netG, state.netD, nn.functional.binary_cross_entropy
    ones = torch.ones(len(real), 1, 1, 1, device=real.device)
    zeros = torch.zeros_like(ones)

    state.optD.zero_grad()
    with autocast:
        fake = netG(z)
        d_real, d_fake = netD(real), netD(fake.detach())
    errD = bce(d_real, ones) + bce(d_fake, zeros)
    errD.backward()
    average_over_ranks([p.grad for p in netD.parameters()])
    state.optD.step()

    state.optG.zero_grad()
    netD.requires_grad_(False)  # G's step needs the gradient through D, not the gradients of D's weights
    with autocast:
        judged = netD(fake)
    errG = bce(judged, ones)
    errG.backward()
    netD.requires_grad_(True)
    statistics = [buffer for buffer in netG.buffers() if buffer.is_floating_point()]
    average_over_ranks([p.grad for p in netG.parameters()] + statistics)
    state.optG.step()

    state.totals += torch.stack([errD.detach(), errG.detach(), d_real.detach().mean(), d_fake.detach().mean()])
    state.step += 1
    update_average(state, ema)


@torch.no_grad()
def update_average(state: State, ema: float) -> None:
    """Moves the average of G, BatchNorm statistics included, towards G. Short at first, so that few steps do too."""
    decay = min(ema, state.step / (state.step + 10))
    mine, theirs = state.average.state_dict().values(), state.netG.state_dict().values()
    pairs = [(a, b) for a, b in zip(mine, theirs) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)


def average_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Mean of each tensor over the processes of torchrun, in place; nothing to do in a single one."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


# ---------------------------------------------------------------------------------------------- on the disk


def save_tensors(content: dict, path: Path) -> None:
    with atomic_write(path, durable=True) as file:
        torch.save(content, file)


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
            content = network.load_tensors(args.outdir / name, "leave out --resume to start anew in another --outdir")
            break
        except SystemExit as problem:
            problems.append(str(problem))
    else:
        raise SystemExit(problems[0])
    newest = args.outdir / CHECKPOINTS[0]
    if problems and newest.exists():
        print(f"warning: {newest} is damaged: going on from {name}", file=sys.stderr)
    for flag, before in content.get("fixed", {}).items():
        if before != getattr(args, flag):
            what = "the number of training images" if flag == "images" else "--" + flag.replace("_", "-")
            raise SystemExit(
                f"error: --resume: {what} was {before} in {args.outdir}, now {getattr(args, flag)}; "
                "make it the same again, or start anew in another --outdir"
            )
    try:
        for part, value in state.parts().items():
            value.load_state_dict(content[part])
        state.step = content["step"]
        state.totals.copy_(content["totals"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        where = args.outdir / name
        raise SystemExit(f"error: {where} is not a checkpoint of this training; choose another --outdir") from None


def save_params(state: State, args: argparse.Namespace) -> None:
    for net, name in ((state.average, "generator.params"), (state.netG, "generator_raw.params")):
        save_tensors(net.state_dict(), args.outdir / name)


def read_log(path: Path, last_step: int) -> list[dict]:
    """The rows of log.jsonl up to `last_step`; a killed training may have left later ones, and half a row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if row["step"] <= last_step]


def open_outdir(args: argparse.Namespace):
    """Makes --outdir and locks it: the system lets go of the lock however this process ends."""
    begun = any((args.outdir / name).exists() for name in CHECKPOINTS)
    if begun and not args.resume:
        raise SystemExit(f"error: {args.outdir} holds a training; go on by --resume, or choose another --outdir")
    if args.resume and not begun:
        raise SystemExit(f"error: --resume: there is no checkpoint in {args.outdir}; leave out --resume to start one")
    try:
        (args.outdir / "samples").mkdir(parents=True, exist_ok=True)
        lock = (args.outdir / ".lock").open("w")
    except OSError as error:
        raise SystemExit(f"error: cannot write to --outdir {args.outdir} ({error.strerror}); choose another") from None
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(f"error: another training is running in {args.outdir}; choose another --outdir") from None
    return lock


def git_commit() -> str | None:
    """The commit of this repository, where it is one and git is there to ask."""
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return git.stdout.strip() or None


def save_args(args: argparse.Namespace, device: torch.device, data: str) -> None:
    """args.json: everything that goes into the result."""
    facts = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    facts |= {"device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()}
    facts |= {"torch": torch.__version__, "python": platform.python_version(), "data_sha256": data}
    facts |= {"threads": torch.get_num_threads(), "git_commit": git_commit()}
    with atomic_write(args.outdir / "args.json") as file:
        file.write(json.dumps(facts, indent=2).encode())


# ---------------------------------------------------------------------------------------------- pictures


@torch.inference_mode()
def save_samples(state: State, args: argparse.Namespace, epoch: int, device: torch.device) -> None:
    """The average's faces of seeds 0-63, after each epoch the same."""
    faces = to_uint8(state.average(network.latents(range(64), args.nz).to(device))).cpu()
    save_image(image_grid(faces), args.outdir / "samples" / f"epoch_{epoch:03d}.png")


def plot_losses(rows: list[dict], path: Path) -> None:
    """A picture of both losses against images seen."""
    width, height, margin = 900, 420, 50
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = max([row[name] for row in rows for name in ("loss_d", "loss_g")] + [1e-9])
    last = max(row["images_seen"] for row in rows)
    for i in range(5):
        y = height - margin - i / 4 * (height - 2 * margin)
        draw.line([(margin, y), (width - margin, y)], "#dddddd")
        draw.text((8, y - 6), f"{top * i / 4:.2f}", "black")
        x = margin + i / 4 * (width - 2 * margin)
        draw.text((x - 20, height - margin + 8), f"{last * i / 4:,.0f}", "black")
    draw.text((width // 2 - 40, height - 22), "real images seen", "black")
    for i, (name, colour) in enumerate({"loss_d": "#1f77b4", "loss_g": "#d62728"}.items()):
        points = [
            (
                margin + row["images_seen"] / last * (width - 2 * margin),
                height - margin - row[name] / top * (height - 2 * margin),
            )
            for row in rows
        ]
        draw.line(points, colour, 2, joint="curve")
        draw.text((margin + 10 + 90 * i, 18), name, colour)
    save_image(picture, path)


def finish(args: argparse.Namespace) -> None:
    """The pictures of a whole training, and what to do next."""
    rows = read_log(args.outdir / "log.jsonl", sys.maxsize)
    plot_losses(rows, args.outdir / "losses.png")
    grids = [Image.open(path).convert("RGB") for path in sorted((args.outdir / "samples").glob("epoch_*.png"))]
    save_animation(grids, args.outdir / "training.gif", milliseconds=400)
    print(f"\ntrained: {args.outdir / 'generator.params'}; look at {args.outdir / 'samples'}; next:")
    print(f"  python generator.py --params {args.outdir / 'generator.params'} --grid --interpolate")
    print(f"  python evaluate.py --params {args.outdir / 'generator.params'} --dataroot {args.dataroot}")


# ---------------------------------------------------------------------------------------------- the training


def pick_precision(name: str, device: torch.device) -> str:
    """bf16 where `auto` finds units made for it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if device.type == "cpu" and fast else "fp32"


def catch_signals() -> list[int]:
    """A list that the first SIGINT or SIGTERM is put into; a second one ends the process at once."""
    caught = []

    def catch(number: int, _frame) -> None:
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


def log_row(state: State, args: argparse.Namespace, epoch: int, steps: int, since: list, file) -> dict:
    """Appends a row, means over the last `steps`, to log.jsonl. Raises SystemExit once a loss is no number any more."""
    now = time.perf_counter()
    average_over_ranks([state.totals])
    means = (state.totals / steps).tolist()
    state.totals.zero_()
    speed = (state.step - since[0]) * args.batch_size / (now - since[1])
    since[:] = state.step, now
    row = {"step": state.step, "epoch": epoch, "images_seen": state.step * args.batch_size}
    row |= {name: round(mean, 6) for name, mean in zip(("loss_d", "loss_g", "d_real", "d_fake"), means)}
    row |= {"images_per_sec": round(speed, 1)}
    if any(mean != mean or abs(mean) == float("inf") for mean in means):
        raise SystemExit(diverged(state, args))
    if file and row["loss_d"] < 1e-3:
        tqdm.write(
            f"warning: D has won at step {state.step} (loss {row['loss_d']:.1e}): G learns next to nothing from it; "
            "if this stays, start anew with a smaller --ndf or --lr",
            file=sys.stderr,
        )
    if file:
        file.write(json.dumps(row) + "\n")
        file.flush()
    return row


def diverged(state: State, args: argparse.Namespace) -> str:
    return (
        f"error: a loss is NaN or infinite near step {state.step}: training has diverged; the last good checkpoint is "
        f"kept in {args.outdir}; start anew in another --outdir with another --seed or a lower --lr"
    )


def train(state: State, dataset: DataGenerater, args: argparse.Namespace, device: torch.device, rank: int, world: int):
    """The loop: from state.step to the end of --epochs."""
    caught, steps_per_epoch = catch_signals(), len(dataset) // args.batch_size
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    log = (args.outdir / "log.jsonl").open("a") if rank == 0 else None
    since = [state.step, time.perf_counter()]
    for epoch in range(state.step // steps_per_epoch, args.epochs):
        first = state.step % steps_per_epoch
        loader = make_loader(
            dataset, args.batch_size, args.seed, epoch, first, args.workers, device.type == "cuda", rank, world
        )
        bar = tqdm(loader, f"epoch {epoch + 1}/{args.epochs}", steps_per_epoch, initial=first, disable=rank > 0 or None)
        for batch in bar:
            real = to_float(batch.to(device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
            z = network.step_latents(args.seed, state.step, args.batch_size, args.nz)[rank::world]
            train_step(state, real, z.to(device, non_blocking=True), autocast, args.ema)
            done = state.step - epoch * steps_per_epoch
            last = done == steps_per_epoch
            if done % LOG_EVERY == 0 or last:
                row = log_row(state, args, epoch + 1, (done - 1) % LOG_EVERY + 1, since, log)
                bar.set_postfix({name: f"{row[name]:.3g}" for name in list(row)[3:]})
            if rank == 0 and (last or caught or (args.checkpoint_every and state.step % args.checkpoint_every == 0)):
                if last:
                    save_samples(state, args, epoch + 1, device)
                    save_params(state, args)
                save_checkpoint(state, args)
            if caught:
                print(f"\nstopped at step {state.step}; go on with --resume --outdir {args.outdir}", file=sys.stderr)
                sys.exit(128 + caught[0])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=preprocess.Formatter)
    add, natural = parser.add_argument, preprocess.natural
    add("--image-size", type=int, choices=NETWORKS, default=64, help="side of the faces")
    add("--dataroot", type=Path, default=Path("data"), help="folder that preprocess.py made")
    add("--outdir", type=Path, help="folder for the results (default: runs/<image size>)")
    add("--epochs", type=natural(1), default=5, help="passes over the training images")
    add("--batch-size", type=natural(2), default=128, help="real images a step, over all processes")
    add("--lr", type=float, default=2e-4, help="learning rate of both Adams")
    add("--beta1", type=float, default=0.5, help="first momentum of both Adams")
    add("--nz", type=natural(1), default=100, help="length of a latent")
    add("--ngf", type=natural(1), default=64, help="channels of G before its last layer")
    add("--ndf", type=natural(1), default=64, help="channels of D after its first layer")
    add("--ema", type=float, default=0.999, help="decay of the average of G; 0: no average")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="bf16 by autocast, or fp32")
    add("--compile", action="store_true", help="compile the networks: slower to start, then faster")
    add("--workers", type=natural(0), default=2, help="reading processes, where the images do not fit in memory")
    add("--seed", type=natural(0), default=0, help="of weights, latents and order")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--checkpoint-every", type=natural(0), default=0, help="steps between checkpoints; 0: after each epoch only")
    add("--resume", action="store_true", help="go on from the last checkpoint in --outdir")
    add("--demo", action="store_true", help="draw faces if need be, and train on them for some minutes")
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    args.outdir = args.outdir or Path("runs") / str(args.image_size)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    root = args.dataroot / str(args.image_size) / "train"
    if args.demo and not root.is_dir():
        preprocess.main(["--demo", "2000", "--dataroot", str(args.dataroot), "--sizes", str(args.image_size)])
    dataset = DataGenerater(root, args.image_size)
    args.images = len(dataset)
    if args.images < args.batch_size:
        raise SystemExit(f"error: {root} holds {args.images} images, fewer than --batch-size; lower that")
    device = network.join_ranks(args.device)
    rank, world = network.rank_and_world_size()
    if args.batch_size % world:
        raise SystemExit(f"error: --batch-size {args.batch_size} cannot be shared by {world} processes evenly")
    args.precision = pick_precision(args.precision, device)
    lock = open_outdir(args) if rank == 0 else None
    if fits_in_memory(args.images, args.image_size):
        dataset.decode_all()
    state = make_state(args, device)
    try:
        if args.resume:
            load_checkpoint(state, args)
        if rank == 0:
            rows = read_log(args.outdir / "log.jsonl", state.step)
            with atomic_write(args.outdir / "log.jsonl") as file:
                file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
            save_args(args, device, fingerprint(dataset.paths, root))
        train(state, dataset, args, device, rank, world)
        if rank == 0:
            finish(args)
    except torch.OutOfMemoryError:
        raise SystemExit("error: the device is out of memory; lower --batch-size, or --ngf and --ndf") from None
    except RuntimeError as error:  # BCE refuses NaN, each device in its own words, before the log could show it
        if not re.search("between 0 and 1|device-side assert", str(error)):
            raise
        raise SystemExit(diverged(state, args)) from None
    finally:
        if lock:
            lock.close()
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
