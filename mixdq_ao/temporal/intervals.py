"""Adaptive bisection: the error of running an interval of steps at a cheaper level, split where it matters.

After TMPDiff (arXiv 2603.14062): step errors nearly add up, so that the error of an interval tells whether anything
in it is worth looking at. Written from the paper's abstract; its details may differ.
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
    """Steps ``start`` to ``stop`` - 1 at ``level``, all others at the most precise one: ``error`` above all precise."""

    level: int
    start: int
    stop: int
    error: float

    def __len__(self) -> int:
        return self.stop - self.start


class Bisection:
    """Measured intervals, whole runs first. ``base``: the error with every step precise."""

    def __init__(self, evaluate: Evaluations, steps: int) -> None:
        self.evaluate, self.steps = evaluate, steps
        self.base = evaluate((0,) * steps)
        self.leaves = [self._measure(level, 0, steps) for level in range(1, len(evaluate.names))]

    def _measure(self, level: int, start: int, stop: int) -> Interval:
        choice = (0,) * start + (level,) * (stop - start) + (0,) * (self.steps - stop)
        return Interval(level, start, stop, self.evaluate(choice) - self.base)

    def shares(self) -> Array:
        """[steps, levels] what each step adds to the error, an interval's error shared evenly by its steps."""
        shares = np.zeros((self.steps, len(self.evaluate.names)))
        for leaf in self.leaves:
            shares[leaf.start : leaf.stop, leaf.level] = max(leaf.error, 0.0) / len(leaf)
        return shares

    def refine(self, scale: Callable[[Array], float], resolution: float) -> None:
        """Halves every interval whose error exceeds ``resolution`` times the error of the answer, until none does.

        ``scale(shares)``: the error the answer is expected to have, as far as the shares tell. At most 2 steps - 1
        intervals are measured at each level.
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
