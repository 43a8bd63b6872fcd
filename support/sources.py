"""The files of a source of photos, a folder or a zip, without those that are no photos. Imports no torch.

    photos = list_photos(Path("img_align_celeba.zip"), Path("data"))
    data = read_bytes(Path("img_align_celeba.zip"), photos[0])
"""

import os
import re
import stat
import zipfile
from collections import Counter
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from support.files import UserError, printable
from support.folders import DOCS, folders_without_photos, relative_key

MAX_BYTES = 2**28
OWN_PICTURE = "drawn by FakeFaceGen"  # reason to leave out a picture of our own scripts


class Photo(NamedTuple):
    """One photo of a source, and what preprocess.py does with it."""

    key: str  # name in the source, with "/" between folders
    where: str | int  # path, index in the zip, or number of the drawn face
    reason: str = ""  # why it gives no crop, where that is known before it is opened
    split: str = ""
    name: str = ""  # of the crop, without .png
    todo: tuple[int, ...] = ()  # sizes whose crop is missing
    files: int = 1  # more than one for a folder that is left out


def list_photos(src: Path, dataroot: Path) -> list[Photo]:
    """Every file in `src`, a folder or a zip, sorted by name. Raises UserError when `src` cannot be read.

    A folder without photos is one entry with its reason: hidden folders, and what our own scripts wrote.
    """
    try:
        if src.is_dir():
            home, docs = relative_key(dataroot, src), relative_key(DOCS, src)
            skipped = f"{home}/skipped.txt".removeprefix("/")
            photos = [photo for photo in list_folder(src) if home is None or photo.key != skipped]
        else:
            home, docs, photos = None, None, list_zip(src)
    except OSError as error:
        raise UserError(f"cannot read SRC {printable(src)}: {error.strerror}; check its permissions and those of the "
                        "folders above") from None
    reasons = folders_without_photos([photo.key for photo in photos], home, docs)
    return sorted(leave_out(photos, reasons), key=lambda photo: photo.key)


def leave_out(photos: list[Photo], reasons: dict[str, str]) -> list[Photo]:
    """The same photos, with one entry for all files of each folder in `reasons`."""
    kept, counts = [], Counter()
    for photo in photos:
        parents = accumulate(photo.key.split("/")[:-1], "{}/{}".format) if reasons else ()
        folder = next((parent for parent in parents if parent in reasons), None)
        if folder is None:
            kept.append(photo)
        else:
            counts[folder] += 1
    return kept + [Photo(f"{folder}/", "", reasons[folder], files=number) for folder, number in counts.items()]


def list_folder(src: Path) -> list[Photo]:
    """Every file below `src`. Links to folders are not followed: they may loop."""
    photos = []

    def skip_unreadable(error: OSError) -> None:
        if Path(error.filename) == src:
            raise error
        photos.append(Photo(Path(error.filename).relative_to(src).as_posix(), "", f"unreadable: {error.strerror}"))

    for folder, folders, files in os.walk(src, onerror=skip_unreadable):
        prefix = "" if Path(folder) == src else Path(folder).relative_to(src).as_posix() + "/"
        links = [name for name in folders if Path(folder, name).is_symlink()]
        photos += [Photo(prefix + name, "", "link to a folder") for name in links]
        photos += [Photo(prefix + name, str(Path(folder, name))) for name in files]
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
    newest = {key: index for index, key in enumerate(keys)}
    photos = []
    for index, (key, member) in enumerate(zip(keys, members)):
        if not member.is_dir():
            replaced = "" if newest[key] == index else "replaced by a later file of this name in the zip"
            photos.append(Photo(key, index, replaced or refuse_member(key, member)))
    return photos


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


def skipped_lines(skipped: list[Photo]) -> list[str]:
    """The sorted lines of skipped.txt. The pictures of ours in a folder share a line."""
    folders = Counter(photo.key.rpartition("/")[0] for photo in skipped if photo.reason == OWN_PICTURE)
    lines = []
    for photo in skipped:
        folder = photo.key.rpartition("/")[0]
        if photo.reason == OWN_PICTURE and folder and folders[folder] > 1:
            photo = photo._replace(key=f"{folder}/", files=folders[folder])
        number = f": {photo.files:,} file{'s' * (photo.files > 1)}" if photo.key.endswith("/") else ""
        lines.append(f"{printable(photo.key)}: {printable(photo.reason)}{number}\n")
    return sorted(set(lines))


@lru_cache(maxsize=1)
def open_zip(src: Path) -> zipfile.ZipFile:
    """The zip, opened once in each process: processes that share a file handle share its position too."""
    return zipfile.ZipFile(src)


def read_file(path: Path) -> bytes:
    """The content of a file of at most MAX_BYTES. Raises any exception; its text is the reason."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):  # opening a pipe would wait for ever
        raise ValueError("not a regular file")
    if info.st_size > MAX_BYTES:
        raise ValueError(f"{info.st_size:,} bytes")
    return path.read_bytes()


def read_bytes(src: Path, photo: Photo) -> bytes:
    """The file of `photo`. Raises any exception; its text is the reason."""
    if isinstance(photo.where, str):
        return read_file(Path(photo.where))
    with open_zip(src).open(open_zip(src).infolist()[photo.where]) as file:
        return file.read(MAX_BYTES)
