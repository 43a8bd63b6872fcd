"""The files of a folder or a zip, and which of them are no photos. Imports no torch.

    photos = list_photos(Path("img_align_celeba.zip"))
    data = read_bytes(Path("img_align_celeba.zip"), photos[0])
    paths = find_images(Path("data/64/train"))
"""

import os
import stat
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from support.files import UserError, kind_by_first_bytes, printable

MAX_BYTES = 2**28
UTF8_FLAG = 0x800  # of a file name in a zip. APPNOTE.TXT, section 4.4.4
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
RARE_SUFFIXES = (".jpe", ".apng", ".pbm")  # of the same formats, but these stay in the name of a crop
SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
CROP_NOTE = "crop.txt"  # preprocess.py writes it into data/<size>
SKIPPED = "skipped.txt"  # and this into data
# macOS archives, thumbnails and bins of Synology and QNAP, bins of Windows, rescued fragments of Linux
SYSTEM_FOLDERS = {"__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "@recently-snapshot",
                  "$recycle.bin", "system volume information", "lost+found"}
# What people give as SRC besides a folder or zip: its first bytes, and what to do.
OTHER_SOURCES = {
    "a .tar, .gz, .7z or .rar archive": (rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|.{257}ustar", "unpack it and give "
                                         "the folder"),
    "an HTML page": (rb"(\xef\xbb\xbf)?\s*<(!doctype|html|!--)", "download the zip itself, not the page about it"),
    "one image": (rb"\x89PNG|\xff\xd8\xff|GIF8|BM|RIFF|II\*\0|MM\0\*", "give the folder that holds it"),
}


class Photo(NamedTuple):
    """One photo of a source, and what preprocess.py does with it."""

    key: str  # name in the source, with "/" between folders, and at the end of a folder that is left out
    where: str | int  # path, index in the zip, or number of the drawn face
    reason: str = ""  # why it gives no crop, where that is known before it is opened
    version: tuple[int, int] = (0, 0)  # bytes, and the time of its last change in ns, or its CRC in the zip
    split: str = ""
    name: str = ""  # of the crop, without .png
    todo: tuple[int, ...] = ()  # sizes whose crop is missing


def list_photos(src: Path) -> list[Photo]:
    """Every file in `src`, a folder or a zip, sorted by name. Raises UserError when `src` cannot be read.

    A hidden or system folder, and data/<size> of preprocess.py, is one entry with its reason.
    """
    try:
        photos = list_folder(src) if src.is_dir() else list_zip(src)
    except OSError as error:
        raise UserError(f"cannot read SRC {printable(src)}: {error.strerror}; check its permissions and those of the "
                        "folders above") from None
    return sorted(photos, key=lambda photo: photo.key)


def list_folder(src: Path) -> list[Photo]:
    """Every file below `src`. Raises OSError when `src` itself cannot be read."""
    photos = []
    for key, path, reason in walk(src, lambda folder: system_folder(folder.name) or crop_folder(folder)):
        if key.rpartition("/")[2] != SKIPPED:
            photos.append(Photo(key, path, reason) if reason else describe_file(key, path))
    return photos


def describe_file(key: str, path: str) -> Photo:
    """The photo in a file, with the reason why it cannot be one."""
    try:
        info = Path(path).stat()
    except OSError as error:
        return Photo(key, path, f"unreadable: {error.strerror}")
    return Photo(key, path, too_large(key, info.st_size), (info.st_size, info.st_mtime_ns))


def too_large(key: str, size: int) -> str:
    """Why a file of `size` bytes is not opened, or an empty string. Films and archives next to photos are large."""
    if size <= MAX_BYTES:
        return ""
    return f"too large: {size:,} bytes" if is_image_name(key) else f"not an image: {size:,} bytes"


def walk(root: Path, refuse: Callable[[Path], str]) -> Iterator[tuple[str, str, str]]:
    """(name below `root`, path, "") of each file, and (name/, path, reason) of each folder that is not entered.

    The reason is that of refuse(folder), or that of the system. Links to folders are followed after all other folders,
    and no folder is entered twice, so that links may loop. Raises OSError when `root` cannot be read.
    """
    folders = deque([("", str(root))])
    links, seen = deque(), set()
    above = {str(parent) for parent in Path(os.path.realpath(root)).parents}
    while folders or links:
        prefix, folder = (folders or links).popleft()
        place = os.path.realpath(folder)
        if place in seen or place in above:
            yield prefix, folder, "link to a folder that is read already" if place in seen else "link to a folder above"
            continue
        seen.add(place)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise
            yield prefix, folder, f"unreadable: {error.strerror}"
            continue
        for entry in entries:
            key = prefix + entry.name
            if not entry.is_dir():
                yield key, entry.path, ""
            elif reason := refuse(Path(entry.path)):
                yield f"{key}/", entry.path, reason
            else:
                (links if entry.is_symlink() else folders).append((f"{key}/", entry.path))


