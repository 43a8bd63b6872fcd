"""Photos (a folder, a zip, or drawn ones) -> square RGB crops, data/<size>/{train,valid,test}/<name>.png.

    python preprocess.py img_align_celeba.zip --partition list_eval_partition.txt    # CelebA, read in place
    python preprocess.py my_photos --sizes 64 128 --crop 400                         # any folder, recursively
    python preprocess.py --demo 4000 --sizes 64                                      # no data: drawn faces
    python preprocess.py --download                                                  # CelebA by torchvision

Each photo is decoded once: EXIF orientation, first frame, RGB (transparency over white), the centred square,
an antialiased resize. Run again it does only what is missing. A file that cannot be used is listed with its
reason in data/skipped.txt. The split is CelebA's partition file where there is one, and otherwise 90/10 by a
hash of the name, which never moves an image when others are added.
"""

import argparse
import errno
import hashlib
import io
import multiprocessing
import os
import re
import secrets
import signal
import stat
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from demo_faces import draw_face

SPLITS = ("train", "valid", "test")  # numbered 0, 1, 2 in CelebA's list_eval_partition.txt
# Formats whose decoders are fast, run nothing outside this process and know their own size before decoding.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 2**26  # 8192 x 8192: decoded and converted in under 5 s and about 1 GiB, whatever the format
MAX_BYTES = 2**28
ORIENTATION = {  # EXIF tag 0x0112 -> what makes the photo upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ADVICE = {  # what to do about an OSError while writing
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space and run the same command again",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class Job(NamedTuple):
    """What holds for every photo of a run; `src` is None for drawn faces."""

    src: Path | None
    dataroot: Path
    sizes: tuple[int, ...]
    crop: int | None
    upscale: bool
    seed: int


class Photo(NamedTuple):
    """One photo: its name in SRC, where it lies (a path, a zip index, a face number) and what is known of it."""

    key: str
    where: str | int
    reason: str = ""  # why it cannot be used, where that shows before it is opened
    split: str = ""
    name: str = ""  # of the crop, without .png
    todo: tuple[int, ...] = ()  # the sizes that are missing


@contextmanager
def atomic_write(path: str | Path, durable: bool = False):
    """Yield a binary file that appears at `path` whole when the block ends well, and otherwise not at all.

    `durable` also waits until the disk has it. Raises SystemExit with one sentence where `path` cannot be
    written; its __cause__ is the OSError.
    """
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(5)}.tmp")  # short: the name of `path` may use all 255 bytes
    try:
        with temp.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temp.replace(path)
        if durable and os.name == "posix":  # the rename itself is on the disk only once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temp.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> SystemExit:
    """The sentence for an OSError: which path, why, what to do."""
    advice = ADVICE.get(error.errno, "check the folder or choose another one")
    return SystemExit(f"error: cannot write {printable(str(path))}: {error.strerror or error}; {advice}")


