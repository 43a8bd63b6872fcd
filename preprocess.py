"""Photos (a folder, a zip, or drawn ones) -> square RGB crops, data/<size>/{train,valid,test}/<name>.png.

    python preprocess.py img_align_celeba.zip --partition list_eval_partition.txt    # CelebA, read in place
    python preprocess.py my_photos --sizes 64 128 --crop 400                         # any folder, recursively
    python preprocess.py --demo 4000 --sizes 64                                      # no data: drawn faces
    python preprocess.py --download                                                  # CelebA by torchvision

Each photo is decoded once: EXIF orientation, first frame, RGB (transparency over white), the centred square, an
antialiased resize. Run again it does only what is missing; another --crop needs another --dataroot. Photos that give
no crop are listed with their reasons in data/skipped.txt. The split is CelebA's partition file, where given or found,
or else 90/10 by a hash of the name, which never moves an image when others are added.
"""

import argparse
import errno
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image, ImageOps
from tqdm import tqdm

from support.cli import Formatter, count_cores, natural
from support.files import atomic_write, cannot_write, printable
from support.images import PNG
from support.photos import SPLITS, Photo, find_photos, open_zip, read_photo, to_rgb


def find_missing(args: argparse.Namespace, photos: list[Photo]) -> list[Photo]:
    """Note in each photo which sizes have no crop yet. Makes the folders; clears what a killed run left."""
    there = {}
    for size in args.sizes:
        for split in SPLITS:
            folder = args.dataroot / str(size) / split
            try:
                folder.mkdir(parents=True, exist_ok=True)
                names = os.listdir(folder)
            except OSError as error:
                raise cannot_write(folder, error) from error
            for name in names:
                if name.endswith(".png"):
                    there[size, name.removesuffix(".png")] = split
                with suppress(OSError):  # a minute old: no other run is still writing it
                    if name.endswith(".tmp") and time.time() - (folder / name).stat().st_mtime > 60:
                        (folder / name).unlink()
        refuse_other_crop(args, size, begun=any(key[0] == size for key in there))
    for photo in photos:
        for size in args.sizes:
            old = there.get((size, photo.name), photo.split)
            if old != photo.split and not photo.reason:
                raise SystemExit(f"error: {printable(photo.name)}.png is in {args.dataroot / str(size) / old} already "
                                 f"and would now be in {photo.split}; give the same --partition as before, or remove "
                                 f"{args.dataroot / str(size)}")
    return [p._replace(todo=tuple(size for size in args.sizes if (size, p.name) not in there)) for p in photos]


def refuse_other_crop(args: argparse.Namespace, size: int, begun: bool) -> None:
    """Keeps --crop beside the first crops of a size. Raises SystemExit when it is another now: they would not match."""
    note, now = args.dataroot / str(size) / "crop.txt", f"--crop {args.crop}" if args.crop else "no --crop"
    try:
        before = note.read_text(errors="replace") if begun and note.exists() else now
    except OSError as error:
        raise cannot_write(note, error) from error
    if before != now:
        raise SystemExit(f"error: the crops in {note.parent} were made with {printable(before)}, now it is {now}; give "
                         f"the same as before or another --dataroot, or remove {note.parent}")
    if not begun:
        with atomic_write(note) as file:
            file.write(now.encode())


def square(image: Image.Image, side: int) -> Image.Image:
    """The centred square of the upright photo, RGB, `side` pixels of its own wide."""
    image.load()
    with suppress(Exception):  # damaged EXIF: the pixels are as good without it
        ImageOps.exif_transpose(image, in_place=True)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_rgb(image if box == (0, 0, *image.size) else image.crop(box))  # a copy of 50 MP takes 200 MB


def process(args: argparse.Namespace, photo: Photo) -> tuple[dict[int, str], str]:
    """Write the missing crops of one photo.

    Returns {size: why there is none, '' where written} and why the photo gives no crop at all, '' if it does.
    Raises SystemExit where nothing more can be written (a full disk).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            image = read_photo(args, photo)
            side, short = args.crop or min(image.size), min(image.size)
            small = {size: f"smaller than {size}" for size in args.sizes if side < size and not args.allow_upscale}
            if side > short:
                small = dict.fromkeys(args.sizes, "smaller than --crop")
            outcome = {size: small.get(size, "") for size in photo.todo}
            crop = None if all(outcome.values()) else square(image, side)
    except Exception as error:  # decoders raise anything
        return {}, f"unreadable: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}"
    for size in (size for size, reason in outcome.items() if not reason):
        # Bicubic, its support scaled with the reduction: less ringing than Lanczos, in 0.6 of the time.
        face = crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None)
        try:
            with atomic_write(args.dataroot / str(size) / photo.split / f"{photo.name}.png") as file:
                face.save(file, "PNG", **PNG)
        except SystemExit as stop:
            if getattr(stop.__cause__, "errno", None) != errno.ENAMETOOLONG:
                raise
            return {}, "name too long"
    return outcome, small[args.sizes[0]] if len(small) == len(args.sizes) else ""


def start_worker() -> None:
    """Leave Ctrl-C to the parent process, and end when it does, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def run(args: argparse.Namespace, photos: list[Photo]) -> list[tuple[Photo, dict[int, str], str]]:
    """(photo, *process(photo)) for each of `photos`, in all worker processes."""
    work, bar = partial(process, args), partial(tqdm, photos, unit="img", desc="preprocess", disable=None)
    pool = None
    if args.workers > 1 and len(photos) >= 32:
        with suppress(OSError):  # no /dev/shm, so no semaphores: this process has to do
            pool = ProcessPoolExecutor(min(args.workers, 61), initializer=start_worker)  # Windows takes no more
    if pool is None:
        return [(photo, *work(photo)) for photo in bar()]
    try:
        results = pool.map(work, photos, chunksize=8)
        return [(photo, *result) for photo, result in zip(bar(), results, strict=True)]
    except BrokenProcessPool:
        raise SystemExit("error: a worker process was killed (out of memory?); run the same command again, perhaps "
                         "with fewer --workers: what was written stays") from None
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C too: the chunks in work are done within a second or so


