"""Confidence intervals by bootstrap over pictures."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
CHUNK = 1 << 22  # drawn at once: 32 MiB


class Interval(NamedTuple):
    """A confidence interval at ``LEVEL`` for the figure of infinitely many such pictures."""

    low: float
    high: float


def interval(value: float, linear: NDArray[np.float64], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The percentile interval of a figure ``value``, given the influence ``linear`` [n] of each picture on it.

    A resample draws n pictures with replacement; its figure is ``value`` plus the mean of their influences. For a mean
    this is the bootstrap itself (Efron 1979); for other figures it is its first-order approximation, which does not
    correct the bias: the figure of n pictures estimates that of n other pictures. The same ``seed`` draws the same
    pictures, whatever the figure.
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
