"""Naming and opening photos: support/splits.py and support/photos.py, through preprocess.py."""

import io
import os
import struct
import traceback
import zipfile
import zlib
from collections import Counter

import pytest
from fuzz_preprocess import fuzz
from helpers import crop_of, gradient, jpeg, named, skips
from PIL import Image

import preprocess
from support.files import UserError
from support.splits import crop_name, hash_split, hashed_name

NOBODY = 65534  # the user ID without rights

# A PNG file begins with an 8-byte signature. Then comes the IHDR chunk: length (4 bytes), type (4), width (4),
# height (4), five bytes from bit depth to interlace method, CRC (4). PNG specification, sections 5.2 and 11.2.2.
PNG_BEFORE_IHDR_TYPE = slice(0, 12)
PNG_DEPTH_TO_INTERLACE = slice(24, 29)
PNG_AFTER_IHDR = slice(33, None)


def png_that_claims(width, height):
    """A PNG file of 8x8 pixels whose IHDR chunk claims another size, with the correct CRC."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    png = buffer.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + png[PNG_DEPTH_TO_INTERLACE]
    return png[PNG_BEFORE_IHDR_TYPE] + header + struct.pack(">I", zlib.crc32(header)) + png[PNG_AFTER_IHDR]


def bmp_that_claims(width, height):
    """The headers of a 24-bit BMP file of this size, without pixels."""
    file_size = reserved = compression = image_size = resolution = colors = 0
    info_header_size, planes, bits_per_pixel = 40, 1, 24
    pixel_offset = 14 + info_header_size
    file_header = struct.pack("<2sIII", b"BM", file_size, reserved, pixel_offset)
    info_header = struct.pack("<IiiHH", info_header_size, width, height, planes, bits_per_pixel)
    return file_header + info_header + struct.pack("<6I", compression, image_size, *[resolution] * 2, *[colors] * 2)


# ---------------------------------------------------------------------------------------------- opening


def test_bad_files_are_listed_and_do_not_stop_the_run(tmp_path, convert):
    src = tmp_path / "src"
    gradient().save(src / "good.jpg")
    (src / "empty.jpg").touch()
    (src / "text.png").write_text("not a picture")
    (src / "half.jpg").write_bytes((src / "good.jpg").read_bytes()[:400])
    (src / "link.jpg").symlink_to("nowhere")
    (src / "loop").symlink_to(src)
    os.mkfifo(src / "pipe.jpg")
    (src / "new\nline.jpg").write_text("x")
    (src / "bomb.bmp").write_bytes(bmp_that_claims(20000, 20000))
    out = convert()
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(
        ["empty.jpg", "text.png", "half.jpg", "link.jpg", "loop/", "pipe.jpg", "new\\nline.jpg", "bomb.bmp"]
    )
    assert [path.name for path in (out / "64").rglob("*.png")] == ["good.png"]


def test_the_content_decides_the_format_and_not_the_suffix(tmp_path, convert):
    for name in ("a.png", "b.heic", "c.txt", "no_suffix"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    assert named(convert()) == ["a", "b.heic", "c.txt", "no_suffix"]


@pytest.mark.parametrize("name, brand", [("a.HEIC", b"heic"), ("a.jpg", b"mif1"), ("a.avif", b"avif")])
def test_photos_of_an_iphone_count_as_unreadable_photos(tmp_path, convert, capsys, name, brand):
    """They are no notes or films that lie next to photos, and half of a Mac user's photos may be such files."""
    (tmp_path / "src" / "good.jpg").write_bytes(jpeg())
    (tmp_path / "src" / name).write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(99))
    (tmp_path / "src" / "a.MOV").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(99))
    out = convert()
    assert skips(out)[name] == "unreadable: HEIC or AVIF; export it as JPEG"
    assert skips(out)["a.MOV"].startswith("not an image")
    assert "warning: 50% of the photos cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("size, reason", [
    ((1, 1), "smaller than 64"), ((1, 20000), "smaller than 64"), ((20000, 20000), "pixels"), ((7072, 7072), "pixels"),
])
def test_the_size_in_the_header_is_checked_before_decoding(tmp_path, convert, size, reason):
    (tmp_path / "src" / "good.jpg").write_bytes(jpeg())
    (tmp_path / "src" / "odd.png").write_bytes(png_that_claims(*size))
    out = convert()
    assert named(out) == ["good"] and reason in skips(out)["odd.png"]


