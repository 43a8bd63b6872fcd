"""Photos in folders and zips: find them, name their crops, split them, open them. Imports no torch.

    photos = assign_splits(list_photos(Path("img_align_celeba.zip"), Path("data")))
    image = open_photo(Path("img_align_celeba.zip"), photos[0])
"""

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

from support.files import UserError, printable

SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # decodes in under 5 s and 1 GiB in every format
MAX_BYTES = 2**28


class Photo(NamedTuple):
    """One photo of a source, and what preprocess.py does with it."""

    key: str  # name in the source, with "/" between folders
    where: str | int  # path, index in the zip, or number of the drawn face
    reason: str = ""  # why it gives no crop, where that is known before it is opened
    split: str = ""
    name: str = ""  # of the crop, without .png
    todo: tuple[int, ...] = ()  # sizes whose crop is missing


def list_photos(src: Path, dataroot: Path) -> list[Photo]:
    """Every file in `src`, a folder or a zip, sorted by name. Raises UserError when `src` cannot be read."""
    try:
        return sorted(list_folder(src, dataroot) if src.is_dir() else list_zip(src))
    except OSError as error:
        raise UserError(f"cannot read SRC {printable(src)}: {error.strerror}; check its permissions and those of the "
                        "folders above") from None


def list_folder(src: Path, dataroot: Path) -> list[Photo]:
    """Every file below `src` except the crops in `dataroot`. Links to folders are not followed: they may loop."""
    photos, home = [], dataroot.resolve()

    def skip_unreadable(error: OSError) -> None:
        if Path(error.filename) == src:
            raise error
        photos.append(Photo(Path(error.filename).relative_to(src).as_posix(), "", f"unreadable: {error.strerror}"))

    for folder, folders, files in os.walk(src, onerror=skip_unreadable):
        here = Path(folder)
        links = [name for name in folders if (here / name).is_symlink()]
        photos += [Photo((here / name).relative_to(src).as_posix(), "", "link to a folder") for name in links]
        if here.resolve() == home:
            folders[:] = [name for name in folders if not name.isdecimal()]
            files = [name for name in files if name != "skipped.txt"]
        photos += [Photo((here / name).relative_to(src).as_posix(), str(here / name)) for name in files]
    return photos


def list_zip(src: Path) -> list[Photo]:
    """Every file in the zip `src`. Raises UserError when there is no such zip or it is damaged."""
    try:
        with zipfile.ZipFile(src) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise UserError(f"SRC {printable(src)} does not exist; give a folder of photos or a .zip") from None
    except Exception as error:  # zipfile raises many kinds on damaged files
        raise UserError(f"SRC {printable(src)} is not a folder and not a whole zip ({printable(error)}); give a folder "
                        "of photos, or copy the zip again") from None
    keys = [member.filename.replace("\\", "/") for member in members]
    return [
        Photo(key, index, refuse_member(key, member))
        for index, (key, member) in enumerate(zip(keys, members))
        if not member.is_dir()
    ]


def refuse_member(key: str, member: zipfile.ZipInfo) -> str:
    """Why a file in a zip must not be read, or an empty string."""
    if key.startswith("/") or re.match("[A-Za-z]:", key) or ".." in key.split("/"):
        return "unsafe path: it leads out of the zip"
    if member.flag_bits & 1:
        return "encrypted"
    if member.file_size > MAX_BYTES:
        return f"too large: {member.file_size:,} bytes"
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "unusual compression"  # zipfile does not bound the memory that the others take
    return ""


def crop_name(key: str) -> str:
    """The name of photo `key`'s crop, without .png. It depends on `key` alone and suits every file system.

    Folders become part of the name (a/1.jpg -> a__1), except CelebA's own (img_align_celeba/000001.jpg -> 000001).
    A name that has to change gets a hash of `key`, so that two photos never share one.
    """
    key = key.removeprefix("img_align_celeba/")
    name = re.sub(r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|p[pgn]m)$", "", key, flags=re.IGNORECASE).replace("/", "__")
    safe = re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]|^[.\s]|[.\s]$', "_", name)
    device = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe, re.IGNORECASE)  # Windows reserves these
    if name and safe == name and not device and len(name.encode()) <= 251:  # 255 bytes with .png
        return name
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:10]
    return f"_{safe.encode()[:239].decode(errors='ignore')}-{digest}"


