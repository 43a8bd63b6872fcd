"""The one place that opens an image: formats, limits, orientation and colours. Imports no torch.

    image = open_photo(Path("img_align_celeba.zip"), photos[0])      # of support/sources.py; not decoded yet
    image = read_rgb(Path("data/64/train/000001.png"))               # upright, 8-bit RGB
"""

import io
import re
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from support.files import UserError, printable
from support.sources import Photo, read_bytes, read_file

# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # decodes in under 5 s and 1 GiB in every format
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MiB: editors write megabytes of text and profiles
BITS_PER_SAMPLE = 258  # TIFF tag
PROBE = np.stack(np.meshgrid(*[np.arange(0, 256, 51, np.uint8)] * 3), -1).reshape(1, -1, 3)  # colours, evenly spread


class Unreadable(UserError):
    """A file gives no image."""


class UnknownFormat(ValueError):
    """A file is none of FORMATS."""


def explain(error: Exception) -> str:
    """Why a file gives no image, from what its decoder or the system raised."""
    return printable(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def open_image(data: bytes) -> Image.Image:
    """An image of at most MAX_PIXELS, not decoded yet. Raises any exception, for explain()."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        if re.match(rb".{4}ftyp(hei|hev|mif1|msf1|avi)", data, re.DOTALL):  # ISO/IEC 14496-12, section 4.3
            raise ValueError("HEIC or AVIF; export it as JPEG") from None
        raise UnknownFormat(f"not an image: none of {', '.join(FORMATS)}" if data else "an empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


def open_photo(src: Path, photo: Photo) -> Image.Image:
    """A photo, not decoded yet. Raises any exception, for explain()."""
    return open_image(read_bytes(src, photo))


def upright(image: Image.Image) -> Image.Image:
    """The same image, decoded and turned as its EXIF data says."""
    image.load()
    if image.format == "TIFF" and image.tag_v2.get(BITS_PER_SAMPLE) == (12,):
        image.info["white"] = 4095  # Pillow does not scale 12 bits to 16
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image.putalpha(255)  # an alpha channel of zeros alone is padding
    with suppress(Exception):  # damaged EXIF does not damage the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def read_rgb(path: Path) -> Image.Image:
    """The image in a file, upright, 8-bit RGB. Raises Unreadable, which names the file and the reason."""
    try:
        return to_rgb(upright(open_image(read_file(path))))
    except Exception as error:  # decoders raise any kind
        raise Unreadable(f"{printable(path)} cannot be read ({explain(error)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode and colour profile to 8-bit sRGB. Transparent pixels become white; deep grey is scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0)
        white = image.info.get("white", 65535)
        scales = (white,) if image.mode[0] == "I" else (1, 255, 65535)  # conventions for floats differ
        full = next((scale for scale in scales if grey.max() <= scale), grey.max())
        image = Image.fromarray((grey * (255 / full)).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = to_srgb(image.convert("RGBA"))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    else:
        image = to_srgb(image.convert("RGB") if image.mode == "P" else image)
    return image if image.mode == "RGB" else image.convert("RGB")


def to_srgb(image: Image.Image) -> Image.Image:
    """The same image with its embedded colour profile applied. A broken profile leaves the pixels as they are."""
    profile = image.info.get("icc_profile")
    if profile:
        with suppress(Exception):
            return profile_transform(profile, image.mode)(image)
    return image


@lru_cache(maxsize=8)  # the photos of one camera have one profile
def profile_transform(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image]:
    """A function from images of this `mode` and ICC profile to sRGB. It does nothing where the profile is sRGB itself.

    Raises any exception for a profile that is broken or of another colour space than `mode`.
    """
    from PIL import ImageCms  # most photos need none

    target = "RGBA" if mode == "RGBA" else "RGB"
    transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), mode, target)
    if mode == target:
        probe = Image.fromarray(PROBE).convert(mode)
        change = np.asarray(ImageCms.applyTransform(probe, transform), int) - np.asarray(probe)
        if abs(change).max() <= 2:  # rounding of the many files that hold sRGB
            return lambda image: image
    return lambda image: ImageCms.applyTransform(image, transform)


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """The centred square of the upright photo, RGB, `side` source pixels wide."""
    image = upright(image)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_rgb(image if box == (0, 0, *image.size) else image.crop(box))  # a copy of 50 MP takes 200 MB
