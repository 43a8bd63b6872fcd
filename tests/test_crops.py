"""The crops of preprocess.py: the square, the resize, orientation, colour modes and sizes."""

import struct

import numpy as np
import pytest
from fuzz_preprocess import DISPLAY_P3, icc_profile
from helpers import ROOT, crop_of, gradient, run_python
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from support.files import UserError
from support.photos import read_rgb


def test_centered_square_and_resize(tmp_path, convert):
    gradient(128, 168).save(tmp_path / "src" / "a.png")
    pixels = crop_of(convert(), "a")
    # In 128x168, rows 20 to 147 are the centered square. Two source pixels become one.
    assert abs(pixels[32, :, 0] - (2 * np.arange(64) + 0.5)).max() <= 1
    assert abs(pixels[:, 32, 1] - (20 + 2 * np.arange(64) + 0.5)).max() <= 1


def test_crop_flag(tmp_path, convert):
    gradient(128, 168).save(tmp_path / "src" / "a.png")
    pixels = crop_of(convert("--crop", "64"), "a")
    assert (pixels[0, 0, :2] == (32, 52)).all() and (pixels[-1, -1, :2] == (95, 115)).all()


def test_a_different_crop_flag_is_refused_when_crops_exist(tmp_path, convert):
    gradient().save(tmp_path / "src" / "a.png")
    with pytest.raises(UserError, match="gave no crop"):
        convert("--crop", "200")  # larger than the photo: no crop exists yet, so a different --crop may follow
    (tmp_path / "out" / "64" / "train" / ".0123456789.tmp").touch()  # a half-written file does not count as a crop
    before = crop_of(convert("--crop", "64"), "a")
    gradient(128, 128).save(tmp_path / "src" / "b.png")
    for flags, now in (((), "no --crop"), (("--crop", "70"), "--crop 70")):
        with pytest.raises(UserError, match=f"64 were made with --crop 64, now it is {now}; give the same"):
            convert(*flags)
    assert not list((tmp_path / "out").rglob("b.png"))
    convert("--sizes", "32")  # no crops of this size exist yet
    assert (crop_of(convert("--crop", "64"), "a") == before).all() and crop_of(tmp_path / "out", "b").any()
    (tmp_path / "out" / "64" / "crop.txt").unlink()  # older versions wrote no crop.txt
    convert()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, convert, orientation):
    """The test stores a photo as a camera in this orientation does; the crop is upright."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation: Image.Transpose from upright to stored
    stored = gradient(100, 140)
    stored = stored.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else stored
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored.save(tmp_path / "src" / "a.png", exif=exif)
    gradient(100, 140).save(tmp_path / "src" / "upright.png")
    out = convert()
    assert abs(crop_of(out, "a") - crop_of(out, "upright")).max() <= 1


def test_color_modes(tmp_path, convert):
    src = tmp_path / "src"
    Image.new("L", (80, 80), 77).save(src / "grey.png")
    Image.fromarray(np.full((80, 80), 30000, np.uint16)).save(src / "deep.png")
    Image.new("RGBA", (80, 80), (255, 0, 0, 0)).save(src / "clear.png")
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(src / "cmyk.tif")
    palette = Image.new("P", (80, 80), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(src / "palette.png")
    frames = [Image.new("RGB", (80, 80), color) for color in ("#0a0b0c", "white")]
    frames[0].save(src / "moving.gif", save_all=True, append_images=frames[1:])
    out = convert()
    expected = {"grey": (77,) * 3, "deep": (117,) * 3, "clear": (255,) * 3, "cmyk": (255, 0, 0)}
    expected |= {"palette": (10, 20, 30), "moving": (10, 11, 12)}
    for name, color in expected.items():
        assert abs(crop_of(out, name) - np.array(color)).max() <= 1, name


def test_deep_grey_uses_the_full_scale_and_transparency_becomes_white(tmp_path, convert):
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
    palette.save(src / "clear.gif", transparency=1)
    Image.new("CMYK", (80, 80), (0, 255, 255, 0)).save(src / "cmyk.jpg")  # stored inverted, the convention of Adobe
    out = convert()
    expected = dict.fromkeys(("deep", "deep_big", "float", "float_255"), (191,) * 3)
    expected |= dict.fromkeys(("bit", "key", "clear_palette", "clear"), (255,) * 3)
    expected |= {"grey_half": (127,) * 3, "cmyk": (255, 0, 0)}
    for name, color in expected.items():
        assert abs(crop_of(out, name) - np.array(color)).max() <= 2, name


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_colour_profiles_become_srgb(tmp_path, convert, suffix):
    """Photos of phones are Display P3: the sRGB colour (224, 120, 100) is (210, 125, 105) in them."""
    options = {"quality": 100} | ({"lossless": True} if suffix == "webp" else {})
    stored = Image.new("RGB", (80, 80), (210, 125, 105))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profiles = {"p3": icc_profile(DISPLAY_P3), "srgb": srgb, "broken": b"x" * 300, "none": None}
    for name, profile in profiles.items():
        stored.save(tmp_path / "src" / f"{name}.{suffix}", icc_profile=profile, **options)
    out = convert()
    assert abs(crop_of(out, "p3")[5, 5] - (224, 120, 100)).max() <= 3
    for name in ("srgb", "broken"):
        assert (crop_of(out, name) == crop_of(out, "none")).all()
    assert (read_rgb(tmp_path / "src" / f"p3.{suffix}").getpixel((5, 5)) == crop_of(out, "p3")[5, 5]).all()


def test_colour_profiles_of_other_modes(tmp_path, convert):
    """Transparency stays transparency. A profile of another colour space than the pixels is left alone."""
    p3, src = icc_profile(DISPLAY_P3), tmp_path / "src"
    Image.new("RGBA", (80, 80), (210, 125, 105, 255)).save(src / "opaque.png", icc_profile=p3)
    Image.new("RGBA", (80, 80), (210, 125, 105, 0)).save(src / "clear.png", icc_profile=p3)
    Image.new("RGB", (80, 80), (210, 125, 105)).quantize(2).save(src / "palette.png", icc_profile=p3)
    Image.new("L", (80, 80), 77).save(src / "grey.png", icc_profile=p3)
    out = convert()
    expected = {"opaque": (224, 120, 100), "clear": (255,) * 3, "palette": (224, 120, 100), "grey": (77,) * 3}
    for name, colour in expected.items():
        assert abs(crop_of(out, name)[5, 5] - np.array(colour)).max() <= 3, name


def test_photos_without_a_profile_do_not_load_the_colour_management(tmp_path):
    (tmp_path / "src").mkdir()
    gradient().save(tmp_path / "src" / "a.png")
    code = "import sys, preprocess; preprocess.main(['src', '--sizes', '64']); sys.exit('PIL.ImageCms' in sys.modules)"
    assert run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).returncode == 0


def twelve_bit_tiff(level, side=80):
    """A grey TIFF of 12 bits a pixel, two pixels in three bytes. TIFF 6.0, sections 2 and 4."""
    pixels = (level << 12 | level).to_bytes(3, "big") * (side * side // 2)
    rows = [(256, side), (257, side), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, side)]
    rows.append((279, len(pixels)))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in rows)
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(rows)) + entries + bytes(4)


def bmp_with_alpha(alpha, side=80):
    """A BMP of 32 bits a pixel whose masks (BITMAPV4HEADER) give the fourth byte to the alpha channel."""
    masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, side, side, 1, 32, 3, 4 * side**2, 0, 0, 0, 0) + masks
    pixels = bytes((30, 20, 10, alpha)) * side**2
    return struct.pack("<2sIHHI", b"BM", 122 + len(pixels), 0, 0, 122) + header.ljust(108, b"\0") + pixels


def test_pixels_that_other_programs_show_otherwise_than_pillow(tmp_path, convert):
    src = tmp_path / "src"
    (src / "twelve.tif").write_bytes(twelve_bit_tiff(3071))
    (src / "padded.bmp").write_bytes(bmp_with_alpha(0))
    (src / "opaque.bmp").write_bytes(bmp_with_alpha(255))
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    Image.new("RGB", (80, 80), (1, 2, 3)).save(src / "text.png", pnginfo=text)
    Image.new("RGB", (80, 80), (1, 2, 3)).save(src / "profile.png", icc_profile=bytes(2_000_000))
    out = convert()
    expected = {"twelve": (191,) * 3, "padded": (10, 20, 30), "opaque": (10, 20, 30)}
    expected |= {"text": (1, 2, 3), "profile": (1, 2, 3)}
    for name, colour in expected.items():
        assert abs(crop_of(out, name) - np.array(colour)).max() <= 1, name


def test_small_photos_are_counted_or_upscaled(tmp_path, convert, capsys):
    gradient(89, 109).save(tmp_path / "src" / "small.jpg")
    out = convert("--sizes", "64", "128")
    assert "1 skipped: smaller than 128" in capsys.readouterr().out
    assert (out / "skipped.txt").read_text() == ""
    convert("--sizes", "128", "--allow-upscale")
    assert crop_of(out, "small", 128).shape == (128, 128, 3)
