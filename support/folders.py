"""Folders: the images in them, and those that hold no photos (hidden ones, output of our scripts). Imports no torch.

    reasons = folders_without_photos(["a/1.jpg", ".git/config"])      # {".git": "hidden"}
    paths = find_images(Path("data/64/train"))
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from support.files import UserError, printable

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm")
RARE_SUFFIXES = (".jpe", ".apng", ".pbm")  # of the same formats, but these stay in the name of a crop
SPLITS = ("train", "valid", "test")  # 0, 1, 2 in CelebA's list_eval_partition.txt
CROP_NOTE = "crop.txt"  # preprocess.py writes it into data/<size>
RUN_FILES = {"log.jsonl", "generator.params", "checkpoint.pt"}  # train.py writes them next to args.json
DOCS = Path(__file__).resolve().parents[1] / "docs"  # pictures of the README
# macOS archives, thumbnails and bins of Synology and QNAP, bins of Windows, rescued fragments of Linux
SYSTEM_FOLDERS = {"__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "@recently-snapshot",
                  "$recycle.bin", "system volume information", "lost+found"}


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
