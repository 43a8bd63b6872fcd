"""Every stage beside what people would run instead, and beside what the machine can do at best: one table.

    pip install -r benchmarks/requirements.txt               # matplotlib, for --picture; nothing is installed from here
    python benchmarks/speed.py --photos img_align_celeba.zip --markdown speed.md --picture docs/speed.png
    python benchmarks/speed.py --only training --device cuda

The reference is the DCGAN tutorial of pytorch/examples, its loop written anew from its description: fp32, contiguous,
ImageFolder with Resize and CenterCrop in two workers, five .item() a step. What is compared runs in turn; the table
has medians. Without --photos, drawn faces stand for them.
"""

import argparse
import copy
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from support.cli import Formatter, count_cores, natural
from support.devices import DTYPES, keep_freed_memory, pick_device, pick_precision
from support.seeding import step_latents

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generator
import network
import preprocess
import train
from dataloader import DataGenerater, make_loader, to_float
from support import demo_faces

ROOT = Path(__file__).resolve().parent.parent
START = """
import sys, time
sys.path.insert(0, {root!r})
import train
step, decode = train.train_step, train.DataGenerater.decode_all
def timed_decode(dataset):
    before = time.time()
    decode(dataset)
    print("decode", time.time() - before)
def first_step(*arguments):
    print("ready", time.time())
    step(*arguments)
    raise SystemExit
train.train_step, train.DataGenerater.decode_all = first_step, timed_decode
train.main(sys.argv[1:])
"""


def rate(count: int, function: Callable, *arguments) -> float:
    """`count` things in one call of `function`, per second."""
    start = time.perf_counter()
    function(*arguments)
    return count / (time.perf_counter() - start)


def in_turn(rounds: int, **measures: Callable[[], float]) -> dict[str, float]:
    """The median of each measure; they take turns, so that a busy moment meets all."""
    found = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plain(net: nn.Module) -> nn.Module:
    """The network with torch's own convolutions where network.py has faster ones, as everybody writes it."""
    for layer in net.main:
        for kind in (nn.Conv2d, nn.ConvTranspose2d):
            if isinstance(layer, kind):
                layer.__class__ = kind
    return net


# ---------------------------------------------------------------------------------------------- training


class Tutorial:
    """The loop of the tutorial; after the first step, which warms up, step() goes on with the next batch."""

    def __init__(self, photos: Path, device: torch.device, batch_size: int, image_size: int = 64):
        torch.backends.cudnn.benchmark = True  # as the tutorial has it, and train.py
        steps = [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.ToTensor()]
        steps.append(transforms.Normalize((0.5,) * 3, (0.5,) * 3))
        dataset = torchvision.datasets.ImageFolder(str(photos), transforms.Compose(steps))
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=2, drop_last=True)
        self.batches, self.device, self.criterion = iter(self.loader), device, nn.BCELoss()
        self.netG = plain(network.Generator(image_size=image_size)).to(device)
        self.netD = plain(network.Discriminator(image_size=image_size)).to(device)
        nets = (self.netG, self.netD)
        self.optG, self.optD = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999)) for net in nets)
        self.step()

    def next_batch(self) -> torch.Tensor:
        try:
            return next(self.batches)[0]
        except StopIteration:
            self.batches = iter(self.loader)
            return next(self.batches)[0]

    def step(self) -> tuple:
        self.netD.zero_grad()
        real = self.next_batch().to(self.device)
        label = torch.full((len(real),), 1.0, device=self.device)
        output = self.netD(real).view(-1)
        errD_real = self.criterion(output, label)
        errD_real.backward()
        D_x = output.mean().item()
        fake = self.netG(torch.randn(len(real), 100, 1, 1, device=self.device))
        output = self.netD(fake.detach()).view(-1)
        errD_fake = self.criterion(output, label.fill_(0.0))
        errD_fake.backward()
        D_G_z1 = output.mean().item()
        self.optD.step()
        self.netG.zero_grad()
        output = self.netD(fake).view(-1)
        errG = self.criterion(output, label.fill_(1.0))
        errG.backward()
        self.optG.step()
        return (errD_real + errD_fake).item(), errG.item(), D_x, D_G_z1, output.mean().item()


