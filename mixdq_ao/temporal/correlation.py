"""Predicts the error of a schedule from the errors of its single steps and the correlations between pairs of steps.

Each step adds an error vector to the result. The powers of uncorrelated vectors add up; in general

    error = base + sum_t a[t, k_t] + 2 sum_(t < u) r[t, k_t, u, k_u] sqrt(a[t, k_t] a[u, k_u])

where a[t, k] is the error that step t alone adds at level k, and r the correlation of the vectors of two steps. This is
exact where the metric is the squared norm of the sum; for other metrics r absorbs whatever does not add up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .evaluations import Choice

Array = NDArray[np.float64]

COMMON, OWN, SIDE, EXACT = 0.5, 0.12, 0.08, 0.12
"""Prior standard deviations of the four terms of a correlation: one shared by all pairs of steps, one per pair, one per
pair and the level of one of its steps, one per pair and both levels.

These priors, ``NOISE`` and ``LOWEST`` are set by hand, not fitted. The result hardly depends on them: on 24 problems of
tests/temporal/errors.py (8 steps, 3 levels), a tenth or ten times any of them still finds errors within 1.6 % of the
optimum, in 35 measurements on average."""
NOISE = 0.02
"""Relative standard deviation of the unexplained part of errors near the best; larger for other errors (``fit``)."""
LOWEST = 0.1
"""Predictions are at least this fraction of the sum of single-step errors: correlations cannot cancel all of it."""


class ErrorModel:
    """Estimates correlations by Gaussian process regression on measured errors, each relative to its size.

    Attributes:
        shares: [steps, levels], a in the formula above.
        base: the error with every step precise.
        cross: [pairs, levels, levels], 2 r sqrt(a a); pairs of steps in the order of ``np.triu_indices(steps, 1)``.
    """

    def __init__(self, shares: Array, base: float) -> None:
        self.shares, self.base = shares, base
        steps, levels = shares.shape
        self.first, self.second = np.triu_indices(steps, 1)
        roots = np.sqrt(shares)
        self.products = 2 * roots[self.first, :, None] * roots[self.second, None, :]
        self.cross = np.zeros_like(self.products)
        self.choices = np.zeros((0, steps), dtype=np.int64)
        self.errors, self.target = np.zeros(0), np.zeros(0)
        self.features = np.zeros((0, len(self.first)))
        self.kernel = np.zeros((0, 0))

    def learn(self, choice: Choice, error: float) -> None:
        """Adds a measurement, which ``fit`` uses."""
        total, shared = error - self.base, float(self._shares(choice).sum())
        size = max(total, shared)
        if size <= 0:
            return  # every step precise
        pairs, levels = np.arange(len(self.first)), np.array(choice)
        new = self.products[pairs, levels[self.first], levels[self.second]] / size
        self.choices = np.vstack([self.choices, levels])
        self.features = np.vstack([self.features, new])
        self.errors = np.append(self.errors, size)
        self.target = np.append(self.target, (total - shared) / size)
        row = self._covariance(new, levels)
        self.kernel = np.block([[self.kernel, row[:-1, None]], [row[None, :-1], row[-1]]])

    def _covariance(self, features: Array, levels: NDArray[np.int64]) -> Array:
        """[measured]: prior covariance of a choice's error with every measured one, the noise left out."""
        same = self.choices == levels
        first, second = same[:, self.first], same[:, self.second]
        each = OWN**2 + SIDE**2 * (first.astype(float) + second) + EXACT**2 * (first & second)
        return (self.features * each) @ features + COMMON**2 * self.features.sum(1) * features.sum()

    def fit(self, scale: float) -> None:
        """Estimates ``cross`` from all measurements; those near the error ``scale`` weigh most."""
        if not len(self.errors):
            return
        distance = np.abs(np.log(self.errors / max(scale - self.base, self.errors.min())))
        noise = NOISE**2 * (1 + distance) ** 2
        solved = np.linalg.solve(self.kernel + np.diag(noise), self.target)
        weight = np.zeros_like(self.cross)
        pairs = np.broadcast_to(np.arange(len(self.first)), self.features.shape)
        index = (pairs, self.choices[:, self.first], self.choices[:, self.second])
        np.add.at(weight, index, solved[:, None] * self.features)
        whole = weight.sum((1, 2), keepdims=True)
        sides = weight.sum(1, keepdims=True) + weight.sum(2, keepdims=True)
        common = COMMON**2 * float(self.features.sum(1) @ solved)
        self.cross = self.products * (OWN**2 * whole + SIDE**2 * sides + EXACT**2 * weight + common)

    def _shares(self, choice: Choice) -> Array:
        return self.shares[np.arange(len(choice)), list(choice)]

    def predict(self, choice: Choice) -> float:
        shared = float(self._shares(choice).sum())
        levels = np.array(choice)
        crossed = self.cross[np.arange(len(self.first)), levels[self.first], levels[self.second]].sum()
        return self.base + max(shared + float(crossed), LOWEST * shared)

    def neighbours(self, choice: Choice) -> tuple[Array, Array]:
        """Predicted errors of the choices that differ in one step [steps, levels] or in two [pairs, levels, levels]."""
        levels, pairs = np.array(choice), np.arange(len(self.first))
        a, b = levels[self.first], levels[self.second]
        row, column, here = self.cross[pairs, :, b], self.cross[pairs, a, :], self.cross[pairs, a, b]
        single = np.zeros_like(self.shares)
        np.add.at(single, self.first, row - here[:, None])
        np.add.at(single, self.second, column - here[:, None])
        power = self.shares - self._shares(choice)[:, None]
        both = self.cross - row[:, :, None] - column[:, None, :] + here[:, None, None]
        shared = self._shares(choice).sum()
        one_shared = shared + power
        two_shared = one_shared[self.first, :, None] + power[self.second, None, :]
        crossed = float(here.sum())
        one = one_shared + crossed + single
        two = two_shared + crossed + single[self.first, :, None] + single[self.second, None, :] + both
        return self.base + np.maximum(one, LOWEST * one_shared), self.base + np.maximum(two, LOWEST * two_shared)
