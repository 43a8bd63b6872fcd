"""Pictures: grids, PNGs, animations, plots."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from support.files import atomic_write

if TYPE_CHECKING:
    import torch  # for the annotations only: preprocess.py's workers import this module

# Level 1 with zlib's Z_RLE: a third of the default's time at 128x128, for 2 % more bytes.
PNG = {"compress_level": 1, "compress_type": 3}


def image_grid(images: "torch.Tensor", columns: int = 8) -> Image.Image:
    """One picture of uint8 images (N,3,H,W), row by row with two black pixels between: pixels as they are."""
    n, _, height, width = images.shape
    columns = min(columns, n)
    grid = Image.new("RGB", (columns * (width + 2) + 2, -(-n // columns) * (height + 2) + 2))
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        grid.paste(Image.fromarray(image), (2 + i % columns * (width + 2), 2 + i // columns * (height + 2)))
    return grid


def save_image(image: Image.Image, path: Path, **options) -> None:
    """Writes `image` to `path`, whole or not at all, in the format of its suffix."""
    with atomic_write(path) as file:
        image.save(file, path.suffix[1:], **options)


def save_animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 60) -> None:
    """An endless GIF; the last frame stays a second."""
    durations = [milliseconds] * (len(frames) - 1) + [1000]
    save_image(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def encode_png(image: "torch.Tensor") -> memoryview:
    """The PNG file of an image uint8 (3,S,S)."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG", **PNG)
    return file.getbuffer()


def plot(rows: list[dict], colours: dict[str, str], path: Path) -> None:
    """A picture of the fields `colours` of `rows` against images seen."""
    width, height, margin = 900, 420, 50
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    top = max([row[name] for row in rows for name in colours] + [1e-9])
    last = max(row["images_seen"] for row in rows)
    for i in range(5):
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
