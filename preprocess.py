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
import hashlib
import io
import math
import multiprocessing
import os
import re
import secrets
import shlex
import signal
import stat
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from demo_faces import draw_face

SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Level 1 with zlib's Z_RLE: a third of the default's time at 128x128, for 2 % more bytes.
PNG = {"compress_level": 1, "compress_type": 3}
MAX_PIXELS = 50_000_000  # decodes in under 5 s and 1 GiB in every format
MAX_BYTES = 2**28


class Photo(NamedTuple):
    """One photo: its name in SRC, where it lies (path, index in the zip, number of the face), what becomes of it."""

    key: str
    where: str | int
    reason: str = ""  # that it gives no crop, where this shows before it is opened
    split: str = ""
    name: str = ""  # of the crop, without .png
    todo: tuple[int, ...] = ()  # sizes that are missing


def printable(text: object) -> str:
    """`text` on one line: what cannot be printed (newlines, broken UTF-8) as backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def cannot_write(path: Path, error: OSError) -> SystemExit:
    """One sentence about an OSError: which path, why, what to do."""
    advice = {errno.ENOSPC: "free some space and run the same command again", errno.ENAMETOOLONG: "shorten its name"}
    todo = advice.get(error.errno, "check the folder or choose another one")
    return SystemExit(f"error: cannot write {printable(path)}: {error.strerror or error}; {todo}")


@contextmanager
def atomic_write(path: str | Path, durable: bool = False):
    """Yield a binary file that appears at `path` whole when the block ends well, and otherwise not at all.

    `durable` waits until the disk has it. Raises SystemExit, one sentence, where `path` cannot be written; its
    __cause__ is the OSError.
    """
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(5)}.tmp")  # short, as the name of `path` may use all 255 bytes
    try:
        with temp.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temp.replace(path)
        if durable and os.name == "posix":  # a rename is on the disk once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of the OSError of a full disk
        while error is not None and not isinstance(error, OSError):
            error = error.__context__
        if error is None:
            raise
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def list_folder(src: Path, dataroot: Path) -> list[Photo]:
    """Every file below `src`, but not our own crops. Links to folders are not followed: they may loop."""
    photos, home = [], dataroot.resolve()

    def unreadable(error: OSError) -> None:
        if Path(error.filename) == src:
            raise error
        photos.append(Photo(Path(error.filename).relative_to(src).as_posix(), "", f"unreadable: {error.strerror}"))

    for folder, folders, files in os.walk(src, onerror=unreadable):
        here, ours = Path(folder), Path(folder).resolve() == home
        links = [name for name in folders if (here / name).is_symlink()]
        photos += [Photo((here / name).relative_to(src).as_posix(), "", "link to a folder") for name in links]
        if ours:
            folders[:] = [name for name in folders if not name.isdecimal()]
            files = [name for name in files if name != "skipped.txt"]
        photos += [Photo((here / name).relative_to(src).as_posix(), str(here / name)) for name in files]
    return sorted(photos)


def list_zip(src: Path) -> list[Photo]:
    """Every file in the zip `src`; with a reason those that are not to be read."""
    try:
        with zipfile.ZipFile(src) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise SystemExit(f"error: SRC {printable(src)} does not exist; give a folder of photos or a .zip") from None
    except Exception as error:  # zipfile raises many kinds on damaged files
        raise SystemExit(f"error: SRC {printable(src)} is not a folder and not a whole zip ({printable(error)}); "
                         "give a folder of photos, or copy the zip again") from None
    photos = []
    for index, member in enumerate(members):
        key, reason = member.filename.replace("\\", "/"), ""
        if key.startswith("/") or re.match("[A-Za-z]:", key) or ".." in key.split("/"):
            reason = "unsafe path: it leads out of the zip"
        elif member.flag_bits & 1:
            reason = "encrypted"
        elif member.file_size > MAX_BYTES:
            reason = f"too large: {member.file_size:,} bytes"
        elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            reason = "unusual compression"  # zipfile unpacks the others with no bound on memory
        if not member.is_dir():
            photos.append(Photo(key, index, reason))
    return sorted(photos)


def crop_name(key: str) -> str:
    """The name of photo `key`'s crop, without .png: fit for every file system and dependent on `key` alone.

    Folders become part of it (a/1.jpg -> a__1), but for CelebA's own (img_align_celeba/000001.jpg -> 000001). A
    name that has to be changed gets a hash of `key`, so that no two become one.
    """
    key = key.removeprefix("img_align_celeba/")
    name = re.sub(r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|p[pgn]m)$", "", key, flags=re.IGNORECASE).replace("/", "__")
    safe = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]|^[.\s]|[.\s]$', "_", name)
    device = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe, re.IGNORECASE)  # Windows keeps these
    if name and safe == name and not device and len(name.encode()) <= 251:  # 255 with .png
        return name
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:10]
    return f"_{safe.encode()[:239].decode(errors='ignore')}-{digest}"


def hash_split(name: str) -> str:
    """train or test, 90/10, by the name alone."""
    return "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 else "train"


def read_partition(path: Path) -> dict[str, str]:
    """{photo name: split} from lines `name 0` (CelebA's) or `name,0`. Raises SystemExit."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise SystemExit(f"error: cannot read --partition {printable(path)}: {error.strerror}; give CelebA's "
                         "list_eval_partition.txt or leave the flag out") from None
    rows = [(line, re.fullmatch(r"\s*(.+?)[,\s]+([012])\s*", line)) for line in lines if line.strip()]
    for line, row in rows[1:]:  # the first may be a header
        if not row:
            raise SystemExit(f"error: the line {printable(line[:60])!r} of --partition {printable(path)} is not a "
                             "name and 0, 1 or 2; give CelebA's list_eval_partition.txt")
    return {row[1]: SPLITS[int(row[2])] for _, row in rows if row}