def test_unreadable_permissions(tmp_path):
    """A child process preprocesses as a user other than root, because root may read everything."""
    (tmp_path / "src" / "closed").mkdir(parents=True)
    for name in ("good.jpg", "closed.jpg", "closed/in.jpg"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    (tmp_path / "src" / "closed.jpg").chmod(0)
    (tmp_path / "src" / "closed").chmod(0)
    (tmp_path / "out").mkdir(mode=0o777)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no exec: the other user may have no access to this Python
        os.dup2(write, 2)
        try:
            if os.geteuid() == 0:
                os.chdir(tmp_path)  # then relative paths only: the folders above belong to root
                tmp_path.chmod(0o755)
                (tmp_path / "out").chmod(0o777)
                os.setuid(NOBODY)
            preprocess.main(["src", "--dataroot", "out", "--sizes", "64", "--workers", "0"])
            for closed in ("src/closed", "src/closed/deeper"):
                with pytest.raises(UserError, match="cannot read SRC"):
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
    assert skips(tmp_path / "out") == dict.fromkeys(("closed.jpg", "closed/"), "unreadable: Permission denied")


def test_two_thousand_damaged_files(tmp_path):
    """The short form of tests/fuzz_preprocess.py."""
    result = fuzz(2000, seed=1, folder=tmp_path / "fuzz")
    outcomes = Counter()
    for (_, outcome), number in result["counts"].items():
        outcomes[outcome] += number
    assert set(outcomes) == {"crop", "skip"} and outcomes.total() == 2000
    assert min(outcomes.values()) > 200  # both outcomes are frequent


# ---------------------------------------------------------------------------------------------- naming


def test_odd_names(tmp_path, convert):
    """Names of 255 bytes, with newlines, with broken UTF-8 or reserved by Windows give one crop or skip line each."""
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
    out = convert()
    assert [crop_of(out, name)[0, 0, 0] for name in ("a__1", "b__1", "1")] == [10, 200, 90]


def test_photos_whose_crops_would_share_a_name_all_give_a_crop(tmp_path):
    """The first in sorted order keeps the name, the others get a hash in it, and all are in one split.

    A zip can hold names that differ in case or Unicode normal form alone, on every file system.
    """
    groups = [("a.bmp", "a.jpg", "a.png"), ("B.png", "b.png"), ("e\u0301.png", "\xe9.png"), ("single.jpg",)]
    groups += [(f"{i}.bmp", f"{i}.png") for i in range(20)]
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for group in groups:
            for level, name in enumerate(group):
                archive.writestr(name, jpeg(Image.new("RGB", (80, 80), (10 * level,) * 3)))
    out = tmp_path / "out"
    for _ in range(2):  # the second run changes nothing
        preprocess.main([str(tmp_path / "photos.zip"), "--dataroot", str(out), "--sizes", "64", "--workers", "0"])
        assert len(named(out)) == sum(map(len, groups)) and skips(out) == {}
    for group in groups:
        names = [crop_name(group[0]), *map(hashed_name, group[1:])]
        assert [crop_of(out, name)[0, 0, 0] // 10 for name in names] == list(range(len(names)))
        splits = {path.parent.name for name in names for path in out.rglob(f"{name}.png")}
        assert splits == {hash_split(names[0])}
    assert {"a", "B", "single"} <= set(named(out))


@pytest.mark.parametrize("key, name", [
    ("a.jpg", "a"), ("a.JFIF", "a"), ("a.tif", "a"), ("a.PnM", "a"), ("a.jpe", "a.jpe"), ("a.pbm", "a.pbm"),
    ("a.heic", "a.heic"), ("x/y.webp", "x__y"), ("img_align_celeba/con.jpg", "_con-1f02e9b886"),
    ("img_align_celeba/img_align_celeba/000001.jpg", "img_align_celeba__000001"),
])
def test_names_of_crops_stay_what_they_are(key, name):
    """With other names, a second run would make each crop twice, perhaps in another split."""
    assert crop_name(key) == name
