"""The files of a folder or a zip, without those that are no photos. Imports no torch.

    photos = list_photos(Path("img_align_celeba.zip"), Path("data"))
    data = read_bytes(Path("img_align_celeba.zip"), photos[0])
    paths = find_images(Path("data/64/train"))
"""

import os
import re
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from support.files import UserError, printable

MAX_BYTES = 2**28
OWN_PICTURE = "drawn by FakeFaceGen"  # reason to leave out a picture of our own scripts
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
RARE_SUFFIXES = (".jpe", ".apng", ".pbm")  # of the same formats, but these stay in the name of a crop
SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
CROP_NOTE = "crop.txt"  # preprocess.py writes it into data/<size>
RUN_FILES = {"log.jsonl", "generator.params", "checkpoint.pt"}  # train.py writes them next to args.json
DOCS = Path(__file__).resolve().parents[1] / "docs"  # pictures of the README
# macOS archives, thumbnails and bins of Synology and QNAP, bins of Windows, rescued fragments of Linux
SYSTEM_FOLDERS = {"__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "@recently-snapshot",
                  "$recycle.bin", "system volume information", "lost+found"}


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
        raise ValueError(f"{info.st_size:,} bytes")
    return path.read_bytes()


def read_bytes(src: Path, photo: Photo) -> bytes:
    """The file of `photo`. Raises any exception; its text is the reason."""
    if isinstance(photo.where, str):
        return read_file(Path(photo.where))
    archive = open_zip(src, os.getpid())
    with archive.open(archive.infolist()[photo.where]) as file:
        return file.read(MAX_BYTES)


def system_folder(name: str) -> str:
    """Why a folder of this name holds no photos, or an empty string."""
    if name.startswith(".") and name not in (".", ".."):
        return "hidden"
    return "in a system folder" if name.casefold() in SYSTEM_FOLDERS else ""


def is_run(names: set[str]) -> bool:
    """Whether a folder of these `names` is the --outdir of a training."""
    return "args.json" in names and bool(names & RUN_FILES)


def is_crop_folder(folder: Path) -> bool:
    """Whether preprocess.py made `folder`, which is data/<size>. Older versions wrote no crop.txt."""
    return (folder / CROP_NOTE).is_file() or all((folder / split).is_dir() for split in SPLITS)


def relative_key(folder: Path, src: Path) -> str | None:
    """The name of `folder` in the source `src`, "" for `src` itself, None for a folder outside."""
    folder, src = folder.resolve(), src.resolve()
    if not folder.is_relative_to(src):
        return None
    return "" if folder == src else folder.relative_to(src).as_posix()


def folders_without_photos(keys: Sequence[str], dataroot: str | None = None, docs: str | None = None) -> dict[str, str]:
    """{folder: why its files are no photos} for the outermost such folders of the files `keys`, named a/b/c.

    `dataroot` and `docs` are the names of these folders, if the source holds them. A folder named by a number holds
    crops if crop.txt is in it, or if it is in `dataroot` and has nothing but train, valid and test: FFHQ's 00000 holds
    photos.
    """
    names = defaultdict(set)  # folder: names of the files and folders in it
    for folder in {key.rpartition("/")[0] for key in keys}:
        for path in accumulate(folder.split("/"), "{}/{}".format):
            parent, _, name = path.rpartition("/")
            names[parent].add(name)
    for key in keys:
        folder, _, name = key.rpartition("/")
        names[folder].add(name)

    def reason(folder: str) -> str:
        parent, _, name = folder.rpartition("/")
        has_crops = CROP_NOTE in names[folder] or parent == dataroot and names[folder] <= set(SPLITS)
        if folder == docs:
            return "pictures of the README"
        if name.isdecimal() and has_crops:
            return "crops of preprocess.py"
        if is_run(names[folder]) or name == "samples" and is_run(names[parent]):
            return "output of train.py"
        return system_folder(name)

    found = {}
    for folder in sorted(filter(None, list(names))):  # a folder comes before the folders in it
        parents = accumulate(folder.split("/")[:-1], "{}/{}".format)
        if not any(parent in found for parent in parents) and (why := reason(folder)):
            found[folder] = why
    return found


def walk_files(root: Path) -> Iterator[Path]:
    """Every file below `root` except those in hidden and system folders. Raises UserError for an unreadable folder."""

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {printable(error.filename)}: {error.strerror}; check its permissions")

    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not system_folder(name)]
        yield from (Path(folder, name) for name in files)


def walk_images(root: Path) -> Iterator[Path]:
    """Every image file below `root`, by its name. Raises UserError for an unreadable folder."""
    suffixes = {*SUFFIXES, *RARE_SUFFIXES}
    return (path for path in walk_files(root) if path.suffix.lower() in suffixes and path.is_file())


def require_images(root: str | Path) -> None:
    """Raise UserError when there is no folder `root`, or no image in it."""
    if not Path(root).is_dir():
        raise UserError(f"there is no folder {printable(root)}; make the crops with `python preprocess.py PHOTOS`")
    if not any(walk_images(Path(root))):
        raise UserError(f"{printable(root)} holds no images; make the crops with `python preprocess.py PHOTOS`")


def find_images(root: str | Path) -> list[Path]:
    """Every image file below `root`, sorted, hidden folders excepted. Raises UserError when there is none."""
    require_images(root)
    return sorted(walk_images(Path(root)))
