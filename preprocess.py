"""Photos (a folder, a zip or drawn faces) -> square RGB crops, data/<size>/{train,valid,test}/<name>.png.

    python preprocess.py img_align_celeba.zip --partition list_eval_partition.txt    # CelebA; the zip stays zipped
    python preprocess.py my_photos --sizes 64 128 --crop 400                         # any folder and its subfolders
    python preprocess.py --demo 4000 --sizes 64                                      # drawn faces, without any data
    python preprocess.py --download                                                  # CelebA, fetched by torchvision

Each photo is decoded once, turned upright (EXIF) and converted to sRGB (ICC profile). Transparent pixels become white,
and only the first frame of an animation counts. The centred square is resized with antialiasing. A second run makes
only the crops that are missing and those of changed photos. Crops of another --crop or SRC need another --dataroot.
data/skipped.txt lists what gave no crop, with the reason, and crops whose photo is gone. Of photos whose crops would
share a name (a.jpg, a.png), the first in sorted order gives a.png and the others get a hash in their name. The split
is CelebA's list_eval_partition.txt (or .csv) where it is given or found, then that of folders train, valid and test.
Otherwise a hash of each name decides, 90 to 10; new photos never move an old one.
"""

if __name__ == "__main__":  # before the imports below, which take seconds and need packages
    from support.cli import prepare
    prepare(packages=("pillow", "numpy", "tqdm"))

import argparse
import errno
import os
import shlex
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.cli import HelpFormatter, int_at_least, run, user_path
from support.crops import list_crops, note_crop, owned_names, remove_stale
from support.demo_faces import draw_face
from support.files import UserError, atomic_write, printable
from support.images import encode_png
from support.photos import UnknownFormat, crop_square, explain, open_photo
from support.sources import SKIPPED, SPLITS, Photo, is_image_name, list_photos, open_zip
from support.splits import assign_splits
from support.workers import count_cores, map_in_processes

MAX_UNREADABLE = 0.01  # of the photos of a source; more are no accident, and the last line warns of them


class Result(NamedTuple):
    """What became of one photo: why a size has no crop ("" where written), and why the photo gives none at all."""

    photo: Photo
    sizes: dict[int, str]
    reason: str


def find_photos(args: argparse.Namespace) -> tuple[list[Photo], str]:
    """(photos of SRC or faces to draw, with split and name or a reason to leave them out; how they were split)."""
    faces = [Photo(f"demo_{args.seed}_{number:06d}", number) for number in range(args.demo or 0)]
    photos = faces or list_photos(args.src)
    photos, how = assign_splits(args.src, photos, args.partition, owned_names(args.dataroot, photos))
    if not photos:
        raise UserError(f"SRC {printable(args.src)} holds no files; give a folder of photos or a .zip")
    return photos, how


def find_missing(args: argparse.Namespace, photos: list[Photo], how: str) -> tuple[list[Photo], list[Photo]]:
    """(the same photos, each with the sizes whose crop is missing; the crops that belong to none of them).

    Removes crops whose photo has changed. Raises UserError where a photo changes its split.
    """
    src = "--demo" if args.demo else os.path.abspath(args.src)  # noqa: PTH100  (a link stays a link)
    names = {photo.name for photo in photos if not photo.reason}
    crops, orphans = {}, []
    for size in args.sizes:
        folder = args.dataroot / str(size)
        crops[size] = list_crops(folder)
        note_crop(folder, args.crop, has_crops=bool(crops[size]))
        for photo in photos:
            old = crops[size].get(photo.name, photo.split)
            if old != photo.split and not photo.reason:
                raise UserError(f"{printable(photo.name)}.png is in {folder / old} already and would now be in "
                                f"{photo.split}, {how}; give the same --partition as before, or remove {folder}")
        crops[size] = remove_stale(folder, src, photos, crops[size])
        orphans += [Photo(f"{folder / split / name}.png", "", "its photo is not in SRC or its list any more")
                    for name, split in crops[size].items() if name not in names and not args.demo]
    photos = [p._replace(todo=tuple(size for size in args.sizes if p.name not in crops[size])) for p in photos]
    return photos, orphans