def printable(text: str) -> str:
    """`text` on one line: whatever cannot be printed (newlines, broken UTF-8) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ------------------------------------------------------------------------------------------- which photos


def list_folder(src: Path, dataroot: Path) -> list[Photo]:
    """Every file below `src`, sorted. Links to folders are listed, not followed: they may loop or lead anywhere."""
    photos, home = [], dataroot.resolve()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == src:
            raise SystemExit(f"error: cannot read SRC {printable(str(src))}: {error.strerror}; check its permissions")
        photos.append(Photo(Path(error.filename).relative_to(src).as_posix(), "", f"folder: {error.strerror}"))

    for folder, folders, files in os.walk(src, onerror=unreadable):
        here = Path(folder)
        ours = here.resolve() == home  # our own output is not a photo
        for name in list(folders):
            if (here / name).is_symlink():
                photos.append(Photo((here / name).relative_to(src).as_posix(), "", "link to a folder: not followed"))
            if ours and name.isdecimal():
                folders.remove(name)
        photos += [
            Photo((here / name).relative_to(src).as_posix(), str(here / name))
            for name in files
            if not (ours and name == "skipped.txt")
        ]
    return sorted(photos)


def list_zip(src: Path) -> list[Photo]:
    """Every member of the zip `src`, sorted; those that could do harm with the reason why they are left alone."""
    try:
        with zipfile.ZipFile(src) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise SystemExit(
            f"error: SRC {printable(str(src))} is not a folder and not a whole zip file ({printable(str(error))}); "
            "give a folder of photos, or copy the zip again"
        ) from None
    photos = []
    for index, member in enumerate(members):
        key, reason = member.filename.replace("\\", "/"), ""
        if member.is_dir():
            continue
        if key.startswith("/") or re.match("[A-Za-z]:", key) or ".." in key.split("/"):
            reason = "a path that leads out of the zip"
        elif member.flag_bits & 0x1:
            reason = "encrypted"
        elif member.file_size > MAX_BYTES:
            reason = f"{member.file_size:,} bytes: more than {MAX_BYTES:,}"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "compressed by an unusual method"  # zipfile cannot bound the memory of the others
        photos.append(Photo(key, index, reason))
    return sorted(photos)


def crop_name(key: str) -> str:
    """Name of the crop of photo `key`, without .png: safe on every file system, dependent on `key` alone.

    Folders become part of it (`a/1.jpg` -> `a__1`), but for CelebA's own (`img_align_celeba/000001.jpg` ->
    `000001`). Where a name has to be changed or shortened, a hash of the whole `key` keeps it unique.
    """
    key = key.removeprefix("img_align_celeba/")
    stem = key[: -len(Path(key).suffix)] if key.lower().endswith(SUFFIXES) else key
    name = stem.replace("/", "__")
    safe = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]', "_", name)
    safe = safe.encode()[:251].decode(errors="ignore")  # 255 with .png
    device = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe, re.IGNORECASE)
    if safe == name and safe and not device and not safe.startswith("."):
        return name
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:10]
    return "_" + safe.encode()[:230].decode(errors="ignore") + "-" + digest


def hash_split(name: str) -> str:
    """train or test, 90/10, by the name alone."""
    return "test" if hashlib.sha256(name.encode()).digest()[0] * 10 < 256 else "train"


def read_partition(path: Path) -> dict[str, str]:
    """{photo name: split} from CelebA's list_eval_partition.txt (`name 0`), or the same with a comma."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SystemExit(
            f"error: cannot read --partition {printable(str(path))}: {error.strerror}; give CelebA's "
            "list_eval_partition.txt or leave the flag out"
        ) from None
    splits = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"\s*(.+?)[,\s]+([012])\s*", line)
        if match:
            splits[match[1]] = SPLITS[int(match[2])]
        elif line.strip() and number > 1:  # the first line may be a header
            raise SystemExit(
                f"error: line {number} of {printable(str(path))} is not a name and 0, 1 or 2; give CelebA's "
                "list_eval_partition.txt"
            )
    return splits


def find_partition(args: argparse.Namespace) -> Path | None:
    """--partition, or list_eval_partition.txt inside or beside SRC."""
    if args.partition or args.demo:
        return args.partition
    beside = (args.src / "list_eval_partition.txt", args.src.parent / "list_eval_partition.txt")
    return next((path for path in beside if path.is_file()), None)


def assign(photos: list[Photo], partition: Path | None, given: bool) -> list[Photo]:
    """Give each photo its split and name; with a reason for those that the partition leaves out or a name repeats."""
    splits = read_partition(partition) if partition else {}
    known = [p for p in photos if p.key in splits or p.key.split("/")[-1] in splits]
    if partition and not known:
        if given:
            raise SystemExit(f"error: --partition {printable(str(partition))} names none of the photos in SRC; "
                             "give the list that belongs to them or leave the flag out")
        partition = None
    seen, out = {}, []
    for photo in photos:
        name = crop_name(photo.key)
        split = splits.get(photo.key, splits.get(photo.key.split("/")[-1])) if partition else hash_split(name)
        same = unicodedata.normalize("NFC", name).casefold()  # one file where case does not count
        reason = photo.reason
        if not reason and not split:
            reason = f"not in {partition.name}"
        elif not reason and same in seen:
            reason = f"its crop would have the same name as that of {seen[same]}"
        if not reason:
            seen[same] = photo.key
        out.append(photo._replace(name=name, split=split or "", reason=reason))
    return out


def find_missing(photos: list[Photo], job: Job) -> list[Photo]:
    """Note in each photo the sizes that have no crop yet. Makes the folders; clears what a killed run left."""
    there = {}
    for size in job.sizes:
        for split in SPLITS:
            folder = job.dataroot / str(size) / split
            try:
                folder.mkdir(parents=True, exist_ok=True)
                names = set(os.listdir(folder))
                for name in names:
                    if name.endswith(".tmp") and time.time() - (folder / name).stat().st_mtime > 60:
                        (folder / name).unlink()
            except OSError as error:
                raise cannot_write(folder, error) from error
            there.update({(size, name.removesuffix(".png")): split for name in names if name.endswith(".png")})
    out = []
    for photo in photos:
        for size in job.sizes if not photo.reason else ():
            old = there.get((size, photo.name))
            if old and old != photo.split:
                raise SystemExit(
                    f"error: {job.dataroot / str(size) / old} already holds {photo.name}.png, which this run would "
                    f"put into {photo.split}; give the same --partition as before, or remove {job.dataroot / str(size)}"
                )
        out.append(photo._replace(todo=tuple(s for s in job.sizes if (s, photo.name) not in there)))
    return out


