"""Mean and covariance of the features of real pictures, computed once for all runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import MixDQError
from ..progress import progress
from .fid import Features, feature_rows
from .frechet import Gaussian
from .pictures import read_picture
from .resize import crop_to, from_pillow, to_pillow
from .rows import RowFile
from .settings import digest_files

KINDS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def real_files(directory: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The picture files in a directory tree, sorted by path; or only those of ``names``, in that order.

    Raises MixDQError if there are fewer than two, or one of ``names`` is missing.
    """
    if not directory.is_dir():
        raise MixDQError(f"{directory}: is no directory, expected one with real pictures")
    if names is None:
        files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in KINDS)
    else:
        files = [directory / name for name in names]
        missing = next((f for f in files if not f.is_file()), None)
        if missing is not None:
            raise MixDQError(f"{missing}: is missing; the prompts name it, expected it below {directory}")
    if len(files) < 2:
        raise MixDQError(f"{directory}: holds {len(files)} pictures, expected two at least")
    return files


def measure_real(
    files: Sequence[Path],
    features: Features,
    out: Path,
    *,
    identity: str = "",
    crop: int | None = None,
    batch_size: int = 32,
) -> Gaussian:
    """Computes mean and covariance of the features of ``files`` and saves them to ``out``; a stopped run continues.

    Args:
        features: function from uint8 pictures [B, 3, H, W] to features [B, d].
        out: a .safetensors file; a .part file beside it holds the features computed so far.
        identity: identifies the features (see ``FID``).
        crop: size in pixels: the shorter side is resized to it, and the center square is cut out. None leaves pictures
            as they are; only adjacent ones of equal size share a batch.

    Raises MixDQError naming a file that cannot be read, or a .part file of other pictures.
    """
    subject = {"features": identity, "crop": crop, "files": digest_files((f.name, f) for f in files)}
    part = out.with_suffix(".part")
    with RowFile(part, subject) as kept, progress("real pictures", len(files)) as bar:
        bar.advance(len(kept.rows))
        missing = [n for n in range(len(files)) if n not in kept.rows]
        for numbers, images in _batches(files, missing, crop, batch_size):
            kept.append(numbers, feature_rows(features, images))
            bar.advance(len(numbers))
        rows = np.stack([kept.rows[n] for n in range(len(files))])
    if not np.isfinite(rows).all():
        raise MixDQError(f"features of {files[int(np.flatnonzero(~np.isfinite(rows).all(1))[0])]} are not finite")
    found = Gaussian.of(rows)
    found.save(out, identity)
    part.unlink()
    return found


def _batches(
    files: Sequence[Path], missing: Sequence[int], crop: int | None, batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Batches of adjacent pictures of equal size, at most ``batch_size`` each."""
    numbers: list[int] = []
    images: list[Tensor] = []
    for number in missing:
        image = read_picture(files[number])
        if crop is not None:
            image = from_pillow(crop_to(to_pillow(image), crop))
        if numbers and (len(numbers) == batch_size or image.shape != images[0].shape):
            yield numbers, torch.stack(images)
            numbers, images = [], []
        numbers.append(number)
        images.append(image)
    if numbers:
        yield numbers, torch.stack(images)
