"""Speed of the stages around the training: input, preprocessing, generation, start of train.py. For speed.py."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image
from speed_training import supported_precisions, use_torch_convolutions
from timing import items_per_sec, medians_in_turn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generator
import preprocess
from dataloader import DataGenerater, make_loader
from network import Generator
from support.files import UserError
from support.workers import count_cores

BYTES_PER_IMAGE = 3 * 64 * 64
FIRST_STEP = Path(__file__).resolve().parent / "first_step.py"


# ---------------------------------------------------------------------------------------------- input


def measure_input(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Images per second that the loader delivers from memory, and from files with two workers."""
    in_memory = DataGenerater(dataroot / "64" / "train", 64, in_memory=True)
    on_disk = DataGenerater(dataroot / "64" / "train", 64)
    batch = min(args.batch_size, len(in_memory))
    batches = max(8, min(20_000, 8 * len(in_memory)) // batch)

    def deliver(dataset, workers):
        count = 0
        for epoch in range(batches):
            for images in make_loader(dataset, batch, 0, epoch, workers=workers):
                count += len(images)
                if count >= batches * batch:
                    return

    copied = in_memory.images[: min(len(in_memory), 4096)]
    medians = medians_in_turn(
        args.rounds,
        memory=partial(items_per_sec, batches * batch, deliver, in_memory, 0),
        files=partial(items_per_sec, batches * batch, deliver, on_disk, 2),
        copy=partial(items_per_sec, len(copied), copied.clone),
    )
    settings = {"image_size": 64, "batch_size": batch}
    memory = {"stage": "input from memory", **settings, "ours_images_per_sec": medians["memory"]}
    memory |= {"limit_images_per_sec": medians["copy"], "goal": ">= 3 times training"}
    memory["note"] = "The limit is a copy of the same bytes."
    files = {"stage": "input from files", **settings, "workers": 2, "ours_images_per_sec": medians["files"]}
    return [memory, files]


# ---------------------------------------------------------------------------------------------- preprocessing


def decode(path: str) -> None:
    with Image.open(path) as image:
        image.load()


def pil_loop(target: Path, path_and_size: tuple[str, int]) -> None:
    """The usual PIL script for one photo and one size: open, crop, resize, save."""
    path, size = path_and_size
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    image.save(target / str(size) / f"{Path(path).stem}.png")


def measure_preprocess(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Photos per second that preprocess.py crops to both sizes, against a PIL loop on all cores."""
    files = sorted(str(path) for path in photos.rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(count_cores()) as pool:
        folder, runs = Path(name), itertools.count()
        for size in (64, 128):
            (folder / "reference" / str(size)).mkdir(parents=True)
        rate = partial(items_per_sec, len(files))
        jobs, loop = [(path, size) for path in files for size in (64, 128)], partial(pil_loop, folder / "reference")

        def ours():
            preprocess.main([str(photos), "--dataroot", str(folder / str(next(runs)))])

        medians = medians_in_turn(
            args.rounds,
            ours_photos_per_sec=partial(rate, ours),
            reference_photos_per_sec=partial(rate, lambda: list(pool.map(loop, jobs, chunksize=16))),
            limit_photos_per_sec=partial(rate, lambda: list(pool.map(decode, files, chunksize=16))),
        )
    result = {"stage": "preprocessing to 64 and 128", "photos": len(files), **medians, "goal": "ratio >= 4"}
    result["note"] = "The reference is a PIL loop on all cores that opens each photo once per size. "
    result["note"] += "The limit is decoding only."
    return [result]


# ---------------------------------------------------------------------------------------------- generation


def measure_generation(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Images per second from generator.params to PNG files, in each supported precision."""
    return [result for precision in supported_precisions(args.device) for result in generate(args, precision)]


def generate(args: argparse.Namespace, precision: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as name:
        folder, runs = Path(name), itertools.count()
        torch.save(Generator().state_dict(), folder / "g.params")
        netG = generator.load_generator(folder / "g.params", args.device, precision)
        reference = use_torch_convolutions(Generator()).to(args.device).eval()
        faces = next(generator.sample(netG, range(64)))

        @torch.no_grad()
        def one_at_a_time():
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
            generator.save_faces([faces] * (args.faces // 64), [outdir / f"{seed}.png" for seed in range(args.faces)])

        medians = medians_in_turn(
            args.rounds,
            ours=partial(items_per_sec, args.faces, ours),
            reference=partial(items_per_sec, args.faces // 8, one_at_a_time),
            forward=partial(items_per_sec, args.faces, forward),
            encode=partial(items_per_sec, args.faces // 64 * 64, encode),
        )
    settings = {"image_size": 64, "precision": precision}
    whole = {"stage": "generation to PNG", **settings, "goal": "ratio >= 5"}
    whole |= {"ours_images_per_sec": medians["ours"], "reference_images_per_sec": medians["reference"]}
    whole["note"] = "The reference draws and saves one image at a time in fp32."
    return [
        whole,
        {"stage": "generation, forward pass only", **settings, "ours_images_per_sec": medians["forward"]},
        {"stage": "generation, PNG encoding only", **settings, "ours_images_per_sec": medians["encode"]},
    ]


# ---------------------------------------------------------------------------------------------- start of train.py


def start_training(dataroot: Path, device: torch.device, *flags) -> dict[str, float]:
    """Runs `python train.py` to its first step. Returns start_sec, decode_sec (a part of it) and peak_memory_gib."""
    with tempfile.TemporaryDirectory() as outdir:
        command = [sys.executable, FIRST_STEP, "--dataroot", dataroot, "--outdir", outdir, "--device", device, *flags]
        start = time.time()
        child = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
        output = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"{FIRST_STEP.name} ended with exit status {child.returncode}; see its message above")
    times = json.loads(output.splitlines()[-1])
    peak = usage.ru_maxrss / 2**20  # Linux counts in KiB
    start_sec = times["first_step_unix_sec"] - start
    return {"start_sec": start_sec, "decode_sec": times["decode_sec"], "peak_memory_gib": peak}


def start_results(images: int, measured: dict, start_goal: str = "", memory_goal: str = "") -> list[dict]:
    start, decoding = measured["start_sec"], measured["decode_sec"]
    note = "After one step of batch 128, decoded images included."
    return [
        {"stage": "start of train.py to first step", "images": images, "ours_sec": start},
        {"stage": "start, decoding", "images": images, "ours_sec": decoding},
        {"stage": "start, decoding rate", "images": images, "ours_images_per_sec": images / decoding},
        {"stage": "start, without decoding", "images": images, "ours_sec": start - decoding, "goal": start_goal},
        {"stage": "start, decoded images", "images": images, "ours_gib": images * BYTES_PER_IMAGE / 2**30},
        {"stage": "start, peak host memory", "images": images, "ours_gib": measured["peak_memory_gib"]}
        | {"goal": memory_goal, "note": note},
    ]


def measure_start(args: argparse.Namespace, photos: Path, dataroot: Path) -> list[dict]:
    """Seconds from the start of train.py to its first step, and peak memory; also for as many images as CelebA has."""
    crops = sorted((dataroot / "64" / "train").iterdir())
    starts = [start_training(dataroot, args.device) for _ in range(args.rounds)]
    medians = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    results = start_results(len(crops), medians, start_goal="<= 3 s")
    if args.celeba:
        with tempfile.TemporaryDirectory(dir=dataroot) as name:  # hard links to the crops, as many as CelebA has images
            folder = Path(name) / "64" / "train"
            folder.mkdir(parents=True)
            for i in range(args.celeba):
                os.link(crops[i % len(crops)], folder / f"{i:06d}.png")
            measured = start_training(Path(name), args.device, "--workers", 8)
        goal = f"<= images + 1.5 GB = {(args.celeba * BYTES_PER_IMAGE + 1.5e9) / 2**30:.2f} GiB"
        results += start_results(args.celeba, measured, memory_goal=goal)
    return results
