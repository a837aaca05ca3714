"""The error of a schedule from what its steps add, and from how the errors of two steps correlate.

Each step adds an error vector to the result. Powers add up where the vectors are uncorrelated; otherwise

    error = base + sum_t a[t, k_t] + 2 sum_(t < u) r[t, k_t, u, k_u] sqrt(a[t, k_t] a[u, k_u])

with a[t, k] the error of step t alone at level k, and r the correlation of two steps' vectors. That is exact for a
squared error that is linear in the vectors; for other metrics r takes up what does not add.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .evaluations import Choice

Array = NDArray[np.float64]

COMMON, OWN, SIDE, EXACT = 0.5, 0.12, 0.08, 0.12
"""Expected size of a correlation's parts: what all pairs of steps share, the pair's own, what comes with the level of
one of the two, and with both levels."""
NOISE = 0.02
"""Relative size of what no correlation explains, for an error near the best; it grows with the distance from it."""
LOWEST = 0.1
"""No schedule is predicted below this part of the sum of its steps."""


class ErrorModel:
    """Correlations by Gaussian process regression of measured errors, each relative to its size.

    Attributes:
        shares: [steps, levels], a above. base: the error with every step precise.
        cross: [pairs, levels, levels], 2 r sqrt(a a); pairs of steps as ``np.triu_indices(steps, 1)`` orders them.
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
        """Takes up a measurement; ``fit`` makes use of it."""
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
        """[measured] of a choice with every measured one."""
        same = self.choices == levels
        first, second = same[:, self.first], same[:, self.second]
        each = OWN**2 + SIDE**2 * (first.astype(float) + second) + EXACT**2 * (first & second)
        return (self.features * each) @ features + COMMON**2 * self.features.sum(1) * features.sum()

    def fit(self, scale: float) -> None:
        """Correlations from all measurements; those near the error ``scale`` count most."""
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
        """Predicted errors with one step at another level [steps, levels], and with two [pairs, levels, levels]."""
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
