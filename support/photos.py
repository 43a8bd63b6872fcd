"""The one place that opens an image: formats, limits, orientation and colour modes. Imports no torch.

    image = open_photo(Path("img_align_celeba.zip"), photos[0])      # of support/sources.py; not decoded yet
    image = read_rgb(Path("data/64/train/000001.png"))               # upright, 8-bit RGB
"""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.files import UserError, printable
from support.sources import Photo, read_bytes, read_file

# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # decodes in under 5 s and 1 GiB in every format


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
        raise UnknownFormat(f"it is none of {', '.join(FORMATS)}" if data else "an empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


def open_photo(src: Path, photo: Photo) -> Image.Image:
    """A photo, not decoded yet. Raises any exception, for explain()."""
    return open_image(read_bytes(src, photo))


def upright(image: Image.Image) -> Image.Image:
    """The same image, decoded and turned as its EXIF data says."""
    image.load()
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
    """Any mode to 8-bit RGB. Transparent pixels become white; 16-bit and float grey is scaled, not clipped."""
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, np.float32), posinf=0)
        scales = (65535,) if image.mode[0] == "I" else (1, 255, 65535)  # conventions for floats differ
        full = next((scale for scale in scales if grey.max() <= scale), grey.max())
        image = Image.fromarray((grey * (255 / full)).round().clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """The centred square of the upright photo, RGB, `side` source pixels wide."""
    image = upright(image)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_rgb(image if box == (0, 0, *image.size) else image.crop(box))  # a copy of 50 MP takes 200 MB
