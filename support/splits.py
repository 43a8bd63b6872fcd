"""Photos by name: what their crops are called, and which split they belong to. Imports no torch.

    photos, how = assign_splits(src, list_photos(src, dataroot))     # how: "by a hash of the names"
"""

import codecs
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from support.files import UserError, printable
from support.sources import SPLITS, SUFFIXES, Photo, read_bytes

LISTS = ("list_eval_partition.txt", "list_eval_partition.csv")  # CelebA's, and Kaggle's
HASH = "by a hash of the names"
SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
SUFFIX = re.compile(f"({'|'.join(map(re.escape, SUFFIXES))})$", re.IGNORECASE)


def crop_name(key: str) -> str:
    """The name of photo `key`'s crop, without .png. It depends on `key` alone and suits every file system.

    Folders become part of the name (a/1.jpg -> a__1), except CelebA's own (img_align_celeba/000001.jpg -> 000001).
    A name that has to change gets a hash of `key`, so that two photos never share one.
    """
    key = key.removeprefix("img_align_celeba/")
    name, safe = readable_name(key)
    device = re.match(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", safe, re.IGNORECASE)  # Windows reserves these
    if name and safe == name and not device and len(name.encode()) <= 251:  # 255 bytes with .png
        return name
    return hashed_name(key)


def readable_name(key: str) -> tuple[str, str]:
    """(`key` without folders and suffix, the same without characters that a file system refuses)."""
    name = SUFFIX.sub("", key).replace("/", "__")
    return name, re.sub(r'[\x00-\x1f\x7f<>:"\\|?*\ud800-\udfff]|^[.\s]|[.\s]$', "_", name)


def hashed_name(key: str) -> str:
    """A name that no other photo has, since a hash of `key` is part of it: a.png -> _a-3e2bcf0aa8."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:10]
    return f"_{readable_name(key)[1].encode()[:239].decode(errors='ignore')}-{digest}"


def comparable(name: str) -> str:
    """The same text for all names that some file system takes for one: they differ in case or Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def hash_split(name: str) -> str:
    """train or test, 90/10, by a hash of the name. Other photos do not change it."""
    return "test" if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0 else "train"


def find_lists(src: Path, photos: list[Photo]) -> list[Photo]:
    """The files that may be CelebA's partition of `photos`, the most likely first.

    They are in the folder or zip `src`, up to two folders deep, next to it, or a level above. CelebA keeps its list in
    a folder Eval next to the folder of the zip.
    """
    inside = [photo for photo in photos if photo.key.rpartition("/")[2] in LISTS]
    inside = [photo for photo in inside if photo.key.count("/") <= 2 and not photo.reason]
    inside.sort(key=lambda photo: (photo.key.count("/"), photo.key.rpartition("/")[0], photo.key.endswith(".csv")))
    above = Path(os.path.abspath(src)).parents[:2]  # noqa: PTH100  (next to a link, not next to its target)
    paths = [folder / name for up in above for folder in (up, up / "Eval") for name in LISTS]
    found = [photo._replace(key=str(src / photo.key)) for photo in inside]
    for path in paths:
        with suppress(OSError):  # a folder above may be closed to this user
            found += [Photo(str(path), str(path))] * path.is_file()
    return found


def read_list(src: Path, file: Photo) -> dict[str, str]:
    """{photo name: split} from lines `name 0` (CelebA's) or `name,0`. Raises UserError when a line is neither.

    The text is UTF-8 or UTF-16 with a byte-order mark, as Windows writes it, or UTF-8 without one.
    """
    shown = printable(file.key)
    try:
        data = read_bytes(src, file)
        encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        text = data.decode(encoding, errors="surrogateescape" if encoding == "utf-8-sig" else "replace")
    except Exception as error:  # zipfile raises many kinds
        raise UserError(f"cannot read {shown}: {getattr(error, 'strerror', None) or printable(error)}; give CelebA's "
                        "list_eval_partition.txt to --partition, or leave the flag out") from None
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    rows = [(line, re.fullmatch(r'\s*"?(.+?)"?[,;\s]+"?([012])"?\s*', line)) for line in lines]
    for line, row in rows[1:]:  # the first may be a header
        if not row:
            raise UserError(f"the line {printable(line[:60])!r} of {shown} is not a name and 0, 1 or 2; give CelebA's "
                            "list_eval_partition.txt to --partition")
    return {row[1]: SPLITS[int(row[2])] for _, row in rows if row}


def listed_splits(photos: list[Photo], splits: dict[str, str]) -> list[str]:
    """The split of each photo in a list, "" where the list does not name it or lines for its name contradict.

    Suffixes may differ, since photos are converted, and the photo or the list may have more folders in front.
    """
    named, ending = defaultdict(set), defaultdict(set)  # full names, and their last parts: their splits
    for name, split in splits.items():
        parts = endings(name)
        for part in parts:
            (named if part in parts[:2] else ending)[part].add(split)
    found = []
    for photo in photos:
        parts = endings(photo.key)
        candidates = [named[part] for part in parts if part in named]
        candidates += [ending[part] for part in parts[:2] if part in ending]
        found.append(next(("".join(some) for some in candidates if len(some) == 1), ""))
    return found


def endings(name: str) -> list[str]:
    """a/b.jpg -> [a/b.jpg, a/b, b.jpg, b], in one Unicode normal form."""
    folders = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    names = ["/".join(folders[start:]) for start in range(len(folders))]
    return [part for name in names for part in (name, SUFFIX.sub("", name))]


def folder_splits(photos: list[Photo]) -> list[str]:
    """The split of each photo by its folder train, valid (or val) or test, "" outside of these.

    The folders count where train has one of the others next to it, at any depth.
    """
    places, found = [], defaultdict(set)  # (folder above, split) of each photo; splits in each folder
    for photo in photos:
        folders = photo.key.lower().split("/")[:-1]
        depth = next((depth for depth, name in enumerate(folders) if name in SPLIT_FOLDERS), len(folders))
        places.append(("/".join(folders[:depth]), "".join(SPLIT_FOLDERS.get(name, "") for name in folders[depth:][:1])))
        found[places[-1][0]].add(places[-1][1])
    return [split if "train" in found[folder] and len(found[folder] - {""}) > 1 else "" for folder, split in places]


def assign_splits(
    src: Path | None, photos: list[Photo], given: Path | None = None, owned: dict[str, str] | None = None
) -> tuple[list[Photo], str]:
    """(each photo with the name of its crop, and its split or a reason to leave it out; how the splits were chosen).

    The split is that of the list `given`, or of the first list of find_lists() that names any of the photos, or of
    folder_splits(), and hash_split() otherwise. `owned` has the names of crops that were made before, by photo.
    Raises UserError where the list `given` names none.
    """
    owned = owned or {}
    lists = [Photo(f"--partition {given}", str(given))] if given else find_lists(src, photos) if src else []
    paths = {file.where for file in lists}
    photos = [photo for photo in photos if photo.where not in paths]
    for file in lists:
        splits = listed_splits(photos, read_list(src, file))
        if any(splits):
            unlisted = f"not in {Path(file.key).name}"
            return name_crops(photos, splits, unlisted, owned), f"by {printable(file.key)}"
    if given and photos:
        raise UserError(f"--partition {printable(given)} names none of the photos in SRC; give the list that belongs "
                        "to them or leave the flag out")
    note = f", since {printable(lists[0].key)} names none of the photos" if lists else ""
    splits = folder_splits(photos)
    if any(splits):
        unlisted = "not in a folder train, valid or test"
        return name_crops(photos, splits, unlisted, owned), f"by the folders train, valid and test{note}"
    return name_crops(photos, None, "", owned), f"{HASH}{note}"


def name_crops(photos: list[Photo], splits: list[str] | None, unlisted: str, owned: dict[str, str]) -> list[Photo]:
    """The photos with name and split, or with the reason `unlisted` where `splits` has none. None: hash_split().

    Of photos whose crops would have one name (a.jpg and a.png, or a.jpg and A.jpg), the first in sorted order gets it
    and the others get hashed_name(). Such photos may show the same picture, so a hash puts them into one split.
    A photo in `owned` keeps the name of its crop there.
    """
    owners = {comparable(name): name for name in owned.values()}  # comparable name: name of the first photo's crop
    result = []
    for index, photo in enumerate(photos):
        name = crop_name(photo.key)
        split = splits[index] if splits else hash_split(owners.get(comparable(name), name))
        reason = photo.reason or ("" if split else unlisted)
        if photo.key in owned:
            name = owned[photo.key]
        elif not reason and comparable(name) in owners:
            name = hashed_name(photo.key)
            reason = f"same name as the crop of another photo: {name}" if comparable(name) in owners else ""
        if not reason:
            owners[comparable(name)] = name
        result.append(photo._replace(name=name, split=split, reason=reason))
    return result
