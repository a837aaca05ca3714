"""What a search is for: the smallest error within a cost, or the smallest cost within an error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..search.program import InfeasibleProgram, OutOfTime, solve
from .correlation import ErrorModel
from .evaluations import Choice

Array = NDArray[np.float64]

TIE = 1e-9
"""Relative rounding of summed costs and errors that must not decide."""
OUTSIDE = 1e30
"""Keys from here on are of schedules outside the limit."""
SECONDS = 5.0
"""For one additive program; 50 steps of 5 levels take milliseconds."""


@dataclass(frozen=True, slots=True)
class Goal:
    """costs: [levels] relative cost of a step; exactly one of max_cost (mean over the steps) and max_error."""

    costs: Array
    max_cost: float | None = None
    max_error: float | None = None

    def cost(self, choice: Choice) -> float:
        return float(self.costs[list(choice)].sum()) / len(choice)

    def key(self, error: Array | float, cost: Array | float) -> Array:
        """Lower is better. Outside the limit: a number above all inside, by how far outside."""
        if self.max_cost is not None:
            over = np.asarray(cost) / (self.max_cost * (1 + TIE))
            return np.where(over <= 1, error, OUTSIDE * over)
        over = np.asarray(error) / max((self.max_error or 0.0) * (1 + TIE), 1e-300)
        # among equally cheap ones the smaller error, without ever outweighing a difference in cost
        return np.where(
            over <= 1, cost + 1e-6 * self.costs.min() * over / (1 + over), OUTSIDE * np.minimum(over, 1e200)
        )

    def fits(self, error: float, cost: float) -> bool:
        return bool(self.key(error, cost) < OUTSIDE)

    def additive(self, shares: Array, base: float) -> Choice | None:
        """The optimal choice if errors simply added up, in any unit; None where none fits."""
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
        """Changes one or two steps at a time while the model says it is better."""
        best = float(self.key(model.predict(choice), self.cost(choice)))
        while True:
            keys = self._neighbours(model, choice)
            place = int(keys.argmin())
            if not keys[place] < best * (1 - TIE):
                return choice
            choice, best = self._changed(choice, place), float(keys[place])

    def ranked(self, model: ErrorModel, choice: Choice, count: int) -> list[Choice]:
        """The ``count`` best neighbours of a choice within the limit, best first."""
        keys = self._neighbours(model, choice)
        order = np.argsort(keys, kind="stable")[:count]
        return [self._changed(choice, int(place)) for place in order if keys[place] < OUTSIDE]

    def _neighbours(self, model: ErrorModel, choice: Choice) -> Array:
        """Keys of all choices with one or two steps changed, flat (see ``ErrorModel.neighbours``)."""
        first, second = np.triu_indices(len(choice), 1)
        saved = (self.costs - self.costs[list(choice)][:, None]) / len(choice)
        pair = saved[first, :, None] + saved[second, None, :]
        errors = np.concatenate([e.ravel() for e in model.neighbours(choice)])
        return self.key(errors, self.cost(choice) + np.concatenate([saved.ravel(), pair.ravel()]))

    def _changed(self, choice: Choice, place: int) -> Choice:
        """The choice at a place of ``_neighbours``."""
        steps, levels, changed = len(choice), len(self.costs), list(choice)
        if place < steps * levels:
            changed[place // levels] = place % levels
        else:
            pair, both = divmod(place - steps * levels, levels**2)
            first, second = (int(side[pair]) for side in np.triu_indices(steps, 1))
            changed[first], changed[second] = divmod(both, levels)
        return tuple(changed)
