"""The one place that opens an image: formats, limits, orientation and colour modes. Imports no torch.

    image = open_photo(Path("img_align_celeba.zip"), photos[0])      # of support/sources.py; not decoded yet
    image = read_rgb(Path("data/64/train/000001.png"))               # upright, 8-bit RGB
"""

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from support.images import SOFTWARE
from support.sources import OWN_PICTURE, Photo, read_bytes, read_file

# Decoders that are fast, run no other program and know an image's size before they decode it.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000  # decodes in under 5 s and 1 GiB in every format


def open_image(data: bytes) -> Image.Image:
    """An image of at most MAX_PIXELS, not decoded yet. Raises any exception; its text is the reason."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image ({', '.join(FORMATS)})" if data else "an empty file") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS:,} pixels")
    return image


class OwnPicture(Exception):
    """The file is a picture that our own scripts drew, not a photo."""


def open_photo(src: Path, photo: Photo) -> Image.Image:
    """A photo, not decoded yet. Raises OwnPicture, or any other exception; its text is the reason."""
    image = open_image(read_bytes(src, photo))
    if is_own_picture(image):
        raise OwnPicture(OWN_PICTURE)
    return image


def is_own_picture(image: Image.Image) -> bool:
    """Whether support/images.py wrote the file."""
    return image.info.get("Software") == SOFTWARE or image.info.get("comment") == SOFTWARE.encode()


def upright(image: Image.Image) -> Image.Image:
    """The same image, decoded and turned as its EXIF data says."""
    image.load()
    with suppress(Exception):  # damaged EXIF does not damage the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def read_rgb(path: Path) -> Image.Image:
    """The image in a file, upright, 8-bit RGB. Raises any exception; its text is the reason."""
    return to_rgb(upright(open_image(read_file(path))))


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