def read_square(args: argparse.Namespace, photo: Photo) -> tuple[Image.Image | None, dict[int, str], str]:
    """(square of a photo, {size: why it gives no crop}, why it gives no crop of any size). Raises any exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata
        image = draw_face(args.seed, photo.where) if args.demo else open_photo(args.src, photo)
        side = args.crop or min(image.size)
        if side > min(image.size):
            too_small = dict.fromkeys(args.sizes, "smaller than --crop")
        else:
            upscaled = [size for size in args.sizes if side < size and not args.allow_upscale]
            too_small = {size: f"smaller than {size}" for size in upscaled}
        sizes = {size: too_small.get(size, "") for size in photo.todo}
        reason = too_small[args.sizes[0]] if len(too_small) == len(args.sizes) else ""
        return (None if all(sizes.values()) else crop_square(image, side)), sizes, reason


def make_crops(args: argparse.Namespace, photo: Photo) -> Result:
    """Write the missing crops of one photo. Raises UserError when nothing more can be written (a full disk)."""
    try:
        square, sizes, reason = read_square(args, photo)
    except Exception as error:  # decoders raise any kind
        why = explain(error)
        if isinstance(error, UnknownFormat) and not is_image_name(photo.key):
            return Result(photo, {}, f"not an image: {why.removeprefix('not an image: ')}")
        return Result(photo, {}, f"unreadable: {why}")
    for size in (size for size, why in sizes.items() if not why):
        # Bicubic with a support scaled by the reduction: less ringing than Lanczos, in 0.6 of the time.
        crop = square.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None)
        try:
            with atomic_write(args.dataroot / str(size) / photo.split / f"{photo.name}.png") as file:
                file.write(encode_png(np.asarray(crop)))
        except UserError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return Result(photo, {}, "name too long")
    return Result(photo, sizes, reason)


def write_skipped(args: argparse.Namespace, photos: list[Photo], results: list[Result], orphans: list[Photo]) -> None:
    """List the photos that gave no crop in skipped.txt. Raises UserError when that is all of them."""
    skipped = [photo for photo in photos if photo.reason]
    skipped += [result.photo._replace(reason=result.reason) for result in results if result.reason]
    path = args.dataroot / SKIPPED
    lines = sorted(f"{printable(photo.key)}: {printable(photo.reason)}\n" for photo in skipped + orphans)
    with atomic_write(path) as file:
        file.write("".join(lines).encode())
    if len(skipped) == len(photos):
        raise UserError(f"{printable(args.src or '--demo')} gave no crop: {path} says why, file by file; give a folder "
                        "of photos, or a zip of them")


def summary(
    args: argparse.Namespace, photos: list[Photo], results: list[Result], orphans: list[Photo], seconds: float
) -> str:
    """The last line: written, there already and skipped for each size, then photos without a crop, then warnings."""
    parts = []
    for size in args.sizes:
        written = Counter(result.photo.split for result in results if result.sizes.get(size) == "")
        small = Counter(result.sizes[size] for result in results if result.sizes.get(size))
        there = sum(not photo.reason and size not in photo.todo for photo in photos)
        splits = ", ".join(f"{written[split]:,} {split}" for split in SPLITS if written[split])
        skipped = "".join(f", {count:,} skipped: {reason}" for reason, count in small.items())
        splits = f" ({splits})" if splits else ""
        parts.append(f"{size}: {written.total():,} written{splits}, {there:,} there already{skipped}")
    reasons = [result.reason for result in results if not result.sizes] + [photo.reason for photo in photos]
    kinds = Counter(reason.partition(":")[0] for reason in reasons if reason)
    path = args.dataroot / SKIPPED
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        parts.append(f"{counts} (listed in {path})")
    parts.append(f"{len(results) / max(seconds, 1e-9):,.0f} img/s")
    share = kinds["unreadable"] / max(len(photos) - kinds["not an image"], 1)
    if share > MAX_UNREADABLE:
        parts.append(f"warning: {share:.0%} of the photos cannot be read")
    if orphans:
        parts.append(f"warning: {len(orphans):,} crops are of photos that are not in SRC or its list any more; remove "
                     f"them, or trainings use them (listed in {path})")
    return "; ".join(parts)


def download(dataroot: Path) -> Path:
    """CelebA's zip in `dataroot`/celeba, fetched by torchvision unless it is there. Raises UserError."""
    src = dataroot / "celeba" / "img_align_celeba.zip"
    if not (src.is_file() and (src.parent / "list_eval_partition.txt").is_file()):
        try:
            from torchvision.datasets import CelebA

            CelebA(str(dataroot), split="all", download=True)
        except Exception as error:  # Google Drive's quota, no gdown, no network
            command = shlex.join(["python", "preprocess.py", str(src), "--dataroot", str(dataroot)])
            raise UserError(
                f"CelebA could not be downloaded ({printable(error)[:200]}); put img_align_celeba.zip and "
                "list_eval_partition.txt from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html into "
                f"{src.parent} by hand and run: {command}") from None
    return src


