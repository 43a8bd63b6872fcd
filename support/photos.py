"""Photos in folders and zips: finding, naming, splitting and opening them."""

import argparse
import hashlib
import io
import os
import re
import stat
import unicodedata
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from support.demo_faces import draw_face
from support.files import printable

SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
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
