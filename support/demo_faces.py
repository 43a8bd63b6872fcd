"""Procedural faces, drawn from numbers: what everything here runs on where there are no photos.

    from support.demo_faces import draw_face
    draw_face(seed=0, index=7).show()               # the same face every time

A head is an ellipsoid that is lit, turned and painted on in its own coordinates. The faces vary in what faces vary in
(pose, skin, hair, eyes, brows, nose, mouth, beard, glasses, light, background, noise), so that a GAN has a
distribution to learn and a person sees a face. They say nothing about real ones.
"""

import math

import numpy as np
from PIL import Image, ImageFilter

WIDTH, HEIGHT = 178, 218  # of an aligned CelebA photo, and of a drawn one
SKIN = ((250, 217, 196), (237, 191, 161), (209, 156, 120), (161, 110, 79), (97, 64, 46))
HAIR = ((13, 10, 10), (41, 26, 18), (92, 56, 31), (140, 61, 26), (204, 158, 92), (230, 204, 153), (178, 178, 178))
IRIS = ((51, 28, 15), (92, 56, 26), (77, 102, 64), (77, 122, 166))


class Sketch:
    """A canvas (3,218,178) float32 in 0..255 and on it a head, seen as an ellipsoid of half-axes 1, `tall` and 1.

    `u` and `v` (218,178) say where each pixel lies, right and down from the head's centre, in units of half
    its width and tilted with it. What lies on the face goes through `place`: it moves as on a turning head.
    """

    def __init__(self, rng: np.random.Generator):
        self.half, self.tall = rng.uniform(45, 57), rng.uniform(1.22, 1.42)  # half is in pixels
        self.yaw, self.pitch = float(np.clip(rng.normal(0, 0.22), -0.5, 0.5)), rng.normal(0.03, 0.1)
        tilt = rng.normal(0, 0.09)
        self.x, self.y = rng.normal(WIDTH / 2, 4), rng.normal(HEIGHT / 2 + 8, 4)
        self.light = rng.uniform(-0.8, 0.8), rng.uniform(-0.8, 0.1)
        self.cos, self.sin = math.cos(tilt), math.sin(tilt)
        y, x = np.ogrid[:HEIGHT, :WIDTH]
        x, y = (x - self.x).astype(np.float32) / self.half, (y - self.y).astype(np.float32) / self.half
        self.u, self.v = x * self.cos + y * self.sin, y * self.cos - x * self.sin
        self.canvas = np.zeros((3, HEIGHT, WIDTH), np.float32)

    def place(self, u: float, v: float) -> tuple[float, float, float]:
        """Where the spot (u, v) of the head seen from the front is now; how narrow the turn makes things there."""
        z = max(1 - u * u - (v / self.tall) ** 2, 0.04) ** 0.5
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return u * cos + z * sin, v + z * self.pitch, max(cos - u / z * sin, 0.25)

    def corner(self, u: float, v: float, reach: float) -> tuple[slice, slice]:
        """Rows and columns of the canvas that lie within `reach` of (u, v)."""
        y = self.y + self.half * (u * self.sin + v * self.cos)
        x = self.x + self.half * (u * self.cos - v * self.sin)
        reach = reach * self.half + 1
        return tuple(slice(max(int(at - reach), 0), max(int(at + reach) + 1, 0)) for at in (y, x))

    def paint(self, mask: np.ndarray, colour: np.ndarray, where=np.s_[:, :]) -> None:
        """Lay `colour`, (3,) or (3,h,w), over the canvas as far as `mask` (h,w) in [0,1] says."""
        part = self.canvas[(slice(None), *where)]
        part += mask * ((colour if np.ndim(colour) == 3 else tone(colour)) - part)

    def ellipse(self, u, v, ru, rv, soft=0.03, angle=0.0, where=np.s_[:, :]) -> np.ndarray:
        """Mask (h,w) of an ellipse with centre (u, v), half-axes ru and rv, turned, its edge `soft` wide."""
        du, dv = self.u[where] - float(u), self.v[where] - float(v)
        if angle:
            cos, sin = math.cos(angle), math.sin(angle)
            du, dv = du * cos + dv * sin, dv * cos - du * sin
        distance = 1 - np.sqrt((du / float(ru)) ** 2 + (dv / float(rv)) ** 2)
        return np.clip(distance * float(min(ru, rv) / soft) + 0.5, 0, 1)

    def dab(self, u, v, ru, rv, colour, alpha=1.0, soft=0.03, angle=0.0) -> None:
        """Paint an ellipse, touching only its own corner of the canvas."""
        where = self.corner(u, v, max(ru, rv) + soft)
        self.paint(float(alpha) * self.ellipse(u, v, ru, rv, soft, angle, where), colour, where)


