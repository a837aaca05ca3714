"""Prepares pictures for the networks: resized with Pillow's antialiasing filter, cropped, normalized.

Figures computed after resizing without antialiasing are not comparable with others (Parmar et al. 2022, "On aliased
resizing and surprising subtleties in GAN evaluation").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of CLIP's training pictures; BLIP uses the same."""


def crop_to(image: Image.Image, size: int) -> Image.Image:
    """Resizes the shorter side to ``size`` (bicubic) and cuts out the center size x size, RGB."""
    image = image.convert("RGB")
    shorter = min(image.size)
    if shorter != size:
        wide, high = (side * size // shorter for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def stretch_to(images: Tensor, size: int) -> Tensor:
    """Resizes uint8 [B, 3, H, W] to uint8 [B, 3, size, size]: bicubic, each channel in floating point, rounded once."""
    planes = images.float().cpu().numpy()
    resized = np.stack(
        [
            np.stack([np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BICUBIC)) for p in picture])
            for picture in planes
        ]
    )
    return torch.from_numpy(resized).round().clamp(0, 255).to(torch.uint8)


def to_pillow(image: Tensor) -> Image.Image:
    """Converts uint8 [3, H, W]."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def from_pillow(image: Image.Image) -> Tensor:
    """Converts to uint8 [3, H, W], RGB."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def clip_pixels(
    images: Tensor, size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """CLIP's input for uint8 [B, 3, H, W]: float32 [B, 3, size, size], cropped and normalized."""
    cropped = torch.stack([from_pillow(crop_to(to_pillow(image), size)) for image in images]).float() / 255
    return (cropped - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
