"""Pictures on disk: numbered 8-bit PNG files, written atomically."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..atomicfile import replacing
from ..errors import MixDQError
from .resize import from_pillow, to_pillow

PER_FOLDER = 1000


def to_bytes(images: Tensor) -> Tensor:
    """Converts [B, 3, H, W] in [0, 1] to uint8, rounded to nearest. Raises MixDQError if a value is not finite."""
    bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten()
    if len(bad):
        raise MixDQError(f"picture {int(bad[0])} of the batch is not finite; try another --dtype, or another plan")
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


class Pictures:
    """The pictures of a run, by number, in folders of a thousand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, number: int) -> Path:
        return self.directory / f"{number // PER_FOLDER:03d}" / f"{number:06d}.png"

    def has(self, number: int) -> bool:
        return self.path(number).exists()

    def save(self, number: int, image: Tensor) -> None:
        """Writes uint8 [3, H, W]. Raises MixDQError if the file cannot be written."""
        path = self.path(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                to_pillow(image).save(file, format="PNG")
        except OSError as e:
            raise MixDQError(
                f"{path}: cannot be written: {e.strerror or e}; run the same command again once there is room"
            ) from e

    def load(self, number: int) -> Tensor:
        """uint8 [3, H, W]."""
        return read_picture(self.path(number))


def read_picture(path: Path) -> Tensor:
    """Reads any picture file as uint8 [3, H, W], RGB. Raises MixDQError naming the file."""
    try:
        with Image.open(path) as image:
            return from_pillow(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise MixDQError(f"{path}: cannot be read as a picture: {e}; delete it and run again") from e
