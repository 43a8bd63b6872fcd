"""Procedural faces, drawn from numbers: what everything here runs on where there are no photos.

    from demo_faces import draw_face
    draw_face(seed=0, index=7).show()               # the same face every time

They vary in what faces vary in (pose, skin, hair, eyes, brows, nose, mouth, beard, glasses, light, background, noise),
so that a GAN has a distribution to learn and a person sees a face. They say nothing about real ones.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

WIDTH, HEIGHT = 178, 218  # of CelebA's aligned photos
SCALE = 2  # drawn larger and reduced: smooth edges
SKINS = ((255, 224, 196), (241, 194, 155), (224, 172, 128), (198, 134, 92), (141, 88, 54), (92, 58, 40))
HAIRS = ((25, 20, 18), (60, 38, 24), (110, 70, 36), (168, 120, 62), (220, 186, 120), (150, 60, 30), (185, 182, 180))
IRISES = ((60, 38, 22), (95, 70, 40), (70, 110, 150), (80, 120, 80), (110, 115, 120))


def draw_face(seed: int, index: int) -> Image.Image:
    """Face `index` of the set `seed`: an RGB image of 178x218, a function of these two numbers alone."""
    rng = np.random.default_rng((seed, index))
    skin = mix(SKINS, rng)
    hair = mix(HAIRS, rng)
    pose = {"x": WIDTH / 2 + rng.normal(0, 4), "y": 118 + rng.normal(0, 4), "yaw": rng.normal(0, 0.35)}
    pose |= {"w": rng.normal(48, 3.5), "h": rng.normal(63, 4)}
    long_hair, bald = rng.random() < 0.45, rng.random() < 0.07

    picture = draw_background(rng)
    if long_hair and not bald:
        picture = layer(picture, lambda draw: draw_long_hair(draw, pose, hair, rng), blur=2)
    picture = layer(picture, lambda draw: draw_body(draw, pose, skin, rng), blur=1.5)
    picture = layer(picture, lambda draw: draw_head(draw, pose, skin), blur=1)
    picture = shade(picture, pose, rng)
    if not long_hair and rng.random() < 0.35:
        picture = layer(picture, lambda draw: draw_beard(draw, pose, hair, rng), blur=4, opacity=rng.uniform(0.3, 0.8))
    picture = layer(picture, lambda draw: draw_features(draw, pose, skin, hair, rng), blur=0.8)
    if not bald:
        picture = layer(picture, lambda draw: draw_fringe(draw, pose, hair, rng), blur=1.8)
    if rng.random() < 0.15:
        picture = layer(picture, lambda draw: draw_glasses(draw, pose), blur=0.6, opacity=0.85)
    return develop(picture, pose, rng)


def mix(colours: tuple, rng: np.random.Generator) -> np.ndarray:
    """A colour between two neighbours of a scale, float RGB."""
    at = rng.uniform(0, len(colours) - 1)
    low = np.array(colours[int(at)], float)
    return low + (np.array(colours[int(at) + 1], float) - low) * (at % 1)


def rgb(colour: np.ndarray, factor: float = 1.0) -> tuple[int, int, int]:
    return tuple(int(c) for c in np.clip(np.asarray(colour) * factor, 0, 255))


def box(x: float, y: float, w: float, h: float) -> list[float]:
    """The ellipse around (x, y) with half axes w and h, in drawn pixels."""
    return [(x - w) * SCALE, (y - h) * SCALE, (x + w) * SCALE, (y + h) * SCALE]


def layer(picture: Image.Image, paint, blur: float, opacity: float = 1.0) -> Image.Image:
    """Lays what `paint` draws over `picture`, with soft edges."""
    top = picture.copy()
    mask = Image.new("L", picture.size)
    pens = (ImageDraw.Draw(top), ImageDraw.Draw(mask))

    class Both:
        """Draws each shape twice: in colour, and into the mask."""

        def __getattr__(self, shape):
            def stroke(at, fill, **more):
                getattr(pens[0], shape)(at, fill=fill, **more)
                getattr(pens[1], shape)(at, fill=int(255 * opacity), **more)

            return stroke

    paint(Both())
    return Image.composite(top, picture, mask.filter(ImageFilter.BoxBlur(blur)))


def draw_background(rng: np.random.Generator) -> Image.Image:
    """A gradient between two colours in a random direction, with a few blurred lights."""
    a, b = rng.uniform(20, 235, 3), rng.uniform(20, 235, 3)
    y, x = np.mgrid[0 : HEIGHT * SCALE, 0 : WIDTH * SCALE].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    picture = Image.fromarray((a + (b - a) * ramp[..., None]).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 5)):
        spot = box(rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), *rng.uniform(8, 40, 2))
        draw.ellipse(spot, fill=rgb((a + b) / 2, rng.uniform(0.5, 1.5)))
    return picture.filter(ImageFilter.BoxBlur(12))


def draw_long_hair(draw, pose: dict, hair: np.ndarray, rng: np.random.Generator) -> None:
    x, y, w, h = pose["x"], pose["y"], pose["w"], pose["h"]
    wide, low = w * rng.uniform(1.15, 1.5), y + h * rng.uniform(0.5, 1.4)
    draw.ellipse(box(x, y - h * 0.3, wide, h * 0.95), rgb(hair, 0.8))
    draw.rectangle([(x - wide) * SCALE, (y - h * 0.3) * SCALE, (x + wide) * SCALE, low * SCALE], rgb(hair, 0.8))
    draw.ellipse(box(x, low, wide, 14), rgb(hair, 0.75))


def draw_body(draw, pose: dict, skin: np.ndarray, rng: np.random.Generator) -> None:
    x, y, w, h = pose["x"], pose["y"], pose["w"], pose["h"]
    draw.ellipse(box(x, HEIGHT + 22, w * rng.uniform(1.7, 2.2), 52), rgb(rng.uniform(20, 235, 3)))
    neck = [(x - w * 0.5) * SCALE, (y + h * 0.4) * SCALE, (x + w * 0.5) * SCALE, (y + h * 1.25) * SCALE]
    draw.rectangle(neck, rgb(skin, 0.8))
    draw.ellipse(box(x, y + h * 1.25, w * 0.5, 9), rgb(skin, 0.82))


def draw_head(draw, pose: dict, skin: np.ndarray) -> None:
    x, y, w, h = pose["x"], pose["y"], pose["w"], pose["h"]
    for side in (-1, 1):
        draw.ellipse(box(x + side * w * 0.98, y - h * 0.02, 7, 13), rgb(skin, 0.88))
    draw.ellipse(box(x, y - h * 0.12, w, h * 0.85), rgb(skin))
    draw.ellipse(box(x + pose["yaw"] * 6, y + h * 0.18, w * 0.86, h * 0.82), rgb(skin))


def shade(picture: Image.Image, pose: dict, rng: np.random.Generator) -> Image.Image:
    """Lambert light on an ellipsoid where the head is, from a random side."""
    y, x = np.mgrid[0 : HEIGHT * SCALE, 0 : WIDTH * SCALE].astype(np.float32) / SCALE
    u, v = (x - pose["x"]) / (pose["w"] * 1.03), (y - pose["y"]) / (pose["h"] * 1.03)
    depth = np.sqrt(np.clip(1 - u * u - v * v, 0, None))
    light = np.array([rng.normal(0, 0.5), rng.normal(-0.3, 0.25), 1.0])
    light /= np.linalg.norm(light)
    lit = 0.62 + 0.5 * np.clip(u * light[0] + v * light[1] + depth * light[2], 0, None)
    lit = np.where(depth > 0, lit, 0.8).astype(np.float32)
    return Image.fromarray(np.clip(np.asarray(picture) * lit[..., None], 0, 255).astype(np.uint8))


def draw_beard(draw, pose: dict, hair: np.ndarray, rng: np.random.Generator) -> None:
    x, y, w, h = pose["x"] + pose["yaw"] * 8, pose["y"], pose["w"], pose["h"]
    draw.ellipse(box(x, y + h * 0.68, w * rng.uniform(0.4, 0.72), h * 0.3), rgb(hair, 0.8))
    draw.ellipse(box(x, y + h * 0.39, w * 0.4, 5), rgb(hair, 0.8))


def draw_features(draw, pose: dict, skin: np.ndarray, hair: np.ndarray, rng: np.random.Generator) -> None:
    """Eyes, brows, nose and mouth; yaw moves them over the head and narrows what turns away."""
    x, y, w, h = pose["x"] + pose["yaw"] * 16, pose["y"], pose["w"], pose["h"]
    iris, open_eye, gaze = rgb(IRISES[rng.integers(len(IRISES))]), rng.uniform(3.2, 5.2), rng.normal(0, 1.2)
    brow, brow_lift, brow_thick = rgb(hair, 0.7), rng.normal(0, 1.5), int(rng.integers(4, 8))
    for side in (-1, 1):
        turned = 1 - side * pose["yaw"] * 0.35
        ex, ey = x + side * w * 0.41 * turned, y - h * 0.1
        draw.ellipse(box(ex, ey, 9.8 * turned, open_eye + 1.6), rgb(skin, 0.62))
        draw.ellipse(box(ex, ey + 0.6, 8.6 * turned, open_eye), (238, 236, 232))
        draw.ellipse(box(ex + gaze, ey + 0.3, min(4.3, open_eye), min(4.3, open_eye)), iris)
        draw.ellipse(box(ex + gaze, ey + 0.3, 2, 2), (10, 8, 8))
        draw.ellipse(box(ex + gaze + 1.4, ey - 1, 0.9, 0.9), (255, 255, 255))
        arch = box(ex, ey - 7 + brow_lift, 12 * turned, 8)
        draw.arc(arch, start=205, end=335, fill=brow, width=brow_thick)
    nose = rng.uniform(5, 8)
    draw.ellipse(box(x + pose["yaw"] * 5, y + h * 0.2, nose, 4), rgb(skin, 0.86))
    draw.ellipse(box(x + pose["yaw"] * 5 - 1, y + h * 0.16, nose * 0.55, 4.5), rgb(skin, 1.06))
    for side in (-1, 1):
        draw.ellipse(box(x + pose["yaw"] * 5 + side * nose * 0.55, y + h * 0.235, 1.8, 1.2), rgb(skin, 0.5))
    draw_mouth(draw, x + pose["yaw"] * 2, y + h * 0.5, w * rng.uniform(0.36, 0.5), skin, rng)


def draw_mouth(draw, x: float, y: float, w: float, skin: np.ndarray, rng: np.random.Generator) -> None:
    lips = rgb(skin * 0.65 + np.array([190, 50, 70]) * rng.uniform(0.15, 0.4))
    smile = rng.uniform(-1, 8)
    if smile > 4:  # an open smile: teeth between the lips
        draw.chord(box(x, y - smile / 2, w, smile + 3.5), start=0, end=180, fill=lips)
        draw.chord(box(x, y - smile / 2 + 1, w * 0.84, smile + 0.6), start=0, end=180, fill=(240, 236, 230))
    else:
        draw.ellipse(box(x, y - 1.6, w * 0.85, 2.6), lips)
        draw.ellipse(box(x, y + 1.6, w * 0.7, 3.2), lips)
        draw.arc(box(x, y - smile, w, max(smile, 0.6) + 0.6), start=10, end=170, fill=rgb(skin, 0.4), width=2)


def draw_fringe(draw, pose: dict, hair: np.ndarray, rng: np.random.Generator) -> None:
    """Hair on the head: a cap above the hairline, parted somewhere, with a few lighter strands."""
    x, y, w, h = pose["x"], pose["y"], pose["w"], pose["h"]
    line, part = y - h * rng.uniform(0.42, 0.62), rng.uniform(-0.6, 0.6)
    draw.chord(box(x, line + h * 0.1, w * 1.1, h * 0.62), start=180, end=360, fill=rgb(hair))
    for side, share in ((-1, 1 + part), (1, 1 - part)):
        lock = box(x + side * w * 0.46, line + h * 0.08, w * 0.55 * max(share, 0.5), h * rng.uniform(0.14, 0.3))
        draw.ellipse(lock, rgb(hair))
    for _ in range(6):
        at = box(x, line + h * 0.12, w * rng.uniform(0.3, 1.02), h * rng.uniform(0.4, 0.58))
        start = rng.uniform(190, 300)
        draw.arc(at, start=start, end=start + rng.uniform(15, 50), fill=rgb(hair + 18, 1.2), width=3)


def draw_glasses(draw, pose: dict) -> None:
    x, y, w = pose["x"] + pose["yaw"] * 16, pose["y"] - pose["h"] * 0.09, pose["w"]
    for side in (-1, 1):
        draw.arc(box(x + side * w * 0.42, y, 15, 11), start=0, end=360, fill=(25, 22, 25), width=4)
    draw.line([(x - w * 0.1) * SCALE, y * SCALE, (x + w * 0.1) * SCALE, y * SCALE], fill=(25, 22, 25), width=4)


def develop(picture: Image.Image, pose: dict, rng: np.random.Generator) -> Image.Image:
    """Tilt, focus, size, exposure and sensor noise of a photo."""
    centre = (pose["x"] * SCALE, pose["y"] * SCALE)
    corner = picture.getpixel((0, 0))
    picture = picture.rotate(rng.normal(0, 6), Image.Resampling.BILINEAR, center=centre, fillcolor=corner)
    picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0, 1.6)))
    picture = picture.resize((WIDTH, HEIGHT), Image.Resampling.BOX)
    pixels = np.asarray(picture, np.float32) * rng.uniform(0.75, 1.15)
    pixels += rng.normal(0, rng.uniform(1, 5), pixels.shape[:2])[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
