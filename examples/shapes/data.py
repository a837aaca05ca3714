"""Captioned pictures drawn by rule: one or two shapes with colour, size and place on a coloured ground."""

import math
import random
import re
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

PIXELS = 64
# pixels; one step draws the mean over what the caption leaves open, so much more would blur edges
JITTER = 0.4
COLOURS = {
    "red": (215, 30, 35),
    "green": (40, 165, 60),
    "blue": (45, 85, 230),
    "yellow": (245, 220, 50),
    "purple": (150, 45, 185),
    "orange": (250, 135, 25),
    "cyan": (60, 205, 220),
    "white": (250, 250, 250),
}
GROUNDS = {
    "black": (12, 12, 14),
    "gray": (125, 125, 128),
    "brown": (105, 65, 35),
    "pink": (250, 120, 185),
    "navy": (20, 25, 85),
    "beige": (232, 222, 165),
}
WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus sign"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "left": ("on the left", "at the left side", "to the left"),
    "right": ("on the right", "at the right side", "to the right"),
    "top": ("at the top", "up above", "in the upper part"),
    "bottom": ("at the bottom", "down below", "in the lower part"),
    "centre": ("in the centre", "in the middle", "at the center"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "gray": ("gray", "grey"),
    "navy": ("navy", "dark blue"),
}
RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "top": ("above", "over"),
    "bottom": ("below", "under"),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = ("small", "large")
RADII = {"small": 8.5, "large": 13.5}
CENTRES = {
    "left": (16.5, 32),
    "right": (47.5, 32),
    "top": (32, 16.5),
    "bottom": (32, 47.5),
    "centre": (32, 32),
}
PLACES = tuple(CENTRES)
PAIRS = (("left", "right"), ("top", "bottom"))
ONE = (
    "a {s0} {c0} {f0} {p0} on a {g} background",
    "{p0} there is a {s0} {c0} {f0}, and the background is {g}",
    "one {s0} {f0} in {c0}, {p0}, on {g}",
    "{g} background with a {s0} {c0} {f0} {p0}",
    "a picture of a {s0} {f0} {p0}; it is {c0} and the background is {g}",
    "a {c0} {f0}, {s0} and {p0}, drawn on {g}",
    "the {f0} {p0} is {s0} and {c0}, everything else is {g}",
    "{g} all over, except for a {s0} {c0} {f0} {p0}",
    "a {s0} {f0} painted {c0} sits {p0} against a {g} backdrop",
    "on a {g} canvas, a {s0} {c0} {f0} {p0}",
)
TWO = (
    "a {s0} {c0} {f0} {p0} and a {s1} {c1} {f1} {p1} on a {g} background",
    "{p0} a {s0} {c0} {f0}, {p1} a {s1} {c1} {f1}, the background is {g}",
    "{g} background with a {s0} {c0} {f0} {p0} and a {s1} {c1} {f1} {p1}",
    "two shapes on {g}: a {s0} {f0} in {c0} {p0}, a {s1} {f1} in {c1} {p1}",
    "the {f0} {p0} is {s0} and {c0}, the {f1} {p1} is {s1} and {c1}, on {g}",
    "on a {g} canvas, a {s0} {c0} {f0} {p0} together with a {s1} {c1} {f1} {p1}",
    "a {c0} {f0}, {s0}, {p0}; a {c1} {f1}, {s1}, {p1}; {g} behind them",
    "there is a {s0} {f0} {p0} that is {c0} and a {s1} {f1} {p1} that is {c1}, all on {g}",
    "a {s0} {c0} {f0} {r0} a {s1} {c1} {f1} on a {g} background",
    "a {g} backdrop; {r0} a {s1} {c1} {f1} there is a {s0} {c0} {f0}",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape by the names of its attributes, e.g. ``Shape("star", "red", "small", "left")``."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True, slots=True)
class Spec:
    """All that a caption says: the ground and one shape, or two in the order of `PAIRS`."""

    ground: str
    shapes: tuple[Shape, ...]


def is_held_out(spec: Spec) -> bool:
    """True for one spec in 32; no part of the pipeline is ever trained on those."""
    return zlib.crc32(repr(spec).encode()) % 32 == 0


def draw_spec(rng: random.Random, *, held_out: bool = False) -> Spec:
    """A random spec on the wanted side of the split; six in ten have two shapes."""
    while True:
        places = rng.choice(PAIRS) if rng.random() < 0.6 else (rng.choice(PLACES),)
        shapes = (Shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(SIZES), p) for p in places)
        spec = Spec(rng.choice(list(GROUNDS)), tuple(shapes))
        if is_held_out(spec) == held_out:
            return spec


def caption(spec: Spec, rng: random.Random) -> str:
    """An English sentence that says everything in `spec`, in random words and order."""
    words = {"g": _word(spec.ground, rng)}
    shapes = rng.sample(spec.shapes, len(spec.shapes))
    for i, s in enumerate(shapes):
        named = {"f": s.shape, "c": s.colour, "s": s.size, "p": s.place}
        words |= {f"{letter}{i}": _word(name, rng) for letter, name in named.items()}
    if len(shapes) == 2:
        words["r0"] = rng.choice(RELATIONS[shapes[0].place])
    text = rng.choice(TWO if len(shapes) == 2 else ONE).format(**words)
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _word(name: str, rng: random.Random) -> str:
    return rng.choice(WORDS.get(name, (name,)))


def picture(spec: Spec, rng: random.Random, *, jitter: float = JITTER) -> Tensor:
    """Draws `spec`: float [3, 64, 64] in [0, 1]; centres are moved by up to `jitter` pixels."""
    axis = torch.arange(PIXELS) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    image = torch.tensor(GROUNDS[spec.ground]).view(3, 1, 1).expand(3, PIXELS, PIXELS) / 255
    for s in spec.shapes:
        cx, cy = (c + rng.uniform(-jitter, jitter) for c in CENTRES[s.place])
        cover = (0.5 - distance(s.shape, x - cx, y - cy, RADII[s.size])).clamp(0, 1)
        image = torch.lerp(image, torch.tensor(COLOURS[s.colour]).view(3, 1, 1) / 255, cover)
    return image


def distance(shape: str, x: Tensor, y: Tensor, r: float) -> Tensor:
    """Signed distance in pixels from (x, y) to the outline of a shape of radius `r`; negative inside."""
    rho = (x * x + y * y).sqrt()
    match shape:
        case "circle":
            return rho - r
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.86 * r
        case "triangle":
            y = y - 0.15 * r
            return torch.maximum(y - 0.57 * r, 0.866 * x.abs() - 0.5 * y - 0.57 * r)
        case "ring":
            return (rho - 0.74 * r).abs() - 0.25 * r
        case "cross":
            upright = torch.maximum(x.abs() - 0.3 * r, y.abs() - r)
            return torch.minimum(upright, torch.maximum(x.abs() - r, y.abs() - 0.3 * r))
        case "star":
            return _star(rho, torch.atan2(x, -y), 1.12 * r, 0.46 * r)
    raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")


def _star(rho: Tensor, angle: Tensor, outer: float, inner: float) -> Tensor:
    """Folds the plane to one of the ten half points of a star, where its outline is one straight line."""
    fifth = 2 * math.pi / 5
    angle = angle.remainder(fifth)
    angle = torch.minimum(angle, fifth - angle)
    nx, ny = inner * math.sin(fifth / 2), outer - inner * math.cos(fifth / 2)
    return ((rho * angle.cos() - outer) * nx + rho * angle.sin() * ny) / math.hypot(nx, ny)
