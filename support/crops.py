"""The crops on disk: which are there, and of which photo each was made. Imports no torch.

    crops = list_crops(Path("data/64"))                             # {"000001": "train", ...}
    crops = remove_stale(Path("data/64"), "photos.zip", photos, crops)

data/<size>/photos.jsonl names SRC and, for each crop, its photo with the photo's bytes and time (in a zip, its CRC).
"""

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from support.files import UserError, atomic_write, cannot_write, printable
from support.sources import CROP_NOTE, SPLITS, Photo, is_image_name
from support.splits import crop_name, hashed_name

TABLE = "photos.jsonl"
Rows = dict[str, tuple[str, int, int]]  # {crop: (photo, its bytes, its time in ns or CRC)}


def list_crops(folder: Path) -> dict[str, str]:
    """{name: split} of the crops in data/<size>. Makes the folders and removes what a killed run left in them."""
    crops = {}
    for split in SPLITS:
        try:
            (folder / split).mkdir(parents=True, exist_ok=True)
            names = os.listdir(folder / split)
        except OSError as error:
            raise cannot_write(folder / split, error) from error
        for name in names:
            if name.endswith(".png") and is_image_name(name):
                crops[name.removesuffix(".png")] = split
            with suppress(OSError):  # after a minute, no other run is still writing the file
                if name.endswith(".tmp") and time.time() - (folder / split / name).stat().st_mtime > 60:
                    (folder / split / name).unlink()
    return crops


def note_crop(folder: Path, crop: int | None, has_crops: bool) -> None:
    """Note --crop in crop.txt with the first crops of a size. Raises UserError when they had another --crop."""
    note = folder / CROP_NOTE
    now = f"--crop {crop}" if crop else "no --crop"
    try:
        before = note.read_text(errors="replace") if has_crops and note.exists() else now
    except OSError as error:
        raise cannot_write(note, error) from error
    if before != now:
        raise UserError(f"the crops in {folder} were made with {printable(before)}, now it is {now}; give the "
                        f"same as before or another --dataroot, or remove {folder}")
    if not has_crops:
        with atomic_write(note) as file:
            file.write(now.encode())


def read_table(folder: Path) -> tuple[str, Rows] | None:
    """(SRC, photo of each crop) of data/<size>. None where an older version made the crops, or the table is damaged."""
    try:
        src, *rows = [json.loads(line) for line in (folder / TABLE).read_text(encoding="utf-8").splitlines()]
        return src + "", {str(name): (str(key), int(size), int(when)) for name, key, size, when in rows}
    except (OSError, ValueError, TypeError):
        return None


def owned_names(dataroot: Path, photos: Iterable[Photo]) -> dict[str, str]:
    """{key of a photo in SRC: name of its crop} of the crops that were made before, of any size."""
    keys = {photo.key for photo in photos}
    names, taken = {}, set()
    for path in sorted(dataroot.glob(f"*/{TABLE}")):
        _, rows = read_table(path.parent) or ("", {})
        for name, (key, _, _) in rows.items():
            # A damaged table must not lead out of the folder, and no two photos share a name.
            if key in keys and key not in names and name not in taken and name in (crop_name(key), hashed_name(key)):
                names[key] = name
                taken.add(name)
    return names


def remove_stale(folder: Path, src: str, photos: list[Photo], crops: dict[str, str]) -> dict[str, str]:
    """Remove the `crops` in data/<size> whose photo has changed, and write the table. Returns the other crops.

    Raises UserError where all crops are of another SRC. A copy of SRC, which holds one of the photos, is the same.
    """
    table = read_table(folder)
    now = {photo.name: (photo.key, *photo.version) for photo in photos if not photo.reason}
    if crops and not table:
        print(f"{folder} has no sound {TABLE}: its crops count as crops of {printable(src)}")
    before_src, before = table or (src, {name: now[name] for name in crops if name in now})
    if crops and before_src != src and not any(before.get(name) == row for name, row in now.items()):
        raise UserError(f"{folder} holds crops of {printable(before_src)}; choose another --dataroot for "
                        f"{printable(src)}, or remove {folder}")
    stale = {name for name, row in now.items() if name in crops and before.get(name) != row}
    try:
        for name in stale:  # before the table is written: after a kill between the two, these crops are missing
            (folder / crops[name] / f"{name}.png").unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    rows = {name: row for name, row in before.items() if name in crops} | now
    if (src, rows) != table:
        with atomic_write(folder / TABLE) as file:
            lines = [src, *([name, *row] for name, row in rows.items())]
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
    return {name: split for name, split in crops.items() if name not in stale}