class TutorialApart(ProcessPoolExecutor):
    """The tutorial's loop in a process of its own, which has none of our settings."""

    def __init__(self, *arguments):
        here = multiprocessing.get_start_method()
        super().__init__(1, multiprocessing.get_context("spawn"), self.start, (here, *arguments))

    @classmethod
    def start(cls, start_method: str, *arguments) -> None:
        # A spawned process spawns its own too: that would cost the loop's workers seconds an epoch.
        multiprocessing.set_start_method(start_method, force=True)
        cls.loop = Tutorial(*arguments)

    @classmethod
    def turn(cls, steps: int, batch_size: int) -> float:
        return images_per_second(cls.loop, steps, batch_size)

    def images_per_second(self, steps: int, batch_size: int) -> float:
        return self.submit(self.turn, steps, batch_size).result()


class Ours:
    """train.py's own step and loader, without its log and its files."""

    def __init__(self, dataset, device: torch.device, batch_size: int, precision: str, size=64, ngf=64, workers=2):
        flags = ["--image-size", size, "--batch-size", batch_size, "--precision", precision, "--ngf", ngf, "--ndf", ngf]
        flags += ["--workers", workers]
        self.args, self.device, self.dataset = train.parse_args([*map(str, flags)]), device, dataset
        self.state, self.waited = train.make_state(self.args, device), 0.0
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        torch.backends.cudnn.benchmark = True
        self.batches = self.epochs()
        for _ in range(5 if self.state.graph else 1):  # past the recording
            self.step()

    def epochs(self):
        for epoch in range(10**9):
            pin = self.device.type == "cuda"
            yield from make_loader(self.dataset, self.args.batch_size, 0, epoch, 0, self.args.workers, pin)

    def step(self) -> None:
        before = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - before
        real = to_float(batch.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)
        z = step_latents(0, self.state.step, len(real)).to(self.device, non_blocking=True)
        train.train_step(self.state, real, z, self.autocast, 0.999)


def images_per_second(loop: Tutorial | Ours, steps: int, batch_size: int) -> float:
    def run():
        for _ in range(steps):
            loop.step()
        wait_for(loop.device)

    time.sleep(1)  # the other loop's workers have read ahead all they may, and take no time from this one
    return rate(steps * batch_size, run)


def flops_per_image(dataset, device: torch.device, size: int) -> float:
    loop = Ours(dataset, device, 8, "fp32", size)
    loop.state.graph = None  # of a replay nothing can be counted
    with FlopCounterMode(display=False) as counter:
        loop.step()
    return counter.get_total_flops() / 8


def matmul_flops(device: torch.device, dtype: torch.dtype, n: int = 3072) -> float:
    """FLOP/s of a square matrix product: what convolutions can reach at best."""
    a = torch.randn(n, n, device=device, dtype=dtype)

    def product():
        a @ a
        wait_for(device)

    product()
    return statistics.median(rate(2 * n**3, product) for _ in range(5))


def precisions(device: torch.device) -> list[str]:
    """fp32, and bf16 where there are units for it."""
    return sorted({"fp32", pick_precision("auto", device)}, reverse=True)


