"""The goal of a search: the smallest error within a cost, or the smallest cost within an error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..search.program import InfeasibleProgram, OutOfTime, solve
from .correlation import ErrorModel
from .evaluations import Choice

Array = NDArray[np.float64]

TIE = 1e-9
"""Relative tolerance for the rounding of summed costs and errors."""
OUTSIDE = 1e30
"""Schedules outside the limit have keys of at least this (``Goal.key``)."""
SECONDS = 5.0
"""Time limit of one additive program; 50 steps of 5 levels take milliseconds."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit, and the costs it is judged by.

    Attributes:
        costs: [levels], relative cost of a step at each level.
        max_cost, max_error: exactly one is given; the cost is the mean over the steps.
    """

    costs: Array
    max_cost: float | None = None
    max_error: float | None = None

    def cost(self, choice: Choice) -> float:
        return float(self.costs[list(choice)].sum()) / len(choice)

    def key(self, error: Array | float, cost: Array | float) -> Array:
        """What to minimise: the error or cost of a schedule within the limit; of one outside, at least ``OUTSIDE``,
        growing with the excess."""
        if self.max_cost is not None:
            over = np.asarray(cost) / (self.max_cost * (1 + TIE))
            return np.where(over <= 1, error, OUTSIDE * over)
        over = np.asarray(error) / max((self.max_error or 0.0) * (1 + TIE), 1e-300)
        # the error breaks ties between equal costs; its weight is too small to outweigh a difference in cost
        return np.where(
            over <= 1, cost + 1e-6 * self.costs.min() * over / (1 + over), OUTSIDE * np.minimum(over, 1e200)
        )

    def fits(self, error: float, cost: float) -> bool:
        return bool(self.key(error, cost) < OUTSIDE)

    def additive(self, shares: Array, base: float) -> Choice | None:
        """The optimal choice if errors simply added up (``shares`` [steps, levels]); None if no choice fits."""
        costs = np.broadcast_to(self.costs / len(shares), shares.shape)
        try:
            if self.max_cost is not None:
                found = solve(shares, costs[None], np.array([self.max_cost]), time_limit=SECONDS)
            else:
                limit = max((self.max_error or 0.0) * (1 + TIE) - base, 0.0)
                found = solve(costs, shares[None], np.array([limit]), time_limit=SECONDS)
        except (InfeasibleProgram, OutOfTime):
            return None
        return tuple(int(level) for level in found.choice)

    def improve(self, model: ErrorModel, choice: Choice) -> Choice:
        """Local search: changes the best one or two steps at a time while the model predicts an improvement."""
        best = float(self.key(model.predict(choice), self.cost(choice)))
        while True:
            keys = self._neighbours(model, choice)
            place = int(keys.argmin())
            if not keys[place] < best * (1 - TIE):
                return choice
            choice, best = self._changed(choice, place), float(keys[place])

    def ranked(self, model: ErrorModel, choice: Choice, count: int) -> list[Choice]:
        """The ``count`` neighbours of a choice with the best predictions, best first; only those within the limit."""
        keys = self._neighbours(model, choice)
        order = np.argsort(keys, kind="stable")[:count]
        return [self._changed(choice, int(place)) for place in order if keys[place] < OUTSIDE]

    def _neighbours(self, model: ErrorModel, choice: Choice) -> Array:
        """Keys of all choices that differ in one or two steps, flat, in the order of ``ErrorModel.neighbours``."""
        first, second = np.triu_indices(len(choice), 1)
        saved = (self.costs - self.costs[list(choice)][:, None]) / len(choice)
        pair = saved[first, :, None] + saved[second, None, :]
        errors = np.concatenate([e.ravel() for e in model.neighbours(choice)])
        return self.key(errors, self.cost(choice) + np.concatenate([saved.ravel(), pair.ravel()]))

    def _changed(self, choice: Choice, place: int) -> Choice:
        """The neighbour at an index of ``_neighbours``."""
        steps, levels, changed = len(choice), len(self.costs), list(choice)
        if place < steps * levels:
            changed[place // levels] = place % levels
        else:
            pair, both = divmod(place - steps * levels, levels**2)
            first, second = (int(side[pair]) for side in np.triu_indices(steps, 1))
            changed[first], changed[second] = divmod(both, levels)
        return tuple(changed)
