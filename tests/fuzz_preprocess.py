"""Runs preprocess.py on damaged files of every kind: each file must become a correct crop or a listed skip.

    python tests/fuzz_preprocess.py --count 100000 --seed 0          # file i depends on (seed, i) alone
    python tests/fuzz_preprocess.py --count 20000 --workers 2        # through the process pool

The exit code is 1 after a crash, a dead worker, a file that takes over 5 s, a wrong crop, a file that is neither
cropped nor listed, a write outside --dataroot, or growing memory use. The files of a failing batch stay in --folder.
"""

import argparse
import contextlib
import faulthandler
import io
import resource
import shutil
import struct
import tempfile
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
from helpers import skips
from PIL import ExifTags, Image

import preprocess
from support.cli import HelpFormatter, int_at_least, run
from support.files import UserError
from support.splits import crop_name

SIZE = 32
MAX_SECONDS = 5.0
MAX_GROWTH = 300  # MiB that may stay in use after a run
MAX_PEAK = 1500  # MiB at any moment: a correct header may ask for MAX_PIXELS
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))  # XYZ of R, G, B at D50


def icc_profile(primaries):
    """An ICC profile (version 2.1) of a display with these primaries and the gamma 2.2. ICC.1:2001-04, section 6."""
    def fixed(*numbers):
        return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)

    tags = {name: b"XYZ \0\0\0\0" + fixed(*xyz) for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + fixed(0.9642, 1, 0.8249)
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(2.2 * 256), 0)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    offset, table, content = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += name + struct.pack(">II", offset + len(content), len(value))
        content += value
    header = struct.pack(">I4sI", offset + len(content), b"", 0x02100000) + b"mntrRGB XYZ " + bytes(12) + b"acsp"
    return header.ljust(68, b"\0") + fixed(0.9642, 1, 0.8249).ljust(60, b"\0") + table + content