def measure_training(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    rows, batch = [], args.batch_size
    if "bf16" not in precisions(args.device):
        rows.append("| training at 64x64, bf16 | not measured: no bf16 units here | | | >= 4 | |")
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    flops = flops_per_image(dataset, args.device, 64)
    if args.device.type == "cpu":
        keep_freed_memory()
    for precision in precisions(args.device):
        ours = Ours(dataset, args.device, batch, precision)
        ours.waited = 0.0
        with TutorialApart(photos, args.device, batch) as tutorial:
            found = in_turn(
                args.rounds,
                ours=partial(images_per_second, ours, args.steps, batch),
                reference=partial(tutorial.images_per_second, args.steps, batch),
            )
        stall = ours.waited / (args.rounds * args.steps * batch / found["ours"])
        best = matmul_flops(args.device, DTYPES[precision]) / flops
        goal = 10 if args.device.type == "cuda" else 1.4 if precision == "fp32" else 4
        rows.append(
            f"| training at 64x64, {precision}, batch {batch} | {found['ours']:,.1f} img/s | {found['reference']:,.1f} "
            f"img/s: the tutorial's loop | {found['ours'] / found['reference']:.2f} | >= {goal} "
            f"| {best:,.0f} img/s: matmul rate over {flops / 1e9:.2f} GFLOP an image |"
        )
        rows.append(f"| waiting for images in it | {100 * stall:.3f} % of a step | | | < 2 % | |")
        if args.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(args.device) / 2**30
            rows.append(f"| peak GPU memory | {peak:.2f} GiB | | | | |")
    return rows


# ---------------------------------------------------------------------------------------------- other stages


def measure_input(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    files = DataGenerater(dataroot / "64" / "train", 64)
    batches, batch = max(8, 20_000 // args.batch_size), min(args.batch_size, len(dataset))

    def deliver(source, workers):
        count = 0
        for epoch in range(batches):
            for images in make_loader(source, batch, 0, epoch, workers=workers):
                count += len(images)
                if count >= batches * batch:
                    return

    copied = dataset.images[: min(len(dataset), 4096)]
    found = in_turn(
        args.rounds,
        memory=partial(rate, batches * batch, deliver, dataset, 0),
        files=partial(rate, batches * batch, deliver, files, 2),
        copy=partial(rate, len(copied), copied.clone),
    )
    return [
        f"| input, images in memory | {found['memory']:,.0f} img/s | | | >= 3 times training "
        f"| {found['copy']:,.0f} img/s: copying the same bytes |",
        f"| input, files read by 2 workers | {found['files']:,.0f} img/s | | | | |",
    ]


def decode(path: str) -> None:
    with Image.open(path) as image:
        image.load()


def pil_loop(target: Path, path_and_size: tuple[str, int]) -> None:
    """What people write: open, crop, resize, save; once per size."""
    path, size = path_and_size
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    image.save(target / str(size) / f"{Path(path).stem}.png")


def measure_preprocess(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    files = sorted(str(path) for path in photos.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(count_cores()) as pool:
        folder = Path(name)
        for size in (64, 128):
            (folder / "reference" / str(size)).mkdir(parents=True)
        jobs, loop = [(path, size) for path in files for size in (64, 128)], partial(pil_loop, folder / "reference")
        runs = iter(range(10**9))

        def ours():
            flags = ["--dataroot", str(folder / str(next(runs))), "--allow-upscale"]
            preprocess.main([str(photos), *flags])

        found = in_turn(
            args.rounds,
            ours=partial(rate, len(files), ours),
            reference=partial(rate, len(files), lambda: list(pool.map(loop, jobs, chunksize=16))),
            decode=partial(rate, len(files), lambda: list(pool.map(decode, files, chunksize=16))),
        )
    return [
        f"| preprocess to 64 and 128 | {found['ours']:,.0f} photos/s | {found['reference']:,.0f} photos/s: a PIL loop "
        f"over all cores, each size by itself | {found['ours'] / found['reference']:.2f} | >= 1.5 "
        f"| {found['decode']:,.0f} photos/s: decoding alone ({100 * found['ours'] / found['decode']:.0f} % reached) |"
    ]


def measure_generation(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    return [generation(args, precision) for precision in precisions(args.device)]


def generation(args: argparse.Namespace, precision: str) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), iter(range(10**9))
        torch.save(network.Generator().state_dict(), folder / "g.params")
        netG = generator.load_generator(folder / "g.params", args.device, precision)
        reference = plain(network.Generator()).to(args.device).eval()
        faces = next(generator.sample(netG, range(64)))

        @torch.no_grad()
        def naive():
            for i in range(args.faces // 8):
                image = reference(torch.randn(1, 100, 1, 1, device=args.device))
                torchvision.utils.save_image(image, folder / f"{i}.png", normalize=True)

        def ours():
            flags = ["--params", folder / "g.params", "--outdir", folder / f"faces{next(runs)}"]
            flags += ["--device", args.device, "--seeds", f"0-{args.faces - 1}", "--precision", precision]
            generator.main([*map(str, flags)])

        def forward():
            for _ in generator.sample(netG, range(args.faces)):
                pass

        def encode():
            outdir = folder / f"faces{next(runs)}"
            outdir.mkdir()
            generator.save_faces([faces] * (args.faces // 64), range(args.faces), outdir)

        found = in_turn(
            args.rounds,
            ours=partial(rate, args.faces, ours),
            reference=partial(rate, args.faces // 8, naive),
            forward=partial(rate, args.faces, forward),
            encode=partial(rate, args.faces // 64 * 64, encode),
        )
    return (
        f"| generation to PNG at 64x64, {precision} | {found['ours']:,.0f} img/s | {found['reference']:,.0f} img/s: "
        f"one at a time | {found['ours'] / found['reference']:.2f} | >= 5 | {found['forward']:,.0f} img/s: forward "
        f"pass alone; {found['encode']:,.0f} img/s: PNG encoding alone |"
    )


def start_once(dataroot: Path, device: torch.device, *flags) -> tuple[float, float, float]:
    """Of `python train.py` up to its first step: seconds, those of them that decode, and peak memory in GiB."""
    with tempfile.TemporaryDirectory() as outdir:
        command = [sys.executable, "-c", START.format(root=str(ROOT)), "--dataroot", dataroot, "--outdir", outdir]
        begin = time.time()
        child = subprocess.Popen([*map(str, [*command, "--device", device, *flags])], stdout=subprocess.PIPE, text=True)
        told = dict(line.split() for line in child.stdout.read().splitlines())
        _, _, usage = os.wait4(child.pid, 0)
    return float(told["ready"]) - begin, float(told["decode"]), usage.ru_maxrss / 2**20


def measure_start(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    n = len(list((dataroot / "64" / "train").iterdir()))
    starts = [start_once(dataroot, args.device) for _ in range(args.rounds)]
    seconds, decoding, memory = (statistics.median(values) for values in zip(*starts))
    rows = [
        f"| start of train.py to its first step, {n:,} images | {seconds:.2f} s, of which {decoding:.2f} s decode "
        f"({n / decoding:,.0f} img/s) | | | <= 3 s beside decoding | |",
        f"| peak host memory then, after a step of batch 128 | {memory:.2f} GiB, of which {n * 12288 / 2**30:.2f} GiB "
        "images | | | | |",
    ]
    if args.celeba:
        with tempfile.TemporaryDirectory(dir=dataroot) as name:  # links to the same crops: as many files as CelebA's
            folder = Path(name) / "64" / "train"
            folder.mkdir(parents=True)
            crops = sorted((dataroot / "64" / "train").iterdir())
            for i in range(args.celeba):
                os.link(crops[i % n], folder / f"{i:06d}.png")
            seconds, decoding, memory = start_once(Path(name), args.device, "--workers", 8)
        images = args.celeba * 12288 / 2**30
        rows.append(
            f"| the same with {args.celeba:,} images | {seconds:.1f} s, of which {decoding:.1f} s decode; peak "
            f"{memory:.2f} GiB | | | images ({images:.2f} GiB) + 1.5 GB | |"
        )
    return rows


def measure_growth(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[str]:
    """How images/s depend on what one can choose; the picture shows it against the default of each."""
    precision = pick_precision("auto", args.device)
    datasets = {size: DataGenerater(dataroot / str(size) / "train", size, in_memory=True) for size in (64, 128)}
    steps, total = max(1, args.steps // 3), len(datasets[64])

    def speed(size=64, batch=32, ngf=64, images=None, workers=None):
        dataset = copy.copy(datasets[size])
        dataset.paths = dataset.paths[:images]
        dataset.images = dataset.images[:images] if workers is None else None  # None: from the files
        batch = min(batch, len(dataset))
        loop = Ours(dataset, args.device, batch, precision, size, ngf, workers or 0)
        return statistics.median(images_per_second(loop, steps, batch) for _ in range(args.rounds))

    curves = {
        "batch size": {batch: speed(batch=batch) for batch in args.batches},
        "resolution": {size: speed(size) for size in (64, 128)},
        "ngf = ndf": {ngf: speed(ngf=ngf) for ngf in (16, 32, 64, 128)},
        "number of images": {n: speed(images=n) for n in (total // 16, total // 4, total)},
        "workers that read files": {workers: speed(workers=workers) for workers in (0, 1, 2, 4)},
    }
    if args.picture:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, len(curves), figsize=(13, 3), sharey=True, constrained_layout=True)
        for axis, (name, points) in zip(axes, curves.items()):
            axis.semilogy(range(len(points)), list(points.values()), "o-")
            axis.set_xticks(range(len(points)), [str(x) for x in points])
            axis.set(xlabel=name, xlim=(-0.4, len(points) - 0.6))
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("training, images/s")
        figure.suptitle(f"{args.hardware}, {precision}")
        figure.savefig(args.picture, dpi=90)
    told = (f"{name} " + ", ".join(f"{x}: {y:,.1f}" for x, y in points.items()) for name, points in curves.items())
    return [f"| training, img/s by {line} ({precision}) | | | | | |" for line in told]


# ---------------------------------------------------------------------------------------------- all of it


def lay_out(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(photos, dataroot): JPEG files in folders as ImageFolder wants them, and their crops."""
    photos = folder / "photos" / "faces"
    photos.mkdir(parents=True)
    if args.photos is None:
        for i in range(args.count):
            demo_faces.draw_face(0, i).save(photos / f"{i:06d}.jpg", quality=92)
    else:
        with zipfile.ZipFile(args.photos) as archive:
            members = [name for name in archive.namelist() if name.endswith(".jpg")]
            for name in members[:: max(1, len(members) // args.count)][: args.count]:
                (photos / Path(name).name).write_bytes(archive.read(name))
    dataroot = args.dataroot
    if dataroot is None:
        dataroot = folder / "data"
        preprocess.main([str(folder / "photos"), "--dataroot", str(dataroot), "--allow-upscale"])
    return folder / "photos", dataroot


STAGES = {
    "training": measure_training,
    "input": measure_input,
    "preprocess": measure_preprocess,
    "generation": measure_generation,
    "start": measure_start,
    "growth": measure_growth,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=STAGES, default=list(STAGES), help="stages to measure")
    add("--photos", type=Path, help="zip of JPEG photos, such as CelebA's; drawn faces otherwise")
    add("--count", type=natural(256), default=4000, help="of the photos that are used")
    add("--dataroot", type=Path, help="crops to train on, if not those of the photos")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--batch-size", type=natural(2), default=128, help="of the training")
    add("--batches", type=natural(2), nargs="+", default=[32, 64, 128, 256, 512, 1024], help="sizes for the picture")
    add("--steps", type=natural(1), default=12, help="of each training in each round; 200 suit a GPU")
    add("--rounds", type=natural(1), default=3, help="of everything, for the medians")
    add("--faces", type=natural(64), default=1024, help="to generate")
    add("--celeba", type=natural(0), default=202_599, help="images of the memory measurement; 0: none")
    add("--hardware", default=platform.processor() or platform.machine(), help="a word on it, for the table")
    add("--markdown", type=Path, help="file for the table")
    add("--picture", type=Path, help="PNG of how the training's speed grows")
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.device.type == "cuda":
        args.hardware = torch.cuda.get_device_name(args.device)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        photos, dataroot = lay_out(args, Path(name))
        for stage in args.only:
            for row in STAGES[stage](args, photos, dataroot):
                print(row, flush=True)
                rows.append(row)
    table = f"""# Speed

`python benchmarks/speed.py {" ".join(sys.argv[1:] if argv is None else argv)}`

{args.hardware}, {torch.get_num_threads()} threads. torch {torch.__version__}, torchvision {torchvision.__version__},
Pillow {PIL.__version__}, numpy {np.__version__}, Python {platform.python_version()}. Medians of {args.rounds} rounds.

| stage | here | instead | ratio | goal | limit |
|---|---|---|---|---|---|
{chr(10).join(rows)}
"""
    print(table)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