def system_folder(name: str) -> str:
    """Why a folder of this name holds no photos, or an empty string."""
    if name.startswith(".") and name not in (".", ".."):
        return "hidden folder"
    return "system folder" if name.casefold() in SYSTEM_FOLDERS else ""


def crop_folder(folder: Path) -> str:
    """Why data/<size> holds no photos, or an empty string for any other folder."""
    return "crops of preprocess.py" if folder.name.isdecimal() and is_crop_folder(folder) else ""


def is_crop_folder(folder: Path) -> bool:
    """Whether preprocess.py made `folder`, which is data/<size>. Older versions wrote no crop.txt."""
    return (folder / CROP_NOTE).is_file() or all((folder / split).is_dir() for split in SPLITS)


def list_zip(src: Path) -> list[Photo]:
    """Every file in the zip `src`. Raises UserError when there is no such zip or it is damaged."""
    try:
        with zipfile.ZipFile(src) as archive:
            members = archive.infolist()
    except FileNotFoundError:
        raise UserError(f"SRC {printable(src)} does not exist; give a folder of photos or a .zip") from None
    except Exception as error:  # zipfile raises many kinds on damaged files
        what, remedy = kind_by_first_bytes(src, OTHER_SOURCES)
        what = what or f"not a whole zip ({printable(error)})"
        remedy = remedy or "give a folder of photos, or copy the zip again"
        raise UserError(f"SRC {printable(src)} is {what}; {remedy}") from None
    keys = [member_name(member) for member in members]
    crop_folders = {key.rpartition("/")[0] for key in keys if key.endswith(f"/{CROP_NOTE}")}
    photos = {}  # of files of one name, the last one counts
    for index, (key, member) in enumerate(zip(keys, members)):
        folder, reason = left_out_folder(key, crop_folders)
        if reason:
            photos[folder] = Photo(folder, "", reason)
        elif not member.is_dir():
            photos[key] = Photo(key, index, too_large(key, member.file_size), (member.file_size, member.CRC))
    return list(photos.values())


def left_out_folder(key: str, crop_folders: set[str]) -> tuple[str, str]:
    """(folder/, why it is left out) for the uppermost such folder of a file in a zip; empty where there is none."""
    for folder in accumulate(key.split("/")[:-1], "{}/{}".format):
        name = folder.rpartition("/")[2]
        is_crops = name.isdecimal() and folder in crop_folders
        if reason := system_folder(name) or is_crops * "crops of preprocess.py":
            return f"{folder}/", reason
    return "", ""


def member_name(member: zipfile.ZipInfo) -> str:
    """The name of a file in a zip. macOS writes UTF-8 without the flag that says so."""
    name = member.filename
    if not member.flag_bits & UTF8_FLAG:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")


@lru_cache(maxsize=1)
def open_zip(src: Path, process_id: int) -> zipfile.ZipFile:
    """The zip, opened once in the process `process_id`. A worker must not read through the handle of its parent.

    A forked worker inherits the parent's handle and shares its position, so that each would read the other's bytes.
    """
    return zipfile.ZipFile(src)


def read_file(path: Path) -> bytes:
    """The content of a file of at most MAX_BYTES. Raises any exception; its text is the reason."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"too large: {info.st_size:,} bytes")
    return path.read_bytes()


def read_bytes(src: Path, photo: Photo) -> bytes:
    """The file of `photo`. Raises any exception; its text is the reason."""
    if isinstance(photo.where, str):
        return read_file(Path(photo.where))
    archive = open_zip(src, os.getpid())
    with archive.open(archive.infolist()[photo.where]) as file:
        return file.read(MAX_BYTES)


def is_image_name(name: str) -> bool:
    """Whether a file of this name should be an image.

    "._a.jpg" is none: macOS keeps the attributes of a.jpg in it on disks that have no place for them, such as exFAT.
    """
    return name.lower().endswith((*SUFFIXES, *RARE_SUFFIXES)) and not Path(name).name.startswith("._")


def walk_images(root: Path) -> Iterator[Path]:
    """Every image file below `root`, by its name, hidden and system folders excepted. Raises UserError."""
    try:
        for _, path, reason in walk(root, lambda folder: system_folder(folder.name)):
            if reason.startswith("unreadable"):
                raise UserError(f"cannot read the folder {printable(path)} ({reason}); check its permissions")
            if not reason and is_image_name(path) and Path(path).is_file():
                yield Path(path)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(root)}: {error.strerror}; check its permissions") from None


def find_images(root: str | Path) -> list[Path]:
    """Every image file below `root`, sorted. Raises UserError when there is none."""
    if not Path(root).is_dir():
        raise UserError(f"there is no folder {printable(root)}; make the crops with `python preprocess.py PHOTOS`")
    paths = sorted(walk_images(Path(root)))
    if not paths:
        raise UserError(f"{printable(root)} holds no images; make the crops with `python preprocess.py PHOTOS`")
    return paths
