"""Confidence intervals by bootstrap over pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 22  # drawn at once: 32 MiB


class Interval(NamedTuple):
    """Bounds that hold the figure of an endless number of such pictures with probability ``LEVEL``."""

    low: float
    high: float


def interval(value: float, linear: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The percentile interval of a figure whose pictures add ``linear`` [n] to it.

    A resample draws n pictures with replacement; its figure is ``value`` plus the mean of their influences. For a mean
    that is the bootstrap itself (Efron 1979); for other figures its first-order part, which leaves the bias of the
    figure alone: the figure of n pictures is compared with the same figure of n others. The same ``seed`` draws the
    same pictures, whatever the figure.
    """
    count = len(linear)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, CHUNK // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = linear[rng.integers(0, count, (size, count))].mean(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(value + float(low), value + float(high))