def tone(colour, light: np.ndarray | float = 1.0) -> np.ndarray:
    """`colour` (3,) as a field (3,h,w) or (3,1,1) under `light`; shadows turn warm, as they do on skin."""
    return np.asarray(colour, np.float32)[:, None, None] * light


def pick(rng: np.random.Generator, palette: tuple) -> np.ndarray:
    """A colour (3,) between two neighbours of `palette`, slightly off."""
    at, last = rng.uniform(0, len(palette) - 1), len(palette) - 1
    colour = [np.interp(at, range(last + 1), channel) for channel in zip(*palette, strict=True)]
    return np.clip(colour + rng.normal(0, 5, 3), 0, 255)


def draw_face(seed: int, index: int) -> Image.Image:
    """Face `index` of `seed`, RGB 178x218 like an aligned CelebA photo: the same bits in any process or order."""
    rng = np.random.default_rng((seed, index))
    s = Sketch(rng)
    skin, hair = pick(rng, SKIN), pick(rng, HAIR)
    long = float(rng.choice((0, 0, 0.6, 1, 1.5)))  # how far down the hair hangs
    strands = s.u / np.maximum(s.v + 1.5 * s.tall, 0.2)  # constant along lines from the crown
    gloss = 1 + float(rng.uniform(0.04, 0.1)) * sum(np.sin(strands * f) for f in rng.uniform(20, 90, 2).tolist())
    draw_behind(rng, s, skin)
    if long:
        s.paint(s.ellipse(0, long * 0.5 - 0.15, rng.uniform(1.15, 1.4), s.tall + long * 0.45, 0.12),
                tone(hair * 0.7, gloss))
        draw_neck(rng, s, skin)
    draw_head(rng, s, skin)
    draw_eyes(rng, s, skin, hair)
    draw_nose(rng, s, skin)
    draw_mouth(rng, s, skin)
    if not long and rng.random() < 0.35:
        draw_beard(rng, s, hair)
    if long or rng.random() > 0.15:
        draw_hair(rng, s, hair, gloss, long)
    if rng.random() < 0.15:
        draw_glasses(rng, s)
    return photograph(rng, s.canvas)


def draw_behind(rng, s, skin):
    """A background between two colours with lights out of focus; shoulders, neck and ears."""
    angle, grey = rng.uniform(0, 6.28), rng.uniform(0.1, 0.7)
    ramp = np.clip(0.5 + 0.25 * (s.u * math.cos(angle) + s.v * math.sin(angle)), 0, 1)
    one, two = (c * grey + c.mean() * (1 - grey) for c in rng.uniform(0, 255, (2, 3)))
    s.canvas += tone(one, 1 - ramp) + tone(two, ramp)
    for _ in range(rng.integers(0, 6)):
        r, colour = rng.uniform(0.3, 1), one + rng.normal(0, 60, 3)
        s.dab(*rng.uniform(-2, 2, 2), r, r * rng.uniform(0.6, 2), colour, rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.9))
    turn, side = 0.25 * s.yaw, 1 + 0.3 * np.clip(s.u * s.light[0], -1, 1)
    s.paint(s.ellipse(-turn, s.tall * 1.75, rng.uniform(1.7, 2.2), 0.75, 0.06), tone(rng.uniform(5, 200, 3), side))
    draw_neck(rng, s, skin)
    for sign in (-1, 1):
        s.dab(sign * (0.98 - 0.1 * abs(turn)) - turn, 0.02, 0.13, 0.24, skin * (0.8 + 0.2 * sign * s.light[0]), 1, 0.05)


def draw_neck(rng, s, skin):
    s.dab(-0.25 * s.yaw, s.tall + 0.12, rng.uniform(0.5, 0.65), 0.7, skin * 0.68, 1, 0.1)


def draw_head(rng, s, skin):
    """The head: an egg lit like an ellipsoid from one side, redder at the cheeks."""
    jaw = float(rng.uniform(0.08, 0.3)) * np.clip(s.v / s.tall, 0, 1) ** 2
    square = (s.u / (1 - jaw)) ** 2 + (s.v / s.tall) ** 2
    s.head = np.clip((1 - np.sqrt(square)) / 0.03 + 0.5, 0, 1)
    lit = 0.42 * (s.u * s.light[0] + s.v * (s.light[1] / s.tall)) + 0.45 * np.sqrt(np.clip(1 - square, 0, 1)) + 0.6
    warm = np.stack([np.clip(lit * gain + 1 - gain, 0.1, 1.3) for gain in (0.9, 1.0, 1.1)])  # as shadows on skin are
    s.paint(s.head, np.minimum(tone(skin) * warm, 255))
    blush = rng.uniform(0, 0.25)
    for sign in (-1, 1):
        u, v, narrow = s.place(sign * 0.55, 0.3)
        s.dab(u, v, 0.32 * narrow, 0.26, skin * (1, 0.6, 0.6), blush, 0.25)


