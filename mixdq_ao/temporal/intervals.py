"""Adaptive bisection: measures intervals of steps at a cheaper level, and halves those with a large error.

After TMPDiff (arXiv 2603.14062): the errors of steps nearly add up, so no step of an interval with a small error has a
large one. Written from the paper's abstract; its details may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .evaluations import Evaluations

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """Steps ``start`` to ``stop`` - 1 at ``level``, all others precise; ``error`` is that of the run minus ``base``."""

    level: int
    start: int
    stop: int
    error: float

    def __len__(self) -> int:
        return self.stop - self.start


class Bisection:
    """Intervals that cover the run at each level, each measured; at first one interval per level.

    Attributes:
        base: the error with every step precise.
        leaves: the intervals as split so far.
    """

    def __init__(self, evaluate: Evaluations, steps: int) -> None:
        self.evaluate, self.steps = evaluate, steps
        self.base = evaluate((0,) * steps)
        self.leaves = [self._measure(level, 0, steps) for level in range(1, len(evaluate.names))]

    def _measure(self, level: int, start: int, stop: int) -> Interval:
        choice = (0,) * start + (level,) * (stop - start) + (0,) * (self.steps - stop)
        return Interval(level, start, stop, self.evaluate(choice) - self.base)

    def shares(self) -> Array:
        """[steps, levels]: the error that each step adds; an interval's error is divided evenly among its steps."""
        shares = np.zeros((self.steps, len(self.evaluate.names)))
        for leaf in self.leaves:
            shares[leaf.start : leaf.stop, leaf.level] = max(leaf.error, 0.0) / len(leaf)
        return shares

    def refine(self, scale: Callable[[Array], float], resolution: float) -> None:
        """Halves every interval whose error exceeds ``resolution`` times the expected final error, until none does.

        ``scale(shares)`` estimates the error of the schedule that the search will find. At most 2 steps - 1 intervals
        are measured at each level.
        """
        while True:
            threshold = resolution * scale(self.shares())
            large = [leaf for leaf in self.leaves if len(leaf) > 1 and leaf.error > threshold]
            if not large:
                return
            for leaf in large:
                middle = (leaf.start + leaf.stop) // 2
                halves = [self._measure(leaf.level, *ends) for ends in ((leaf.start, middle), (middle, leaf.stop))]
                place = self.leaves.index(leaf)
                self.leaves[place : place + 1] = halves