def summary(args: argparse.Namespace, photos: list[Photo], results: list, seconds: float) -> str:
    """The last line: written, there already and skipped for each size, then what gave no crop, by reason."""
    parts = []
    for size in args.sizes:
        written = Counter(photo.split for photo, outcome, _ in results if outcome.get(size) == "")
        small = Counter(outcome[size] for _, outcome, _ in results if outcome.get(size))
        there = sum(not photo.reason and size not in photo.todo for photo in photos)
        splits = ", ".join(f"{written[split]:,} {split}" for split in SPLITS if written[split])
        skipped = "".join(f", {count:,} skipped: {reason}" for reason, count in small.items())
        splits = f" ({splits})" if splits else ""
        parts.append(f"{size}: {written.total():,} written{splits}, {there:,} there already{skipped}")
    reasons = [photo.reason for photo in photos] + [why for _, outcome, why in results if not outcome]
    if any(reasons):
        kinds = Counter(reason.partition(":")[0] for reason in reasons if reason)
        parts.append(", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
                     + f" (listed in {args.dataroot / 'skipped.txt'})")
    return "; ".join([*parts, f"{len(results) / max(seconds, 1e-9):,.0f} img/s"])


def download(dataroot: Path) -> Path:
    """CelebA's zip, fetched by torchvision into `dataroot`/celeba unless it is there. Raises SystemExit."""
    src = dataroot / "celeba" / "img_align_celeba.zip"
    if not (src.is_file() and (src.parent / "list_eval_partition.txt").is_file()):
        try:
            from torchvision.datasets import CelebA

            CelebA(str(dataroot), split="all", download=True)
        except Exception as error:  # Google Drive's quota, no gdown, no network
            command = shlex.join(["python", "preprocess.py", str(src), "--dataroot", str(dataroot)])
            raise SystemExit(
                f"error: CelebA could not be downloaded ({printable(error)[:200]}); put img_align_celeba.zip and "
                "list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into "
                f"{src.parent} by hand and run: {command}") from None
    return src


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    add("src", nargs="?", type=Path, metavar="SRC", help="folder of photos (recursively) or a .zip")
    add("--dataroot", type=Path, default=Path("data"), help="folder for the crops")
    add("--sizes", type=natural(1), nargs="+", default=[64, 128], help="sides of the crops")
    add("--crop", type=natural(1), help="side of the square in source pixels, if not the short side")
    add("--allow-upscale", action="store_true", help="keep photos whose square is below a size")
    add("--partition", type=Path, help="list_eval_partition.txt, if not the one in or beside SRC")
    add("--demo", type=natural(1), metavar="N", help="draw N faces instead of reading SRC")
    add("--seed", type=natural(0), default=0, help="of the faces that --demo draws")
    add("--download", action="store_true", help="fetch CelebA instead of reading SRC")
    add("--workers", type=natural(0), default=count_cores(), help="processes; 0 works in this one")
    args = parser.parse_args(argv)
    args.sizes = sorted(set(args.sizes))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if (args.src is not None) + bool(args.demo) + args.download != 1:
        raise SystemExit("error: give one of SRC (a folder of photos or a .zip), --demo N or --download")
    if args.download:
        args.src = download(args.dataroot)
    photos = find_photos(args)
    if not photos:
        raise SystemExit(f"error: SRC {printable(args.src)} holds no files; give a folder of photos or a .zip")
    photos = find_missing(args, photos)
    start = time.perf_counter()
    try:
        results = run(args, [photo for photo in photos if photo.todo and not photo.reason])
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        open_zip.cache_clear()
    seconds = time.perf_counter() - start
    skipped = [(p.key, p.reason) for p in photos if p.reason] + [(p.key, why) for p, _, why in results if why]
    with atomic_write(args.dataroot / "skipped.txt") as file:
        file.writelines(f"{printable(key)}: {printable(why)}\n".encode() for key, why in sorted(skipped))
    if len(skipped) == len(photos):
        raise SystemExit(f"error: {printable(args.src or '--demo')} gave no crop: {args.dataroot / 'skipped.txt'} says "
                         "why, file by file; give a folder of photos, or a zip of them")
    print(summary(args, photos, results, seconds))


if __name__ == "__main__":
    main()