# ------------------------------------------------------------------------------------------- one photo


@lru_cache(maxsize=1)
def open_zip(src: Path) -> zipfile.ZipFile:
    """The zip, opened once by each process: a handle shared over a fork would share its position too."""
    return zipfile.ZipFile(src)


def read_bytes(job: Job, photo: Photo) -> bytes:
    """The photo's file. Raises OSError, ValueError or zipfile's errors; never waits on a pipe or a device."""
    if isinstance(photo.where, int):
        archive = open_zip(job.src)
        with archive.open(archive.infolist()[photo.where]) as file:
            return file.read(MAX_BYTES)  # zipfile stops at the size that was checked
    info = Path(photo.where).stat()
    if not stat.S_ISREG(info.st_mode):
        raise ValueError("not a regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"{info.st_size:,} bytes: more than {MAX_BYTES:,}")
    return Path(photo.where).read_bytes()


def open_photo(job: Job, photo: Photo) -> Image.Image:
    """The photo, not decoded yet, or the drawn face."""
    if job.src is None:
        return draw_face(job.seed, photo.where)
    return open_image(read_bytes(job, photo))


def open_image(data: bytes) -> Image.Image:
    """A lazily opened image of at most MAX_PIXELS. Raises ValueError with the reason otherwise."""
    if not data:
        raise ValueError("an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more than {MAX_PIXELS:,} pixels") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height}: more than {MAX_PIXELS:,} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: deep grey by its full scale, never clipped; transparency over white."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32))
        peak = grey.max()
        scales = (65535,) if image.mode.startswith("I") else (1, 255, 65535)  # floats come in several conventions
        full = next((scale for scale in scales if peak <= scale), peak)
        image = Image.fromarray((grey / full * 255).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def square(image: Image.Image, crop: int | None) -> Image.Image:
    """The upright photo's centred square, RGB: the whole short side, or `crop` pixels."""
    image.load()
    try:
        turn = ORIENTATION.get(image.getexif().get(0x0112))
    except Exception:  # damaged EXIF: the pixels are as good as without it
        turn = None
    if turn is not None:
        image = image.transpose(turn)
    side = crop or min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return to_rgb(image.crop((left, top, left + side, top + side)))


def process(job: Job, photo: Photo) -> tuple[dict[int, str], str]:
    """Write the crops of one photo that are missing.

    Returns ({size: reason that there is none, '' where written}, reason for skipped.txt or '').
    Raises SystemExit where nothing can be written any more (a full disk).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            image = open_photo(job, photo)
            short = min(image.size)
            side = job.crop or short
            if side > short:
                return {}, "smaller than --crop"
            small = {} if job.upscale else {size: f"smaller than {size}" for size in job.sizes if side < size}
            todo = [size for size in photo.todo if size not in small]
            crop = square(image, job.crop) if todo else None
    except Exception as error:  # decoders raise anything on damaged files
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return {}, reason
    for size in todo:
        # Bicubic with support scaled to the reduction: sharp, little ringing, and 0.6 of the time of Lanczos.
        face = crop.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None)
        try:
            with atomic_write(job.dataroot / str(size) / photo.split / f"{photo.name}.png") as file:
                face.save(file, "PNG", compress_level=1)  # 3x faster than the default at 128, 5% larger
        except SystemExit as stop:
            if getattr(stop.__cause__, "errno", None) == errno.ENAMETOOLONG:
                return {}, "name too long"
            raise
    outcome = {size: small.get(size, "") for size in photo.todo}
    return outcome, ""


def run(job: Job, photos: list[Photo], workers: int) -> list[tuple[Photo, dict[int, str], str]]:
    """Process every photo that misses a crop. Returns (photo, outcome by size, reason for skipped.txt) for each."""
    todo = [photo for photo in photos if photo.todo and not photo.reason]
    bar = partial(tqdm, total=len(todo), unit="img", desc="preprocess", disable=None)
    work = partial(process, job)
    if not workers or not todo:
        return [(photo, *work(photo)) for photo in bar(todo)]
    pool = ProcessPoolExecutor(workers, initializer=start_worker)
    try:
        results = pool.map(work, todo, chunksize=8)
        return [(photo, *result) for photo, result in zip(bar(todo), results, strict=True)]
    except BrokenProcessPool:
        raise SystemExit("error: a worker process was killed (memory may have run out); run the same command again, "
                         "perhaps with fewer --workers: what was written stays") from None
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it should it be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def summary(job: Job, photos: list[Photo], results: list, seconds: float) -> str:
    """The last line: written, there already and skipped by reason, for each size."""
    parts = []
    for size in job.sizes:
        written = Counter(photo.split for photo, outcome, _ in results if outcome.get(size) == "")
        skipped = Counter(outcome[size] for _, outcome, _ in results if outcome.get(size))
        there = sum(not photo.reason and size not in photo.todo for photo in photos)
        splits = ", ".join(f"{written[split]:,} {split}" for split in SPLITS if written[split])
        parts.append(f"{size}: {written.total():,} written" + (f" ({splits})" if splits else "")
                     + f", {there:,} there already"
                     + "".join(f", {count:,} skipped: {reason}" for reason, count in skipped.items()))
    return "; ".join(parts) + f"; {len(results) / max(seconds, 1e-9):,.0f} img/s"


def natural(minimum: int):
    """An argparse type: a whole number of at least `minimum`."""

    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return value

    return number


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every flag."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter)
    add = parser.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add("src", nargs="?", type=Path, metavar="SRC", help="folder of photos, searched recursively, or a .zip")
    add("--dataroot", type=Path, default=Path("data"), help="folder for the crops")
    add("--sizes", type=natural(1), nargs="+", default=[64, 128], help="sides of the crops")
    add("--crop", type=natural(1), help="side of the centred square in source pixels (default: the short side)")
    add("--allow-upscale", action="store_true", help="keep photos whose square is smaller than a size")
    add("--partition", type=Path, help="list_eval_partition.txt (default: the one in or beside SRC)")
    add("--demo", type=natural(1), metavar="N", help="draw N faces instead of reading SRC")
    add("--download", action="store_true", help="fetch CelebA instead of reading SRC")
    add("--workers", type=natural(0), default=cores, help="processes; 0: this one only")
    add("--seed", type=int, default=0, help="of the faces of --demo")
    return parser.parse_args(argv)


def list_photos(args: argparse.Namespace) -> list[Photo]:
    """The photos of SRC, or the numbers of the faces to draw. Raises SystemExit when there is nothing to do."""
    if args.demo:
        return [Photo(f"{i:06d}", i) for i in range(args.demo)]
    if args.src is None:
        raise SystemExit("error: SRC is missing; give a folder of photos or a .zip, or --demo 4000 to have faces drawn")
    if not args.src.exists():
        raise SystemExit(f"error: SRC {printable(str(args.src))} does not exist; give a folder of photos or a .zip")
    photos = list_folder(args.src, args.dataroot) if args.src.is_dir() else list_zip(args.src)
    if not photos:
        raise SystemExit(f"error: SRC {printable(str(args.src))} holds no files; give a folder of photos or a .zip")
    return photos


def download(folder: Path) -> Path:
    """Fetches CelebA's photos and partition by torchvision, which checks them. Returns the zip."""
    from torchvision.datasets import CelebA  # here, since it takes seconds to import

    photos, partition = folder / "celeba" / "img_align_celeba.zip", folder / "celeba" / "list_eval_partition.txt"
    if not (photos.is_file() and partition.is_file()):
        try:
            CelebA(str(folder), split="all", download=True)
        except Exception as error:  # quota pages, missing gdown, no network: some ten kinds
            raise SystemExit(
                f"error: CelebA could not be downloaded ({type(error).__name__}); get img_align_celeba.zip and "
                f"list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html by hand, put "
                f"them into {photos.parent} and run this command again"
            ) from None
    return photos


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.download:
        args.src = download(args.dataroot)
    photos = assign(list_photos(args), find_partition(args), bool(args.partition))
    src = None if args.demo else args.src
    job = Job(src, args.dataroot, tuple(sorted(set(args.sizes))), args.crop, args.allow_upscale, args.seed)
    photos = find_missing(photos, job)
    start = time.perf_counter()
    results = run(job, photos, args.workers)
    skipped = [(p.key, p.reason) for p in photos if p.reason] + [(p.key, why) for p, _, why in results if why]
    with atomic_write(args.dataroot / "skipped.txt") as file:
        file.writelines(f"{printable(key)}: {printable(why)}\n".encode() for key, why in sorted(skipped))
    print(summary(job, photos, results, time.perf_counter() - start))
    if skipped:
        print(f"{len(skipped):,} files could not be used: see {args.dataroot / 'skipped.txt'}")
    if not any(outcome.get(size) == "" for _, outcome, _ in results for size in job.sizes) and not any(
        not photo.reason and len(photo.todo) < len(job.sizes) for photo in photos
    ):
        raise SystemExit("error: SRC gave no crop at all; give a folder of photos, or a zip of them")


if __name__ == "__main__":
    main()
