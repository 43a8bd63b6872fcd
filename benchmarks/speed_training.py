"""Training throughput of train.py and of the PyTorch DCGAN tutorial, FLOPs, and how throughput scales. For speed.py.

The reference is the loop of the DCGAN tutorial (pytorch/examples), rewritten from its description: fp32, contiguous
tensors, ImageFolder with Resize and CenterCrop in two workers, five .item() calls a step.
"""

import argparse
import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torchvision
from timing import items_per_sec, medians_in_turn, synchronize
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from dataloader import DataGenerater, make_loader
from network import Discriminator, Generator
from support.cuda_graph import CudaGraph
from support.devices import DTYPES, keep_freed_memory, pick_precision, place_on_device


def use_torch_convolutions(net: nn.Module) -> nn.Module:
    """Replaces the faster convolutions of network.py by nn.Conv2d and nn.ConvTranspose2d, in place."""
    for layer in net.main:
        for kind in (nn.Conv2d, nn.ConvTranspose2d):
            if isinstance(layer, kind):
                layer.__class__ = kind
    return net


class TutorialLoop:
    """The training loop of the tutorial. The constructor runs one step as warm-up; step() trains on the next batch."""

    def __init__(self, photos: Path, device: torch.device, batch_size: int, image_size: int = 64):
        torch.backends.cudnn.benchmark = True  # the tutorial and train.py both set this
        steps = [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.ToTensor()]
        steps.append(transforms.Normalize((0.5,) * 3, (0.5,) * 3))
        dataset = torchvision.datasets.ImageFolder(str(photos), transforms.Compose(steps))
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=2, drop_last=True)
        self.batches, self.device, self.criterion = iter(self.loader), device, nn.BCELoss()
        self.netG = use_torch_convolutions(Generator(image_size=image_size)).to(device)
        self.netD = use_torch_convolutions(Discriminator(image_size=image_size)).to(device)
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


class TutorialProcess(ProcessPoolExecutor):
    """Runs the tutorial's loop in a separate process, so that our settings of torch and glibc do not reach it."""

    def __init__(self, *arguments):
        start_method = multiprocessing.get_start_method()
        super().__init__(1, multiprocessing.get_context("spawn"), self.start, (start_method, *arguments))

    @classmethod
    def start(cls, start_method: str, *arguments) -> None:
        # A spawned process spawns its DataLoader workers too, which would cost the tutorial seconds per epoch.
        multiprocessing.set_start_method(start_method, force=True)
        cls.loop = TutorialLoop(*arguments)

    @classmethod
    def run_in_child(cls, steps: int, batch_size: int) -> float:
        return images_per_sec(cls.loop, steps, batch_size)

    def images_per_sec(self, steps: int, batch_size: int) -> float:
        return self.submit(self.run_in_child, steps, batch_size).result()


class OurLoop:
    """The step and the loader of train.py, without the log and the checkpoints."""

    def __init__(self, dataset, device: torch.device, batch_size: int, precision: str, size=64, ngf=64, workers=2):
        flags = ["--image-size", size, "--batch-size", batch_size, "--precision", precision, "--ngf", ngf, "--ndf", ngf]
        flags += ["--workers", workers]
        self.args, self.device, self.dataset = train.parse_args([*map(str, flags)]), device, dataset
        self.state, self.data_wait_sec = train.make_state(self.args, device), 0.0
        torch.backends.cudnn.benchmark = True
        self.images = place_on_device(dataset.images, device)
        self.launch = self.plain_step = train.make_step(self.state, self.args, self.images)
        if device.type == "cuda":
            self.launch = CudaGraph(self.plain_step, (self.state.optD, self.state.optG), device)
        self.batches = self.read_batches()
        for _ in range(5 if device.type == "cuda" else 1):  # the warm-up and the recording of the CUDA graph
            self.step()

    def read_batches(self) -> Iterator[torch.Tensor]:
        for epoch in range(10**9):
            pin = self.device.type == "cuda"
            flags = (self.args.batch_size, 0, epoch, 0, self.args.workers, pin)
            yield from make_loader(self.dataset, *flags, as_indices=self.images is not None)

    def step(self) -> None:
        start = time.perf_counter()
        batch = next(self.batches)
        self.data_wait_sec += time.perf_counter() - start
        self.launch(train.step_inputs(self.args, self.state.step, batch))
        self.state.step += 1


def images_per_sec(loop: TutorialLoop | OurLoop, steps: int, batch_size: int) -> float:
    def run_steps():
        for _ in range(steps):
            loop.step()
        synchronize(loop.device)

    time.sleep(1)  # lets the other loop's workers fill their prefetch queue, so that they do not compete for cores
    return items_per_sec(steps * batch_size, run_steps)