def find_photos(args: argparse.Namespace) -> list[Photo]:
    """The photos of SRC, or the faces to draw, each with its split and name, or a reason to leave it out."""
    partition = args.partition
    if args.demo:
        photos = [Photo(f"demo_{args.seed}_{number:06d}", number) for number in range(args.demo)]
    else:
        try:
            photos = list_folder(args.src, args.dataroot) if args.src.is_dir() else list_zip(args.src)
            beside = (folder / "list_eval_partition.txt" for folder in (args.src, args.src.parent))
            partition = partition or next((path for path in beside if path.is_file()), None)
        except OSError as error:
            raise SystemExit(f"error: cannot read SRC {printable(args.src)}: {error.strerror}; check its permissions "
                             "and those of the folders above") from None
        photos = [photo for photo in photos if photo.where != str(partition)]
    splits = read_partition(partition) if partition else {}
    listed = [splits.get(photo.key, splits.get(photo.key.rpartition("/")[2], "")) for photo in photos]
    if args.partition and photos and not any(listed):
        raise SystemExit(f"error: --partition {printable(partition)} names none of the photos in SRC; give the list "
                         "that belongs to them or leave the flag out")
    seen, found = {}, []
    for photo, split in zip(photos, listed, strict=True):
        name = crop_name(photo.key)
        split = split if any(listed) else hash_split(name)
        same = unicodedata.normalize("NFC", name).casefold()  # one file to some file systems
        reason = photo.reason or ("" if split else f"not in {partition.name}")
        if not reason and seen.setdefault(same, photo.key) != photo.key:
            reason = f"same name: its crop would overwrite that of {seen[same]}"
        found.append(photo._replace(name=name, split=split, reason=reason))
    return found


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


@lru_cache(maxsize=1)
def open_zip(src: Path) -> zipfile.ZipFile:
    """The zip, opened by each process for itself: a handle that crosses a fork shares its position too."""
    return zipfile.ZipFile(src)


def read_photo(args: argparse.Namespace, photo: Photo) -> Image.Image:
    """A photo, not decoded yet, of at most MAX_PIXELS. Raises any Exception, its text the reason."""
    if args.demo:
        return draw_face(args.seed, photo.where)
    if isinstance(photo.where, int):
        with open_zip(args.src).open(open_zip(args.src).infolist()[photo.where]) as file:
            data = file.read(MAX_BYTES)
    else:
        info = Path(photo.where).stat()
        if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
            raise ValueError("not a regular file")
        if info.st_size > MAX_BYTES:
            raise ValueError(f"{info.st_size:,} bytes")
        data = Path(photo.where).read_bytes()
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image ({', '.join(FORMATS)})" if data else "an empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: 16-bit and float grey by its full scale, not clipped; transparency over white."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0)
        scales = (65535,) if image.mode[0] == "I" else (1, 255, 65535)  # floats come in several conventions
        full = next((scale for scale in scales if grey.max() <= scale), grey.max())
        image = Image.fromarray((grey * (255 / full)).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


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


def natural(minimum: int):
    """An argparse type: a whole number of at least `minimum`."""

    def number(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if int(text) >= 2**48:  # torch's seeds have 64 bits, and some flags are added up or multiplied
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return int(text)

    return number


def real(below: float = math.inf):
    """An argparse type: a number of at least 0 and less than `below`."""

    def number(text: str) -> float:
        if not 0 <= float(text) < below:  # so NaN is refused too
            raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to below {below:g}")
        return float(text)

    return number


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The module's docstring as it stands, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        without = action.default is None or action.default is False
        return action.help if without else super()._get_help_string(action)


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
