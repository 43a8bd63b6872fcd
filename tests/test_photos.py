"""Finding, naming, splitting and opening photos: support/photos.py, through preprocess.py."""

import io
import os
import struct
import traceback
import zlib
from collections import Counter

import pytest
from fuzz_preprocess import fuzz
from helpers import crop_of, gradient, jpeg, named, skips
from PIL import Image

import preprocess
from support.files import UserError
from support.splits import hash_split

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
        ["empty.jpg", "text.png", "half.jpg", "link.jpg", "loop", "pipe.jpg", "new\\nline.jpg", "bomb.bmp"]
    )
    assert [path.name for path in (out / "64").rglob("*.png")] == ["good.png"]


def test_the_content_decides_the_format_and_not_the_suffix(tmp_path, convert):
    for name in ("a.png", "b.heic", "c.txt", "no_suffix"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    assert named(convert()) == ["a", "b.heic", "c.txt", "no_suffix"]


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
    assert skips(tmp_path / "out") == dict.fromkeys(("closed.jpg", "closed"), "unreadable: Permission denied")


def test_two_thousand_damaged_files(tmp_path):
    """The short form of tests/fuzz_preprocess.py."""
    result = fuzz(2000, seed=1, folder=tmp_path / "fuzz")
    outcomes = Counter()
    for (_, outcome), number in result["counts"].items():
        outcomes[outcome] += number
    assert set(outcomes) == {"crop", "skip"} and outcomes.total() == 2000
    assert min(outcomes.values()) > 200  # both outcomes are frequent


# ---------------------------------------------------------------------------------------------- finding and naming


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
    Image.new("RGB", (80, 80)).save(src / "a" / "1.bmp")
    out = convert()
    assert [crop_of(out, name)[0, 0, 0] for name in ("a__1", "b__1", "1")] == [0, 200, 90]
    assert skips(out) == {"a/1.png": "same name: its crop would overwrite that of a/1.bmp"}


def test_crops_inside_src_are_not_photos(tmp_path, convert, capsys):
    for _ in range(2):
        Image.new("RGB", (80, 80)).save(tmp_path / "src" / "a.png")
        preprocess.main([str(tmp_path / "src"), "--dataroot", str(tmp_path / "src"), "--sizes", "64", "128"])
    assert "64: 0 written, 1 there already" in capsys.readouterr().out
    assert named(tmp_path / "src") == ["a"]


# ---------------------------------------------------------------------------------------------- splitting


def test_the_hash_puts_a_tenth_into_the_test_split():
    splits = [hash_split(f"{i:06d}") for i in range(5000)]
    assert 0.08 < splits.count("test") / 5000 < 0.12
    assert set(splits) == {"train", "test"}


def test_new_photos_do_not_change_the_split_of_old_ones(tmp_path, convert):
    for first, last in ((0, 40), (40, 80)):
        for i in range(first, last):
            (tmp_path / "src" / f"{i}.jpg").write_bytes(jpeg())
        out = convert()
        splits = {path.stem: path.parent.name for path in out.rglob("*.png")}
        assert len(splits) == last and set(splits.values()) == {"train", "test"}
        assert splits == {str(i): hash_split(str(i)) for i in range(last)}


def test_partition_in_the_parent_folder_of_src(tmp_path, convert):
    for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg"):
        gradient().save(tmp_path / "src" / name)
    (tmp_path / "list_eval_partition.txt").write_text("1.jpg 0\n2.jpg 1\n3.jpg 2\n")
    out = convert()
    found = {path.stem: path.parent.name for path in out.rglob("*.png")}
    assert found == {"1": "train", "2": "valid", "3": "test"}
    assert "4.jpg: not in list_eval_partition.txt" in (out / "skipped.txt").read_text()


def test_partition_with_commas_a_header_and_folders(tmp_path, convert):
    """The list is inside SRC, and preprocess.py does not take it for a photo."""
    (tmp_path / "src" / "a").mkdir()
    for name in ("1.jpg", "a/1.jpg"):
        (tmp_path / "src" / name).write_bytes(jpeg())
    (tmp_path / "src" / "list_eval_partition.txt").write_text("image_id,partition\n1.jpg,1\na/1.jpg,2\n")
    out = convert()
    assert {path.stem: path.parent.name for path in out.rglob("*.png")} == {"1": "valid", "a__1": "test"}
    assert skips(out) == {}


def test_a_different_partition_does_not_put_a_photo_into_both_splits(tmp_path, convert):
    (tmp_path / "src" / "a.jpg").write_bytes(jpeg())
    for number in (0, 2):
        (tmp_path / f"{number}.txt").write_text(f"a.jpg {number}\n")
    convert("--partition", str(tmp_path / "0.txt"))
    with pytest.raises(UserError, match="same --partition"):
        convert("--partition", str(tmp_path / "2.txt"))