def flops_per_image(dataset, device: torch.device, size: int) -> float:
    """FLOPs of one training step, per image."""
    loop = OurLoop(dataset, device, 8, "fp32", size)
    loop.launch = loop.plain_step  # the counter does not see the kernels of a CUDA graph
    with FlopCounterMode(display=False) as counter:
        loop.step()
    return counter.get_total_flops() / 8


def matmul_flops_per_sec(device: torch.device, dtype: torch.dtype, n: int = 3072) -> float:
    """FLOP/s of an (n,n) matrix product, which is the upper bound for convolutions."""
    a = torch.randn(n, n, device=device, dtype=dtype)

    def multiply():
        a @ a
        synchronize(device)

    multiply()
    return statistics.median(items_per_sec(2 * n**3, multiply) for _ in range(5))


def supported_precisions(device: torch.device) -> list[str]:
    """fp32, and bf16 if the device has bf16 support."""
    return sorted({"fp32", pick_precision("auto", device)}, reverse=True)


def measure_training(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Training at 64x64 in each supported precision: throughput, time spent waiting for images, peak GPU memory."""
    results = []
    if "bf16" not in supported_precisions(args.device):
        missing = {"image_size": 64, "precision": "bf16", "batch_size": args.batch_size}
        results.append({"stage": "training", **missing, "goal": "ratio >= 4", "note": "bf16 is not supported here."})
    dataset = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    flops = flops_per_image(dataset, args.device, 64)
    if args.device.type == "cpu":
        keep_freed_memory()
    for precision in supported_precisions(args.device):
        results += measure_precision(args, photos, dataset, precision, flops)
    return results


def measure_precision(
    args: argparse.Namespace, photos: Path, dataset: DataGenerater, precision: str, flops: float
) -> list[dict]:
    batch, device = args.batch_size, args.device
    settings = {"image_size": 64, "precision": precision, "batch_size": batch}
    ours = OurLoop(dataset, device, batch, precision)
    ours.data_wait_sec = 0.0
    with TutorialProcess(photos, device, batch) as tutorial:
        medians = medians_in_turn(
            args.rounds,
            ours_images_per_sec=partial(images_per_sec, ours, args.steps, batch),
            reference_images_per_sec=partial(tutorial.images_per_sec, args.steps, batch),
        )
    limit = matmul_flops_per_sec(device, DTYPES[precision]) / flops
    goal = 10 if device.type == "cuda" else 1.4 if precision == "fp32" else 4
    throughput = {"stage": "training", **settings, **medians, "limit_images_per_sec": limit}
    throughput |= {"gflop_per_image": flops / 1e9, "goal": f"ratio >= {goal}"}
    throughput["note"] = "The reference is the loop of the PyTorch DCGAN tutorial, fp32. "
    throughput["note"] += f"The limit is the matmul rate divided by {flops / 1e9:.2f} GFLOP per image."
    wait = 100 * ours.data_wait_sec / (args.rounds * args.steps * batch / medians["ours_images_per_sec"])
    results = [throughput, {"stage": "training, wait for images", **settings, "ours_percent": wait, "goal": "< 2 %"}]
    results[-1]["note"] = "Percent of the time of a step."
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        results.append({"stage": "training, peak GPU memory", **settings, "ours_gib": peak})
    return results


def measure_growth(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Training throughput as a function of one setting at a time; the other settings keep their defaults."""
    precision = pick_precision("auto", args.device)
    datasets = {size: DataGenerater(dataroot / str(size) / "train", size, in_memory=True) for size in (64, 128)}
    steps, total = max(1, args.steps // 3), len(datasets[64])

    def throughput(size=64, batch=32, ngf=64, images=None, workers=None):
        dataset = copy.copy(datasets[size])
        dataset.paths = dataset.paths[:images]
        dataset.images = dataset.images[:images] if workers is None else None  # None: the loader reads the files
        batch = min(batch, len(dataset))
        loop = OurLoop(dataset, args.device, batch, precision, size, ngf, workers or 0)
        return statistics.median(images_per_sec(loop, steps, batch) for _ in range(args.rounds))

    curves = {
        "batch size": {batch: throughput(batch=batch) for batch in args.batches},
        "image size": {size: throughput(size) for size in (64, 128)},
        "ngf = ndf": {ngf: throughput(ngf=ngf) for ngf in (16, 32, 64, 128)},
        "images in memory": {n: throughput(images=n) for n in (total // 16, total // 4, total)},
        "workers that read files": {workers: throughput(workers=workers) for workers in (0, 1, 2, 4)},
    }
    note = "64x64, batch 32, ngf = ndf = 64, all images in memory, except for the setting in the row."
    fixed = {"stage": "growth of training", "precision": precision, "note": note}
    return [
        {**fixed, "varied": name, "value": value, "ours_images_per_sec": speed}
        for name, points in curves.items()
        for value, speed in points.items()
    ]
