
import io
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from fuzz_preprocess import fuzz
from PIL import Image

import preprocess
from support.demo_faces import draw_face
from support.files import atomic_write
from support.photos import MAX_BYTES, SPLITS, hash_split


def gradient(width=100, height=140):
    """A photo whose every pixel tells where it was: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], -1).astype(np.uint8))


def crop_of(folder, name, size=64):
    path = next((folder / str(size)).rglob(f"{name}.png"))
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (size, size)
        return np.asarray(image).astype(int)


@pytest.fixture
def convert(tmp_path):
    """Preprocesses the photos of tmp_path/src at 64 and returns the dataroot."""

    def run(*flags):
        preprocess.main([str(tmp_path / "src"), "--dataroot", str(tmp_path / "out"), "--sizes", "64", "--workers", "0"]
                        + list(flags))
        return tmp_path / "out"

    (tmp_path / "src").mkdir()
    return run


def test_centred_square_and_resize(tmp_path, convert):
    gradient(128, 168).save(tmp_path / "src" / "a.png")
    pixels = crop_of(convert(), "a")
    # 128x168: rows 20 to 147 are the centred square, and two of its pixels make one.
    assert abs(pixels[32, :, 0] - (2 * np.arange(64) + 0.5)).max() <= 1
    assert abs(pixels[:, 32, 1] - (20 + 2 * np.arange(64) + 0.5)).max() <= 1


def test_another_crop_is_refused_where_there_are_crops(tmp_path, convert):
    gradient().save(tmp_path / "src" / "a.png")
    with pytest.raises(SystemExit, match="gave no crop"):
        convert("--crop", "200")  # more than the photo has: with no crop yet, another is free to follow
    (tmp_path / "out" / "64" / "train" / ".0123456789.tmp").touch()  # nor is what a killed run left one
    before = crop_of(convert("--crop", "64"), "a")
    gradient(128, 128).save(tmp_path / "src" / "b.png")
    for flags, told in (((), "no --crop"), (("--crop", "70"), "--crop 70")):
        with pytest.raises(SystemExit, match=f"64 were made with --crop 64, now it is {told}; give the same"):
            convert(*flags)
    assert not list((tmp_path / "out").rglob("b.png"))
    convert("--sizes", "32")  # of another size there are none yet
    assert (crop_of(convert("--crop", "64"), "a") == before).all() and crop_of(tmp_path / "out", "b").any()
    (tmp_path / "out" / "64" / "crop.txt").unlink()  # as where they were made before it was kept
    convert()


def test_crop_flag(tmp_path, convert):
    gradient(128, 168).save(tmp_path / "src" / "a.png")
    pixels = crop_of(convert("--crop", "64"), "a")
    assert (pixels[0, 0, :2] == (32, 52)).all() and (pixels[-1, -1, :2] == (95, 115)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, convert, orientation):
    """The photo as a camera held in this way would have stored it comes out upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that turns upright into stored
    stored = gradient(100, 140)
    stored = stored.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "src" / "a.png", exif=exif)
    gradient(100, 140).save(tmp_path / "src" / "upright.png")
    out = convert()
    assert abs(crop_of(out, "a") - crop_of(out, "upright")).max() <= 1


def test_colour_modes(tmp_path, convert):
    src = tmp_path / "src"
    Image.new("L", (80, 80), 77).save(src / "grey.png")
    Image.fromarray(np.full((80, 80), 30000, np.uint16)).save(src / "deep.png")
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(src / "clear.png")
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(src / "cmyk.tif")
    palette = Image.new("P", (80, 80), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(src / "palette.png")
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("#0a0b0c", "white")]
    frames[0].save(src / "moving.gif", save_all=True, append_images=frames[1:])
    out = convert()
    expected = {"grey": (77,) * 3, "deep": (117,) * 3, "clear": (255,) * 3, "cmyk": (255, 0, 0)}
    expected |= {"palette": (10, 20, 30), "moving": (10, 11, 12)}
    for name, colour in expected.items():
        assert abs(crop_of(out, name) - np.array(colour)).max() <= 1, name