@lru_cache
def whole_files() -> list[tuple[str, str, bytes]]:
    """(kind, suffix, bytes) of undamaged files, one for each format, mode and compression that matters."""
    y, x = np.mgrid[:60, :48]
    photo = Image.fromarray(np.stack([5 * x, 4 * y, 2 * (x + y)], -1).astype(np.uint8))
    deep = Image.fromarray((1000 * x + y).astype(np.uint16))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "camera"
    profile = {"icc_profile": icc_profile(DISPLAY_P3)}
    rgba, grey, palette = photo.convert("RGBA"), photo.convert("L"), photo.quantize(16)
    rgba.putalpha(grey)
    moving = {"save_all": True, "append_images": [photo.rotate(90 * i) for i in (1, 2)]}
    recipes = [
        ("jpeg", photo, {"exif": exif}), ("jpeg", photo, {"progressive": True}), ("jpeg", photo.convert("CMYK"), {}),
        ("jpeg", grey, {"quality": 30}), ("png", photo, {"exif": exif}), ("png", rgba, {}), ("png", deep, {}),
        ("png", palette, {"transparency": 3}), ("png", photo.convert("1"), {}), ("png", photo, moving),
        ("webp", photo, {"exif": exif}), ("webp", rgba, {"lossless": True}), ("webp", photo, moving),
        ("gif", palette, {"transparency": 2}), ("gif", photo, moving), ("bmp", photo, {}), ("bmp", palette, {}),
        ("tiff", photo, {"exif": exif}), ("tiff", deep, {}), ("tiff", Image.fromarray(np.float32(x / 48)), {}),
        ("ppm", photo, {}), ("ppm", deep.convert("I"), {}),
    ]
    recipes += [(kind, photo, profile) for kind in ("jpeg", "png", "tiff", "webp")]
    recipes += [("tiff", photo, {"compression": c}) for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")]
    files = []
    for kind, image, options in recipes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files.append((kind, "." + kind, buffer.getvalue()))
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"><circle cx="50" cy="50" r="40"/></svg>\n'
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + np.random.default_rng(0).bytes(1500)
    jpeg, png = files[0][2], files[5][2]  # with the suffix of another format: the content decides
    files += [("heic", ".heic", heic), ("heic", ".heic", jpeg), ("svg", ".svg", svg), ("svg", ".svg", png)]
    return files + [("text", ".txt", b"holiday, day %d\n" * 40), ("text", ".jpg", b"\xff\xd8 is how a JPEG begins\n")]


def flip_bits(rng: np.random.Generator, data: bytearray) -> None:
    end = len(data) if rng.random() < 0.5 else min(len(data), 200)  # one time in two, only the headers
    for at in rng.integers(0, end, rng.integers(1, 30)):
        data[at] ^= 1 << int(rng.integers(8))


def truncate(rng: np.random.Generator, data: bytearray) -> None:
    del data[int(rng.integers(0, len(data))):]


def zero_block(rng: np.random.Generator, data: bytearray) -> None:
    start = int(rng.integers(0, len(data)))
    stop = min(len(data), start + int(rng.integers(1, 400)))
    data[start:stop] = bytes(stop - start)


def splice_header(rng: np.random.Generator, data: bytearray) -> None:
    other = whole_files()[rng.integers(len(whole_files()))][2]
    cut = int(rng.integers(1, 120))
    data[: cut if rng.random() < 0.7 else 0] = other[:cut]


def write_number(rng: np.random.Generator, data: bytearray) -> None:
    """Overwrites a field in the headers (a width, a length, an offset) with an extreme number."""
    number = int(rng.choice([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 20000, 0x7FFFFFFF, 0xFFFFFFFF]))
    at, width = int(rng.integers(0, min(len(data), 300))), 4 if number > 0xFFFF else int(rng.choice([1, 2, 4]))
    data[at : at + width] = (number % 256**width).to_bytes(width, "big" if rng.random() < 0.5 else "little")


def repeat_block(rng: np.random.Generator, data: bytearray) -> None:
    start = int(rng.integers(0, len(data)))
    data[start:start] = data[start : start + int(rng.integers(1, 300))] * int(rng.integers(1, 5))


MUTATIONS = (flip_bits, truncate, zero_block, splice_header, write_number, repeat_block)


def damage(rng: np.random.Generator, data: bytearray) -> str:
    """Change `data` in one or more ways. Returns the name of the first."""
    first = MUTATIONS[rng.integers(len(MUTATIONS))]
    first(rng, data)
    while data and rng.random() < 0.3:
        MUTATIONS[rng.integers(len(MUTATIONS))](rng, data)
    return first.__name__


def damaged_file(seed: int, number: int) -> tuple[str, str, str, bytes]:
    """File `number` of `seed`: (kind, mutation, suffix, bytes)."""
    rng = np.random.default_rng((seed, number))
    kind, suffix, whole = whole_files()[rng.integers(len(whole_files()))]
    data = bytearray(whole)
    return kind, damage(rng, data), suffix, bytes(data)


def damage_table(rng: np.random.Generator, path: Path, names: list[str]) -> None:
    """A table of crops as an older run left it, with rows of other photos, damaged in one of two times."""
    rows = [f'["{Path(rng.choice(names)).stem}", "{rng.choice(names)}", {rng.integers(5000)}, 1]' for _ in range(20)]
    data = bytearray("\n".join(['"elsewhere"', *rows]).encode())
    if rng.random() < 0.5:
        damage(rng, data)
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def memory() -> float:
    """The resident memory of this process in MiB; 0 on a system without /proc."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    return 0.0


def check_batch(folder: Path, files: dict[str, tuple[str, str]], workers: int, seconds: dict[str, float]) -> Counter:
    """Preprocess the files in `folder`/src and check each; count (what, 'crop' or 'skip' or what is wrong)."""
    data, make_crops = folder / "data", preprocess.make_crops
    flags = ["--dataroot", str(data), "--sizes", str(SIZE), "--workers", str(workers)]

    def timed(args, photo):
        start = time.perf_counter()
        try:
            return make_crops(args, photo)
        finally:
            seconds[photo.key] = time.perf_counter() - start

    preprocess.make_crops = make_crops if workers > 1 else timed
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            preprocess.main([str(folder / "src"), *flags])
    finally:
        preprocess.make_crops = make_crops
    assert sorted(path.name for path in folder.iterdir()) == ["data", "src"], "a write outside --dataroot"
    assert {path.name for path in (folder / "src").iterdir()} == {*files, "good.png", "loop"}, "a write into SRC"
    assert {path.name for path in data.iterdir()} == {str(SIZE), "skipped.txt"}, "a write outside the folder of crops"
    listed = skips(data)
    assert listed.pop("loop/").startswith("link to a folder"), "a link was followed twice"
    crops = {path.stem: path for path in (data / str(SIZE)).glob("*/*")}
    counts = Counter()
    for name, what in files.items():
        crop = crops.get(crop_name(name))
        if crop is None:
            counts[what, "skip" if listed.get(name, "").strip() else f"neither: {name}"] += 1
            continue
        with Image.open(crop) as image:
            image.load()
            right = image.format == "PNG" and image.mode == "RGB" and image.size == (SIZE, SIZE) and name not in listed
        counts[what, "crop" if right else f"wrong crop: {name}"] += 1
    assert len(crops) <= len(files) + 1, "a crop too many"
    return counts


def fuzz(count: int, seed: int, folder: Path, workers: int = 0, batch: int = 1000, progress: bool = False) -> dict:
    """Run `count` damaged files. Returns {"counts", "slowest" (s, name), "growth" and "peak" (MiB), "seconds"}.

    Raises AssertionError for everything that must not happen. Exceptions of preprocess.py pass through.
    """
    counts, slowest, start, before = Counter(), (0.0, ""), time.perf_counter(), None
    for first in range(0, count, batch):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "src").mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE)).save(folder / "src" / "good.png")
        files = {}
        for number in range(first, min(first + batch, count)):
            kind, mutation, suffix, content = damaged_file(seed, number)
            name = f"{number:07d}{suffix}"
            (folder / "src" / name).write_bytes(content)
            files[name] = (kind, mutation)
        rng = np.random.default_rng((seed, first))
        (folder / "src" / "loop").symlink_to("." if rng.random() < 0.5 else "..")
        damage_table(rng, folder / "data" / str(SIZE) / "photos.jsonl", [*files])
        seconds = {}
        found = check_batch(folder, files, workers, seconds)
        slowest = max([slowest, *((taken, name) for name, taken in seconds.items())])
        counts += found
        before = before or memory()  # after the first batch, which has loaded every decoder
        wrong = [what for (_, what) in found if what not in ("crop", "skip")]
        assert not wrong, wrong
        assert slowest[0] < MAX_SECONDS, f"{slowest[1]} took {slowest[0]:.1f} s"
        if progress:
            done, rate = first + len(files), (first + len(files)) / (time.perf_counter() - start)
            print(f"{done:,} files, {rate:.0f}/s, slowest {slowest[0]:.2f} s, {memory():.0f} MiB", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    growth = memory() - before
    assert growth < MAX_GROWTH, f"memory grew by {growth:.0f} MiB"
    assert peak < MAX_PEAK or not progress, f"memory peaked at {peak:.0f} MiB"  # in a test suite, others share it
    shutil.rmtree(folder)
    taken = time.perf_counter() - start
    return {"counts": counts, "slowest": slowest, "growth": growth, "peak": peak, "seconds": taken}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--count", type=int_at_least(1), default=2000, help="files")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the files")
    parser.add_argument("--workers", type=int_at_least(0), default=0, help="processes; 0 times every file")
    parser.add_argument("--folder", type=Path, help="new folder to work in instead of a temporary one")
    args = parser.parse_args(argv)
    faulthandler.enable()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if args.folder and args.folder.exists():
        raise UserError(f"--folder {args.folder} exists; name a new one, because the folder is emptied")
    try:
        result = fuzz(args.count, args.seed, folder, args.workers, progress=True)
    except AssertionError as error:
        raise UserError(f"{error}; the files are in {folder}") from None
    print(f"\n{'kind':8}{'mutation':16}{'crops':>9}{'skips':>9}")
    for what in sorted({what for what, _ in result["counts"]}):
        print(f"{what[0]:8}{what[1]:16}{result['counts'][what, 'crop']:9,}{result['counts'][what, 'skip']:9,}")
    crops = sum(number for (_, outcome), number in result["counts"].items() if outcome == "crop")
    print(f"{args.count:,} files: {crops:,} right crops, {args.count - crops:,} listed skips, nothing else; "
          f"{args.count / result['seconds']:.0f}/s, slowest {result['slowest'][0]:.2f} s, "
          f"peak {result['peak']:.0f} MiB, growth {result['growth']:.0f} MiB")


if __name__ == "__main__":
    run(main)
