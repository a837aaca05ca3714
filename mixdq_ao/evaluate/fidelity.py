"""Similarity of pictures to those of full precision: SSIM and PSNR."""

from __future__ import annotations

from torch import Tensor

from ..search.metrics import psnr, ssim
from .metric import Batch, MeanMetric, Rows, column


class SSIM(MeanMetric):
    """Mean structural similarity to the reference pictures (see ``mixdq_ao.search.metrics.ssim``)."""

    name = "ssim"
    better = "higher"
    needs = frozenset({"reference"})

    def measure(self, batch: Batch) -> Rows:
        return column(ssim(*_pair(batch)))


class PSNR(MeanMetric):
    """Mean over pictures of the peak signal to noise ratio to the reference pictures, in dB; 100 for equal pictures.

    Both pictures are rounded to 8 bits, so differences below half a level do not count.
    """

    name = "psnr"
    unit = "dB"
    better = "higher"
    needs = frozenset({"reference"})

    def measure(self, batch: Batch) -> Rows:
        return column(psnr(*_pair(batch)))


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    assert batch.reference is not None
    return batch.images.double() / 255, batch.reference.double() / 255
