"""Pictures of the shapes example, cropped and halved: one shape of any kind and colour, 16x16 pixels, any ground."""

import functools
import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.shapes import data
from examples.shapes.data import COLOURS, GROUNDS, SHAPES, Shape, Spec

PIXELS = data.PIXELS // 4
BORDER = data.PIXELS // 4  # of the large picture, cut off on each side
JITTER = 1.0  # pixels of the large picture


def draw_spec(rng: random.Random) -> Spec:
    """The spec of a random picture."""
    return Spec(rng.choice(list(GROUNDS)), (Shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), "large", "centre"),))


def pictures(n: int, rng: random.Random) -> Tensor:
    """Random pictures, float [n, 3, 16, 16] in [0, 1]."""
    return _small([data.picture(draw_spec(rng), rng, jitter=JITTER) for _ in range(n)])


@functools.cache
def catalogue() -> Tensor:
    """Every combination of shape, colour and ground, with the shape at six positions: [1728, 3, 16, 16]."""
    rng = random.Random(0)
    kinds = itertools.product(GROUNDS, SHAPES, COLOURS)
    specs = [Spec(ground, (Shape(shape, colour, "large", "centre"),)) for ground, shape, colour in kinds]
    return _small([data.picture(spec, rng, jitter=JITTER) for spec in specs for _ in range(6)])


def _small(large: list[Tensor]) -> Tensor:
    """The middle of 64x64 pictures, halved."""
    return F.avg_pool2d(torch.stack(large)[:, :, BORDER:-BORDER, BORDER:-BORDER], 2)


def framed(images: Tensor) -> Tensor:
    """Pictures [B, 3, 16, 16] as the shapes example's scorer reads them, [B, 3, 64, 64]: doubled, ground extended."""
    return F.pad(F.interpolate(images, scale_factor=2, mode="bilinear"), [BORDER] * 4, mode="replicate")
