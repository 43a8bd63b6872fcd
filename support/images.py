"""Pictures: grids, PNG files, animations and plots. Imports no torch, since preprocess.py's workers import it.

    save_image(image_grid(faces), Path("grid.png"))      # faces: uint8 (N,3,H,W)
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from support.files import atomic_write

if TYPE_CHECKING:
    from torch import Tensor

GAP = 2  # black pixels between the images of a grid and around them


def to_pil(image: "Tensor") -> Image.Image:
    """An image uint8 (3,H,W) on the CPU as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of an image uint8 (H,W,3).

    Pillow tries five filters for each row. One filter for all rows, the difference from the row above ("Up"), takes
    less than half of the time, for 7 % more bytes. Format: ISO/IEC 15948.
    """
    height, width, channels = pixels.shape
    rows = np.full((height, 1 + width * channels), 2, np.uint8)  # each row begins with its filter: 2 is "Up"
    rows[:, 1:] = pixels.reshape(height, -1)
    rows[1:, 1:] -= rows[:-1, 1:]  # modulo 256
    compressor = zlib.compressobj(1, strategy=zlib.Z_RLE)
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))]  # 8 bits a channel, RGB
    chunks += [(b"IDAT", compressor.compress(rows) + compressor.flush()), (b"IEND", b"")]
    file = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        file += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))]
    return b"".join(file)


def image_grid(images: "Tensor", columns: int = 8) -> Image.Image:
    """One picture of images uint8 (N,3,H,W), row by row. torchvision's make_grid takes 2 s to import, for 8 lines."""
    n, _, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    grid = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP))
    for i, image in enumerate(images):
        grid.paste(to_pil(image), (GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)))
    return grid


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Both pictures in one, on white."""
    picture = Image.new("RGB", (left.width + 8 * GAP + right.width, max(left.height, right.height)), "white")
    picture.paste(left)
    picture.paste(right, (left.width + 8 * GAP, 0))
    return picture


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Write `image` to `path`, a .png or .gif, whole or not at all. Raises UserError."""
    with atomic_write(path) as file:
        image.save(file, path.suffix[1:], **options)


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> None:
    """An endless GIF that shows its last frame for a second. Raises UserError when `path` cannot be written."""
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def save_plot(rows: list[dict], colours: dict[str, str], path: Path) -> None:
    """A line plot of the fields `colours` of `rows` against rows' "images_seen". Raises UserError."""
    width, height, margin = 900, 420, 50
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = max([row[name] for row in rows for name in colours] + [1e-9])
    last = max(row["images_seen"] for row in rows) or 1
    for i in range(5):  # grid lines and tick labels
        y = height - margin - i / 4 * (height - 2 * margin)
        draw.line([(margin, y), (width - margin, y)], "#dddddd")
        draw.text((8, y - 6), f"{top * i / 4:.2f}", "black")
        x = margin + i / 4 * (width - 2 * margin)
        draw.text((x - 20, height - margin + 8), f"{last * i / 4:,.0f}", "black")
    draw.text((width // 2 - 40, height - 22), "real images seen", "black")
    for i, (name, colour) in enumerate(colours.items()):
        xs = [margin + row["images_seen"] / last * (width - 2 * margin) for row in rows]
        ys = [height - margin - row[name] / top * (height - 2 * margin) for row in rows]
        draw.line(list(zip(xs, ys)), colour, 2, joint="curve")
        draw.text((margin + 10 + 90 * i, 18), name, colour)
    save_image(picture, path)
