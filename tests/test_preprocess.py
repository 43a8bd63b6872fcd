import io
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import preprocess
from demo_faces import draw_face


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
    splits = [preprocess.hash_split(f"{i:06d}") for i in range(5000)]
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
    with pytest.raises(RuntimeError), preprocess.atomic_write(tmp_path / "file") as file:
        file.write(b"half")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(SystemExit, match="cannot write"), preprocess.atomic_write(tmp_path / "no" / "file"):
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