def draw_eyes(rng, s, skin, hair):
    """Sockets, whites, irises, lids, brows; both eyes look the same way."""
    apart, high, width = rng.uniform(0.38, 0.46), rng.uniform(-0.16, -0.06), rng.uniform(0.17, 0.215)
    opened, makeup = rng.uniform(0.05, 0.11), rng.uniform(0.2, 0.7)
    slant, gaze = rng.normal(0, 0.1), rng.normal(0, 0.04)
    brow, thick, arch = rng.uniform(0.19, 0.27), rng.uniform(0.025, 0.055), rng.normal(0.08, 0.12)
    iris, dark = pick(rng, IRIS), np.minimum(hair, skin * 0.75) * 0.7
    size, s.eyes = min(opened * 1.05, 0.095), []
    for sign in (-1, 1):
        u, v, narrow = s.place(sign * apart, high)
        w = width * narrow
        s.eyes.append((u, v, w))
        s.dab(u, v - 0.03, w * 1.5, 0.2, skin * 0.62, 0.5, 0.2)
        s.dab(u, v, w, opened + 0.025, dark * 0.5, makeup + 0.2, 0.04, sign * slant)
        s.dab(u, v + 0.012, w * 0.9, opened, (236, 232, 228), 1, 0.03, sign * slant)
        s.dab(u + gaze, v, size * narrow**0.5, size, iris)
        s.dab(u + gaze, v, size * 0.5, size * 0.5, (8, 8, 8))
        s.dab(u + gaze + 0.03, v - 0.035, 0.025, 0.025, (255, 255, 255), 0.9)
        s.dab(u, v - opened - 0.005, w * 1.02, 0.022, dark * 0.4, makeup, 0.03, sign * slant)
        u, v, narrow = s.place(sign * (apart + 0.02), high - brow)
        s.dab(u, v, width * 1.35 * narrow, thick, dark, 0.85, 0.05, sign * arch)


def draw_nose(rng, s, skin):
    """A nose by its shadows and highlights, the tip in front of the face."""
    wing, turn = rng.uniform(0.13, 0.2), 0.28 * s.yaw
    u, v, _ = s.place(0, rng.uniform(0.32, 0.42))
    u += turn * 0.5
    for sign in (-1, 1):
        s.dab(u + sign * wing * 0.8 - turn * 0.4, v - 0.22, 0.07, 0.3, skin * 0.6, 0.25 * (1 - sign * s.light[0]), 0.12)
        s.dab(u + sign * wing * 0.75, v, 0.075, 0.075, skin * 0.78, 0.7, 0.07)
        s.dab(u + sign * wing * 0.5, v + 0.045, 0.05, 0.025, skin * 0.3, 0.75, 0.04)
    s.dab(u, v + 0.09, wing, 0.04, skin * 0.55, 0.5, 0.1)
    s.dab(u + 0.03 * s.light[0], v - 0.05, 0.08, 0.09, np.minimum(skin * 1.35, 255), 0.5, 0.12)
    s.dab(u - turn * 0.3 + 0.04 * s.light[0], v - 0.33, 0.045, 0.2, np.minimum(skin * 1.25, 255), 0.4, 0.08)


def draw_mouth(rng, s, skin):
    """Lips bent by a smile, closed or open over teeth."""
    u, v, narrow = s.place(0, rng.uniform(0.68, 0.76))
    u, smile = u + 0.06 * s.yaw, rng.uniform(-0.05, 0.6)
    wide = rng.uniform(0.3, 0.4) * narrow * (1 + 0.35 * max(smile, 0))
    upper, lower, gap = rng.uniform(0.04, 0.075), rng.uniform(0.06, 0.1), max(rng.uniform(-0.1, 0.13) + 0.12 * smile, 0)
    lips = skin * rng.uniform((0.75, 0.5, 0.5), (1.0, 0.7, 0.7))
    s.dab(u, v + 0.28, wide * 0.6, 0.05, skin * 0.6, 0.35, 0.1)
    where = s.corner(u, v, wide + 0.1)
    du = (s.u[where] - u) / wide
    bent = s.v[where] - (v - 0.1 * smile) - 0.4 * smile * (1 - du**2)  # 0 on the line between the lips
    taper = np.sqrt(np.clip(1 - du**2, 0, 1))

    def band(top: float, bottom: float, alpha: float = 1.0) -> np.ndarray:
        return np.clip(np.minimum(bent - top * taper, bottom * taper - bent) / 0.03 + 0.5 * (taper > 0), 0, 1) * alpha

    s.paint(band(-upper - gap * 0.2, lower + gap), lips, where)
    s.paint(band(-upper - gap * 0.2, 0, 0.2), lips * 0.6, where)  # the upper lip lies in shadow
    s.paint(band(-0.012, gap + 0.012, 1 if gap > 0.02 else 0.6), lips * 0.25, where)
    if gap > 0.03:
        s.paint(band(-0.005, gap * float(rng.uniform(0.6, 0.95))), (236, 230, 220), where)
    for sign in (-1, 1):
        s.dab(u + sign * (wide + 0.08), v - 0.12, 0.03, 0.18, skin * 0.6, 0.5 * max(smile, 0), 0.06, -sign * 0.5)