def test_bad_files_are_listed_and_do_not_stop_it(tmp_path, convert):
    src = tmp_path / "src"
    gradient().save(src / "good.jpg")
    (src / "empty.jpg").touch()
    (src / "text.png").write_text("not a picture")
    (src / "half.jpg").write_bytes((src / "good.jpg").read_bytes()[:400])
    (src / "link.jpg").symlink_to("nowhere")
    (src / "loop").symlink_to(src)
    os.mkfifo(src / "pipe.jpg")
    (src / "new\nline.jpg").write_text("x")
    bomb = bytearray(b"BM" + bytes(52))
    bomb[10], bomb[14], bomb[26], bomb[28] = 54, 40, 1, 24
    bomb[18:26] = (20000).to_bytes(4, "little") * 2
    (src / "bomb.bmp").write_bytes(bomb)
    out = convert()
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(
        ["empty.jpg", "text.png", "half.jpg", "link.jpg", "loop", "pipe.jpg", "new\\nline.jpg", "bomb.bmp"]
    )
    assert [path.name for path in (out / "64").rglob("*.png")] == ["good.png"]


def test_zip_is_read_in_place_and_dangerous_members_are_not(tmp_path):
    buffer = io.BytesIO()
    gradient().save(buffer, "JPEG")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for name in ("img_align_celeba/000001.jpg", "../outside.jpg", "/absolute.jpg", "b/c.jpg"):
            archive.writestr(name, buffer.getvalue())
    out = tmp_path / "deep" / "out"
    preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(out), "--sizes", "64"])
    assert sorted(path.stem for path in out.rglob("*.png")) == ["000001", "b__c"]
    assert (out / "skipped.txt").read_text().count("leads out") == 2
    assert not list(tmp_path.rglob("outside*"))