def hash_split(name: str) -> str:
    """train or test, 90/10, by a hash of the name. Other photos do not change it."""
    return "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 else "train"


def find_partition(src: Path) -> Path | None:
    """CelebA's list_eval_partition.txt in the folder `src`, or next to a folder or zip, if there is one."""
    places = (folder / "list_eval_partition.txt" for folder in (src, src.parent))
    return next((path for path in places if path.is_file()), None)


def read_partition(path: Path) -> dict[str, str]:
    """{photo name: split} from lines `name 0` (CelebA's) or `name,0`. Raises UserError when a line is neither."""
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"cannot read --partition {printable(path)}: {error.strerror}; give CelebA's "
                        "list_eval_partition.txt or leave the flag out") from None
    rows = [(line, re.fullmatch(r"\s*(.+?)[,\s]+([012])\s*", line)) for line in lines if line.strip()]
    for line, row in rows[1:]:  # the first may be a header
        if not row:
            raise UserError(f"the line {printable(line[:60])!r} of --partition {printable(path)} is not a name and 0, "
                            "1 or 2; give CelebA's list_eval_partition.txt")
    return {row[1]: SPLITS[int(row[2])] for _, row in rows if row}


def assign_splits(photos: list[Photo], partition: Path | None = None, must_match: bool = False) -> list[Photo]:
    """Give each photo the name of its crop, and its split or a reason to leave it out.

    The split is that of the file `partition` where this names any of the photos, and hash_split() otherwise. With
    `must_match`, raises UserError where it names none.
    """
    splits = read_partition(partition) if partition else {}
    listed = [splits.get(photo.key, splits.get(photo.key.rpartition("/")[2], "")) for photo in photos]
    if must_match and photos and not any(listed):
        raise UserError(f"--partition {printable(partition)} names none of the photos in SRC; give the list that "
                        "belongs to them or leave the flag out")
    owners, result = {}, []
    for photo, split in zip(photos, listed, strict=True):
        name = crop_name(photo.key)
        split = split if any(listed) else hash_split(name)
        same = unicodedata.normalize("NFC", name).casefold()  # some file systems take these names for one
        reason = photo.reason or ("" if split else f"not in {partition.name}")
        if not reason and owners.setdefault(same, photo.key) != photo.key:
            reason = f"same name: its crop would overwrite that of {owners[same]}"
        result.append(photo._replace(name=name, split=split, reason=reason))
    return result


@lru_cache(maxsize=1)
def open_zip(src: Path) -> zipfile.ZipFile:
    """The zip, opened once in each process: processes that share a file handle share its position too."""
    return zipfile.ZipFile(src)


def read_bytes(src: Path, photo: Photo) -> bytes:
    """The file of `photo`. Raises any exception; its text is the reason."""
    if isinstance(photo.where, int):
        with open_zip(src).open(open_zip(src).infolist()[photo.where]) as file:
            return file.read(MAX_BYTES)
    info = Path(photo.where).stat()
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"{info.st_size:,} bytes")
    return Path(photo.where).read_bytes()


def open_photo(src: Path, photo: Photo) -> Image.Image:
    """A photo of at most MAX_PIXELS, not decoded yet. Raises any exception; its text is the reason."""
    data = read_bytes(src, photo)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image ({', '.join(FORMATS)})" if data else "an empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB. Transparent pixels become white; 16-bit and float grey is scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0)
        scales = (65535,) if image.mode[0] == "I" else (1, 255, 65535)  # conventions for floats differ
        full = next((scale for scale in scales if grey.max() <= scale), grey.max())
        image = Image.fromarray((grey * (255 / full)).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