def draw_beard(rng, s, hair):
    """From stubble to a full beard, along the jaw and round the mouth."""
    u, v, _ = s.place(0, 0.76)
    jaw = s.head * np.clip((s.v - 0.55 + 0.3 * np.abs(s.u)) / 0.25, 0, 1)
    bare = s.ellipse(u, v + 0.02, 0.36, 0.12, 0.12) + s.ellipse(u, 0.25, 0.62, 0.45, 0.2)
    grain = 0.8 + 0.2 * rng.random(s.u.shape, np.float32)
    s.paint(float(rng.uniform(0.25, 0.9)) * np.clip(jaw - bare, 0, 1) * grain, hair * 0.8)


def draw_hair(rng, s, hair, gloss, long):
    """Hair over the head: a cap above a hairline, parted somewhere, that may fall along the cheeks."""
    part, volume = rng.uniform(-0.6, 0.6), rng.uniform(1.04, 1.16) + 0.06 * (long > 0)
    fringe = rng.uniform(-0.1, 0.3) * (rng.random() < 0.3)
    bend, end = (rng.uniform(0.5, 1.0), long + 0.5) if long else (rng.uniform(0.7, 1.8), rng.uniform(-0.3, 0.2))
    du = np.abs(s.u - 0.35 * s.yaw - 0.3 * part)
    line = rng.uniform(-0.72, -0.5) * s.tall + fringe + bend * du * du + 0.25 * part * s.u
    cap = np.clip((volume - np.sqrt((s.u / 1.02) ** 2 + (np.minimum(s.v, 0) / s.tall) ** 2)) / 0.06 + 0.5, 0, 1)
    mask = cap * np.clip((line - s.v) / 0.09 + 0.5, 0, 1) * np.clip((end - s.v) / (0.4 if long else 0.3) + 0.5, 0, 1)
    shine = float(rng.uniform(0, 0.6)) * np.clip(1 - np.abs(s.v + 0.9 * s.tall - 0.25 * s.u**2) / 0.25, 0, 1)
    lit = 0.85 + 0.25 * s.light[0] * s.u - 0.18 * s.v + shine
    s.paint(mask, np.clip(tone(hair, lit * gloss), 0, 255))


def draw_glasses(rng, s):
    """Rims and a bridge; sometimes dark glasses."""
    frame, dark = rng.uniform(0, 90, 3), float(rng.choice((0.05, 0.05, 0.85)))
    for u, v, w in s.eyes:
        lens = s.ellipse(u, v + 0.03, w * 1.5 - 0.04, 0.21)
        s.paint(lens * dark, frame * 0.3)
        s.paint(s.ellipse(u, v + 0.03, w * 1.5, 0.25) - lens, frame)
    (left, v, a), (right, _, b) = s.eyes
    inner, outer = left + a * 1.5, right - b * 1.5
    s.dab((inner + outer) / 2, v - 0.02, max(outer - inner, 0) / 2 + 0.04, 0.025, frame)


def photograph(rng, canvas):
    """What a camera adds: exposure, tint, noise, softness and contrast."""
    canvas *= tone(rng.uniform(0.85, 1.1) * rng.normal(1, 0.03, 3))
    canvas += rng.standard_normal(canvas.shape[1:], np.float32) * float(rng.uniform(2, 9))
    planes = np.clip(canvas, 0, 255).astype(np.uint8)
    photo = Image.merge("RGB", [Image.fromarray(plane) for plane in planes])
    gamma = rng.uniform(0.85, 1.25)
    curve = [round(255 * (level / 255) ** gamma) for level in range(256)]
    return photo.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 0.9))).point(curve * 3)
