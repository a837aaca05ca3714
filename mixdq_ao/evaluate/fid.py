"""Frechet distance to real pictures in the features of a network; with Inception v3 this is FID."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import MixDQError
from .frechet import Gaussian, distance, influence
from .metric import Batch, Metric, Rows

Features = Callable[[Tensor], Tensor]
"""uint8 pictures [B, 3, H, W] to features [B, d]."""


class FID(Metric):
    """Frechet distance between the features of the pictures and those of real ones (Heusel et al. 2017).

    With fewer pictures than features the distance is dominated by the bias of the small sample, and has no interval.
    Compare figures only at equal counts: the bias falls with 1 / n (Chong and Forsyth 2020). The statistics of the real
    pictures are taken as exact.

    Args:
        features: function from uint8 pictures [B, 3, H, W] to features [B, d].
        real: the Gaussian of the real pictures in the same features, or a function that loads it on first use.
        identity: a short text that identifies the features (a network's name and the digest of its weights).
    """

    name = "fid"
    better = "lower"

    def __init__(self, features: Features, real: Gaussian | Callable[[], Gaussian], *, identity: str = "") -> None:
        super().__init__()
        self._features, self._real, self._identity = features, real, identity

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"features": self._identity}

    @property
    def against(self) -> Mapping[str, str]:
        return {"real pictures": self.real.digest}

    @property
    def real(self) -> Gaussian:
        if not isinstance(self._real, Gaussian):
            self._real = self._real()
        return self._real

    @torch.no_grad()
    def measure(self, batch: Batch) -> Rows:
        return feature_rows(self._features, batch.images)

    def value(self, rows: Rows) -> float:
        if len(rows) < 2:
            raise MixDQError(f"fid needs two pictures at least, has {len(rows)}")
        return distance(Gaussian.of(rows), self.real)

    def linear(self, rows: Rows) -> NDArray[np.float64] | None:
        return influence(rows, self.real) if len(rows) > rows.shape[1] else None


@torch.no_grad()
def feature_rows(features: Features, images: Tensor) -> Rows:
    """Features [B, d] of uint8 pictures, float32. Raises MixDQError if the function returns another shape."""
    found = features(images)
    if found.ndim != 2 or len(found) != len(images):
        raise MixDQError(f"features are {tuple(found.shape)} for {len(images)} pictures, expected [{len(images)}, d]")
    return found.float().cpu().numpy()