def test_partition(tmp_path, convert):
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        gradient().save(tmp_path / "src" / name)
    (tmp_path / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 1\n3.jpg 2\n")  # found beside SRC
    out = convert()
    found = {path.stem: path.parent.name for path in out.rglob("*.png")}
    assert found == {"1": "train", "2": "valid", "3": "test"}
    assert "4.jpg: not in list_eval_partition.txt" in (out / "skipped.txt").read_text()


def test_split_by_name_is_near_a_tenth():
    splits = [hash_split(f"{i:06d}") for i in range(5000)]
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert set(splits) == {"train", "test"}


def test_small_photos_are_counted_or_kept(tmp_path, convert, capsys):
    gradient(89, 109).save(tmp_path / "src" / "small.jpg")
    out = convert("--sizes", "64", "128")
    assert "1 skipped: smaller than 128" in capsys.readouterr().out
    assert (out / "skipped.txt").read_text() == ""
    convert("--sizes", "128", "--allow-upscale")
    assert crop_of(out, "small", 128).shape == (128, 128, 3)


def test_second_run_does_only_what_is_missing(tmp_path, convert, capsys):
    for i in range(3):
        gradient().save(tmp_path / "src" / f"{i}.jpg")
    out = convert()
    kept, gone, _ = sorted(out.rglob("*.png"))
    before = kept.stat().st_mtime_ns
    gone.unlink()
    capsys.readouterr()
    convert()
    assert "1 written" in (last := capsys.readouterr().out) and "2 there already" in last
    assert kept.stat().st_mtime_ns == before and gone.exists()


def test_kill_leaves_whole_files_only(tmp_path):
    command = [sys.executable, ROOT / "preprocess.py", "--demo", "5000", "--dataroot", tmp_path, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(tmp_path.rglob("*.png"))) < 20:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


def test_drawn_faces_are_a_function_of_seed_and_number():
    assert draw_face(0, 3).tobytes() == draw_face(0, 3).tobytes()
    assert len({draw_face(seed, i).tobytes() for seed in (0, 1) for i in range(3)}) == 6


def test_atomic_write_leaves_nothing_half_written(tmp_path):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(SystemExit, match="cannot write"), atomic_write(tmp_path / "no" / "file"):
        pass


@pytest.mark.parametrize("flags, words", [
    ((), ["SRC", "--demo"]),
    (("nowhere",), ["nowhere", "does not exist"]),
    (("empty",), ["empty", "no files"]),
    (("text.zip",), ["text.zip", "not a whole zip"]),
    (("texts",), ["no crop"]),
])
def test_bad_input(tmp_path, run_script, refused, flags, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    refused(run_script("preprocess.py", *flags), *words)


def named(folder, size=64):
    return sorted(path.stem for path in (folder / str(size)).rglob("*.png"))


def skips(folder):
    return dict(line.split(": ", 1) for line in (folder / "skipped.txt").read_text(encoding="utf-8").splitlines())


def jpeg(image=None):
    buffer = io.BytesIO()
    (image or gradient()).save(buffer, "JPEG")
    return buffer.getvalue()


def test_grey_by_its_full_scale_and_transparency_over_white(tmp_path, convert):
    src = tmp_path / "src"
    deep = np.full((80, 80), 65535 * 3 // 4, np.uint16)
    Image.fromarray(deep).save(src / "deep.tif")
    (src / "deep_big.pgm").write_bytes(b"P5 80 80 65535\n" + deep.byteswap().tobytes())
    Image.fromarray(np.full((80, 80), 0.75, np.float32)).save(src / "float.tif")
    Image.fromarray(np.full((80, 80), 191, np.float32)).save(src / "float_255.tif")
    Image.new("1", (80, 80), 1).save(src / "bit.png")
    Image.new("LA", (80, 80), (0, 128)).save(src / "grey_half.png")
    Image.new("RGB", (80, 80), (9, 9, 9)).save(src / "key.png", transparency=(9, 9, 9))
    palette = Image.new("P", (80, 80), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(src / "clear_palette.png", transparency=1)
    palette.save(src / "clear_palette.gif", transparency=1)
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(src / "cmyk.jpg")  # written inverted, as Adobe does
    (src / "clear_palette.gif").rename(src / "clear.gif")
    out = convert()
    expected = dict.fromkeys(("deep", "deep_big", "float", "float_255"), (191,) * 3)
    expected |= dict.fromkeys(("bit", "key", "clear_palette", "clear"), (255,) * 3)
    expected |= {"grey_half": (127,) * 3, "cmyk": (255, 0, 0)}
    for name, colour in expected.items():
        assert abs(crop_of(out, name) - np.array(colour)).max() <= 2, name


def test_what_a_file_is_shows_in_its_bytes(tmp_path, convert):
    for name in ("a.png", "b.heic", "c.txt", "no_suffix"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    assert named(convert()) == ["a", "b.heic", "c.txt", "no_suffix"]


@pytest.mark.parametrize("size, reason", [
    ((1, 1), "smaller than 64"), ((1, 20000), "smaller than 64"), ((20000, 20000), "pixels"), ((7072, 7072), "pixels"),
])
def test_extreme_sizes(tmp_path, convert, size, reason):
    """A header alone: the size is judged before anything is decoded."""
    (tmp_path / "src" / "good.jpg").write_bytes(jpeg())
    whole = io.BytesIO()
    Image.new("1", (8, 8)).save(whole, "PNG")
    head = b"IHDR" + size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big") + whole.getvalue()[24:29]
    png = whole.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + whole.getvalue()[33:]
    (tmp_path / "src" / "odd.png").write_bytes(png)
    out = convert()
    assert named(out) == ["good"] and reason in skips(out)["odd.png"]


def test_odd_names(tmp_path, convert):
    """Names of 255 bytes, with newlines, broken UTF-8 or Windows' own: a crop each, one line each in skipped.txt."""
    names = ["n" * 251 + ".jpg", "ü" * 125 + ".jpg", "a\nb.jpg", "con.jpg", "日本.jpg", "x.", ".hidden.jpg"]
    names += ['a<>:"|?*.jpg', "line\u2028end.jpg", "d" * 250, os.fsdecode(b"\xff.jpg")]
    for name in names:
        (tmp_path / "src" / name).write_bytes(jpeg())
        (tmp_path / "src" / ("~" + name[:200])).write_text("text")
    out = convert()
    found = [path.name for path in (out / "64").rglob("*.png")]
    assert len(set(found)) == len(names)
    assert all(len(name.encode()) <= 255 and not set(name) & set('\n\\/:*?"<>|') for name in found)
    assert not {"con.png", ".hidden.png"} & set(found) and {"日本.png", "n" * 251 + ".png"} <= set(found)
    assert len(skips(out)) == len(names)


def test_the_same_name_in_two_folders(tmp_path, convert):
    src = tmp_path / "src"
    for folder, level in (("a", 10), ("b", 200), ("img_align_celeba", 90)):
        (src / folder).mkdir()
        Image.new("RGB", (80, 80), (level,) * 3).save(src / folder / "1.png")
    Image.new("RGB", (80, 80)).save(src / "a" / "1.bmp")
    out = convert()
    assert [crop_of(out, name)[0, 0, 0] for name in ("a__1", "b__1", "1")] == [0, 200, 90]
    assert skips(out) == {"a/1.png": "same name: its crop would overwrite that of a/1.bmp"}


def test_unreadable_permissions(tmp_path):
    """As another user than root, who may read everything."""
    (tmp_path / "src" / "closed").mkdir(parents=True)
    for name in ("good.jpg", "closed.jpg", "closed/in.jpg"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    (tmp_path / "src" / "closed.jpg").chmod(0)
    (tmp_path / "src" / "closed").chmod(0)
    (tmp_path / "out").mkdir(mode=0o777)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no exec: another user may not reach this Python
        os.dup2(write, 2)
        try:
            if os.geteuid() == 0:
                os.chdir(tmp_path)  # from there on by relative paths: the folders above are root's
                tmp_path.chmod(0o755)
                (tmp_path / "out").chmod(0o777)
                os.setuid(65534)
            preprocess.main(["src", "--dataroot", "out", "--sizes", "64", "--workers", "0"])
            for closed in ("src/closed", "src/closed/deeper"):
                with pytest.raises(SystemExit, match="cannot read SRC"):
                    preprocess.main([closed, "--dataroot", "out"])
            os._exit(0)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(write)
    errors = os.fdopen(read).read()
    assert os.waitpid(child, 0)[1] == 0, errors
    (tmp_path / "src" / "closed").chmod(0o700)
    assert named(tmp_path / "out") == ["good"]
    assert skips(tmp_path / "out") == dict.fromkeys(("closed.jpg", "closed"), "unreadable: Permission denied")


def test_own_crops_inside_src_are_not_photos(tmp_path, convert, capsys):
    for _ in range(2):
        Image.new("RGB", (80, 80)).save(tmp_path / "src" / "a.png")
        preprocess.main([str(tmp_path / "src"), "--dataroot", str(tmp_path / "src"), "--sizes", "64", "128"])
    assert "64: 0 written, 1 there already" in capsys.readouterr().out
    assert named(tmp_path / "src") == ["a"]


def test_dangerous_zips(tmp_path, capsys):
    """Encrypted, too large, packed by bzip2 (whose reader knows no bound), a wrong size, a wrong checksum."""
    path, out = tmp_path / "photos.zip", tmp_path / "out"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.jpg", bytes(MAX_BYTES + 1))
        archive.writestr("C:\\windows.jpg", jpeg())
        archive.writestr("b\\good.jpg", jpeg())
        archive.writestr("bz.jpg", bytes(10**6), compress_type=zipfile.ZIP_BZIP2)
        for name in ("secret.jpg", "short.jpg", "torn.jpg"):
            archive.writestr(name, jpeg(), compress_type=zipfile.ZIP_STORED)
    data, size = bytearray(path.read_bytes()), len(jpeg()).to_bytes(4, "little")
    data[data.index(b"torn.jpg") + 100] ^= 0xFF
    directory = data.index(b"PK\x01\x02")
    entry = data.index(b"secret.jpg", directory) - 46
    data[entry + 8] |= 1
    entry = data.index(b"short.jpg", directory) - 46
    assert data[entry + 24 : entry + 28] == size
    data[entry + 24 : entry + 28] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    preprocess.main([str(path), "--dataroot", str(out), "--sizes", "64"])
    reasons = skips(out)
    assert named(out) == ["b__good"]
    assert set(reasons) == {"bomb.jpg", "C:/windows.jpg", "bz.jpg", "secret.jpg", "short.jpg", "torn.jpg"}
    assert reasons["secret.jpg"] == "encrypted" and reasons["bomb.jpg"].startswith("too large")
    assert reasons["bz.jpg"] == "unusual compression" and "CRC" in reasons["torn.jpg"]
    assert "1 encrypted" in capsys.readouterr().out


def test_truncated_zip(tmp_path, run_script, refused):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    path.write_bytes(path.read_bytes()[:-30])
    refused(run_script("preprocess.py", path), "photos.zip", "copy the zip again")


def test_split_stays_when_photos_are_added(tmp_path, convert):
    for first, last in ((0, 40), (40, 80)):
        for i in range(first, last):
            (tmp_path / "src" / f"{i}.jpg").write_bytes(jpeg())
        out = convert()
        splits = {path.stem: path.parent.name for path in out.rglob("*.png")}
        assert len(splits) == last and set(splits.values()) == {"train", "test"}
        assert splits == {str(i): hash_split(str(i)) for i in range(last)}


def test_partition_with_commas_a_header_and_folders(tmp_path, convert):
    (tmp_path / "src" / "a").mkdir()
    for name in ("1.jpg", "a/1.jpg"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    (tmp_path / "src" / "list_eval_partition.txt").write_text("image_id,partition\n1.jpg,1\na/1.jpg,2\n")
    out = convert()  # found inside SRC, and not taken for a photo
    assert {path.stem: path.parent.name for path in out.rglob("*.png")} == {"1": "valid", "a__1": "test"}
    assert skips(out) == {}


@pytest.mark.parametrize("text, words", [
    (None, ["cannot read --partition"]),
    ("a.jpg 0\nb.jpg three\n", ["b.jpg three", "0, 1 or 2"]),
    ("other.jpg 0\n", ["names none of the photos"]),
    ("a.jpg 3\n", ["names none of the photos"]),
])
def test_bad_partitions(tmp_path, run_script, refused, text, words):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    refused(run_script("preprocess.py", "src", "--partition", "list.txt"), "list.txt", *words)
    assert not list(tmp_path.rglob("*.png"))


def test_another_partition_does_not_put_a_photo_into_both_splits(tmp_path, convert):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    for number in (0, 2):
        (tmp_path / f"{number}.txt").write_text(f"a.jpg {number}\n")
    convert("--partition", str(tmp_path / "0.txt"))
    with pytest.raises(SystemExit, match="same --partition"):
        convert("--partition", str(tmp_path / "2.txt"))


def test_processes_write_the_same_bytes_as_one(tmp_path):
    for workers in ("0", "2"):
        preprocess.main(["--demo", "40", "--dataroot", str(tmp_path / workers), "--workers", workers])
    paths = sorted((tmp_path / "0").rglob("*.png"))
    assert len(paths) == 80
    assert all(path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "0")).read_bytes() for path in paths)


def test_works_where_processes_are_spawned(tmp_path):
    """As on Windows and macOS."""
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import preprocess\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    preprocess.main(['--demo', '40', '--dataroot', 'out', '--sizes', '64', '--workers', '2'])\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "40 written" in done.stdout, done.stderr


def test_works_without_shared_memory(tmp_path):
    """As in many containers: semaphores cannot be made."""
    inside = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, "sh", sys.executable, ROOT / "preprocess.py"]
    command += ["--demo", "40", "--sizes", "64", "--workers", "2", "--dataroot", "out"]
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"]).returncode:
        pytest.skip("needs the right to unshare")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "40 written" in done.stdout, done.stderr


@pytest.fixture
def running(tmp_path):
    """A run of two worker processes that has begun to write; and the worker processes' numbers."""
    command = [sys.executable, ROOT / "preprocess.py", "--demo", "5000", "--dataroot", tmp_path / "out"]
    command += ["--workers", "2"]
    # A suite in a shell's background has SIGINT ignored, and hands that on: a user's terminal does not.
    listening = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, preexec_fn=listening)
    while len(list(tmp_path.rglob("*.png"))) < 20:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc")
    yield process, [int(number) for number in children.read_text().split()]
    process.kill()
    process.communicate()


def alive(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_workers_end_with_their_parent(tmp_path, running, number, code):
    process, workers = running
    process.send_signal(number)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == code and "Traceback" not in errors
    assert number == signal.SIGKILL or "run the same command again" in errors
    end = time.time() + 10
    while any(map(alive, workers)) and time.time() < end:
        time.sleep(0.05)
    assert len(workers) == 2 and not any(map(alive, workers))
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


def test_killed_worker_is_one_clear_error(running):
    process, workers = running
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "worker process was killed" in errors and "--workers" in errors


def test_leftovers_of_a_killed_run_are_cleared(tmp_path, convert):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    out = convert()
    old, fresh = out / "64" / "train" / ".1.tmp", out / "64" / "train" / ".2.tmp"
    for path in (old, fresh):
        path.touch()
    os.utime(old, (0, 0))
    convert()
    assert not old.exists() and fresh.exists()  # the fresh one may be another run's


@pytest.mark.parametrize("workers", [0, 2])
def test_full_disk(small_disk, run_script, refused, workers):
    (small_disk / "filler").write_bytes(bytes(3_900_000))
    done = run_script("preprocess.py", "--demo", 200, "--dataroot", small_disk, "--sizes", 64, "--workers", workers)
    refused(done, "cannot write", "No space left", "free some space")
    assert not list(small_disk.rglob("*.tmp"))
    for path in small_disk.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


def test_read_only_disk(small_disk, run_script, refused):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    refused(run_script("preprocess.py", "--demo", 2, "--dataroot", small_disk), "cannot write", "Read-only")


def test_atomic_write_of_a_name_of_255_bytes_and_what_torch_makes_of_a_full_disk(tmp_path, small_disk):
    with atomic_write(tmp_path / ("n" * 255), durable=True) as file:
        file.write(b"whole")
    assert (tmp_path / ("n" * 255)).read_bytes() == b"whole"
    with pytest.raises(SystemExit, match="name too long"), atomic_write(tmp_path / ("n" * 256)):
        pass
    (small_disk / "params").write_bytes(b"before")
    with (
        pytest.raises(SystemExit, match="No space left"),
        atomic_write(small_disk / "params", durable=True) as file,
    ):
        torch.save(torch.zeros(2 * 10**6), file)
    assert [(path.name, path.read_bytes()) for path in small_disk.iterdir()] == [("params", b"before")]


def test_failed_download_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("torchvision").datasets
    monkeypatch.setattr(datasets, "CelebA", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("quota\nexceeded")))
    with pytest.raises(SystemExit) as stop:
        preprocess.main(["--download", "--dataroot", str(tmp_path)])
    for words in ("img_align_celeba.zip", "list_eval_partition.txt", str(tmp_path / "celeba"), "python preprocess.py"):
        assert words in str(stop.value)
    assert "\n" not in str(stop.value)
    (tmp_path / "celeba").mkdir()  # by hand then; the same command goes on
    with zipfile.ZipFile(tmp_path / "celeba" / "img_align_celeba.zip", "w") as archive:
        archive.writestr("img_align_celeba/000001.jpg", jpeg())
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000001.jpg 2\n")
    preprocess.main(["--download", "--dataroot", str(tmp_path), "--sizes", "64"])
    assert "1 written (1 test)" in capsys.readouterr().out


def test_import_is_cheap():
    command = "import sys, preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("flags", [
    ("--demo", "0"), ("--demo", "2", "--sizes", "0"), ("--demo", "2", "--workers", "-1"),
    ("--demo", "2", "--crop", "x"), ("--demo", "2", "--crop", "179"), ("--demo", "2", "--dataroot", "file"),
    ("--demo", "2", "--download"), ("src", "--demo", "2"), ("file",),
])
def test_bad_flags(tmp_path, run_script, refused, flags):
    (tmp_path / "file").write_text("text")
    refused(run_script("preprocess.py", *flags))


def test_paths_with_spaces_and_unicode_from_another_folder(tmp_path, run_script):
    (tmp_path / "my photos é").mkdir()
    (tmp_path / "my photos é" / "a b.jpg").write_bytes(jpeg())
    done = run_script("preprocess.py", "my photos é", "--dataroot", "out ü", "--sizes", "64")
    assert done.returncode == 0 and named(tmp_path / "out ü") == ["a b"], done.stderr


def test_two_thousand_damaged_files(tmp_path):
    result = fuzz(2000, seed=1, folder=tmp_path / "fuzz")
    outcomes = Counter()
    for (_, outcome), number in result["counts"].items():
        outcomes[outcome] += number
    assert set(outcomes) == {"crop", "skip"} and outcomes.total() == 2000
    assert min(outcomes.values()) > 200  # both ways are tried


def test_the_real_photos(tmp_path):
    """A part of the shared zip, made again; everything is what the whole of it gave."""
    shared = ROOT.parent / "shared" / "data"
    if not (shared / "img_align_celeba_16k.zip").is_file():
        pytest.skip("the shared photos are not here")
    with (
        zipfile.ZipFile(shared / "img_align_celeba_16k.zip") as whole,
        zipfile.ZipFile(tmp_path / "part.zip", "w") as part,
    ):
        for name in whole.namelist()[:200]:
            part.writestr(name, whole.read(name))
    partition = str(shared / "list_eval_partition.txt")
    preprocess.main([str(tmp_path / "part.zip"), "--partition", partition, "--dataroot", str(tmp_path / "out")])
    assert len(named(tmp_path / "out")) == 200 and 0 < len(named(tmp_path / "out", 128)) < 200
    assert skips(tmp_path / "out") == {}
    rows = dict(line.split() for line in Path(partition).read_text().splitlines())
    for path in (tmp_path / "out").rglob("*.png"):
        assert path.parent.name == SPLITS[int(rows[path.stem + ".jpg"])]