def draw_demo(dataroot: Path, size: int, number: int = 2000) -> None:
    """Draw the faces 0 to `number` - 1 whose crops of this size are missing. Crops of photos stay without faces."""
    crops = {path.stem for path in (dataroot / str(size)).glob("*/*.png")}
    missing = {f"demo_0_{index:06d}" for index in range(number)} - crops
    if len(missing) == number and crops or not missing:
        return
    main(["--demo", str(number), "--dataroot", str(dataroot), "--sizes", str(size), "--allow-upscale"])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("source (give one)").add_argument
    add("src", nargs="?", type=user_path, metavar="SRC", help="folder of photos, with its subfolders, or a .zip")
    add("--demo", type=int_at_least(1), metavar="N", help="draw N faces instead of reading SRC")
    add("--seed", type=int_at_least(0), default=0, help="random seed of the faces that --demo draws")
    add("--download", action="store_true", help="fetch CelebA instead of reading SRC")
    add = parser.add_argument_group("crops").add_argument
    add("--dataroot", type=user_path, default=Path("data"), help="folder for the crops")
    add("--sizes", type=int_at_least(1), nargs="+", default=[64, 128], help="sides of the crops in pixels")
    add("--crop", type=int_at_least(1), help="side of the square in source pixels (default: the photo's short side)")
    add("--allow-upscale", action="store_true", help="also make crops that are larger than their square in the photo")
    add("--partition", type=user_path, help="list_eval_partition.txt or .csv (default: the one in or near SRC, if any)")
    add = parser.add_argument_group("hardware").add_argument
    add("--workers", type=int_at_least(0), help="worker processes; 0 starts none (default: one for each CPU core)")
    args = parser.parse_args(argv)
    args.workers = count_cores() if args.workers is None else args.workers
    args.sizes = sorted(set(args.sizes))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if (args.src is not None) + bool(args.demo) + args.download != 1:
        raise UserError("give one of SRC (a folder of photos or a .zip), --demo N or --download")
    if args.download:
        args.src = download(args.dataroot)
    photos, how = find_photos(args)
    photos, orphans = find_missing(args, photos, how)
    start = time.perf_counter()
    try:
        todo = [photo for photo in photos if photo.todo and not photo.reason]
        results = map_in_processes(partial(make_crops, args), todo, args.workers, "preprocess")
    except KeyboardInterrupt:
        print("stopped: run the same command again to go on", file=sys.stderr)
        raise
    finally:
        open_zip.cache_clear()
    write_skipped(args, photos, results, orphans)
    counts = Counter(p.split for p in photos if not p.reason) - Counter(r.photo.split for r in results if r.reason)
    print(f"split {how}:", ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split]))
    print(summary(args, photos, results, orphans, time.perf_counter() - start))


if __name__ == "__main__":
    run(main)
