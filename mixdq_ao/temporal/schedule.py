"""Searches for a precision per denoising step with a number of measurements linear in the steps.

After TMPDiff (arXiv 2603.14062), written from its abstract. First, adaptive bisection measures intervals of steps at a
cheaper level and halves those with a large error (``intervals``). Then the schedule with the best prediction is
measured, which improves the estimated correlations of step errors (``correlation``), until no prediction is better.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from ..errors import ScheduleError
from ..expect import expect, is_number, whole
from ..search.store import Store
from .correlation import ErrorModel
from .evaluations import Choice, Error, Evaluations, LimitReached
from .forms import at_cost
from .goal import OUTSIDE, Goal
from .intervals import Bisection
from .plan import check_costs, real

CLOSE = 1.5
"""Before it ends, the search measures hand-set schedules whose predicted error (or cost) is within this factor of the
best."""
NEAR = 64
"""Neighbours of each of the best schedules that are candidates for the next measurement."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A found schedule.

    Attributes:
        levels: the level of each step, first step first.
        error: measured for exactly this schedule.
        cost: mean relative cost of a step.
        evaluations: number of schedules measured (or read from the store) to find it.
        history: {schedule: error} of all of them, in the order of measurement.
    """

    levels: tuple[str, ...]
    error: float
    cost: float
    evaluations: int
    history: Mapping[tuple[str, ...], float] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleProblem:
    """The arguments that every search takes (see ``search_schedule``), checked.

    Attributes:
        goal: what the arguments ask for.
    """

    error: Error
    steps: int
    levels: Mapping[str, float]
    max_cost: float | None = None
    max_error: float | None = None
    store: str | os.PathLike[str] | None = None
    subject: str = ""
    goal: Goal = field(init=False)

    def __post_init__(self) -> None:
        goal = check_goal(self.steps, self.levels, self.max_cost, self.max_error)
        object.__setattr__(self, "goal", goal)

    @contextmanager
    def evaluations(self, limit: int | None = None) -> Iterator[Evaluations]:
        """Measures schedules, at most ``limit`` of them; the store is locked inside the block."""
        with open_store(self.store, self.steps, self.levels, self.subject) as results:
            yield Evaluations(self.error, tuple(self.levels), limit=limit, store=results)


def evaluation_limit(steps: int, levels: int) -> int:
    """Most schedules that a search measures: 4 x steps x (levels - 1)."""
    return 4 * steps * (levels - 1)


def search_schedule(
    error: Error,
    *,
    steps: int,
    levels: Mapping[str, float],
    max_cost: float | None = None,
    max_error: float | None = None,
    store: str | os.PathLike[str] | None = None,
    subject: str = "",
    resolution: float = 0.01,
    patience: int | None = None,
) -> Schedule:
    """Finds the schedule with the smallest error within a cost, or the cheapest within an error.

    Args:
        error: ``error(schedule)``, where schedule is a tuple with the name of each step's level, compares a whole
            generation with full precision: latent MSE, 1 - SSIM, LPIPS, ... Must be deterministic.
        steps: number of denoising steps.
        levels: {name: relative cost of a step}, precise first, costs falling.
        max_cost, max_error: give one of them. The cost is the mean over the steps, so it lies between the costs of
            the cheapest and the most precise level.
        store: a file that every measurement is appended to; the same call continues from it.
        subject: says what is measured (model, prompts, metric); a store of another subject is an error.
        resolution: intervals of steps whose error is below this fraction of the expected final error are not split.
        patience: the search ends after so many measurements without improvement; default: half the steps, at least 4.

    Measures at most ``4 * steps * (len(levels) - 1)`` schedules, often half of that.

    Raises:
        ScheduleError: an argument is wrong, no schedule satisfies the limit, or the error function did not return a
            finite number.
        SensitivityError: the store cannot be used.
    """
    problem = ScheduleProblem(
        error=error,
        steps=steps,
        levels=levels,
        max_cost=max_cost,
        max_error=max_error,
        store=store,
        subject=subject,
    )
    patience = max(4, steps // 2) if patience is None else whole(patience, "patience", error=ScheduleError)
    valid = is_number(resolution) and 0 <= resolution < 1
    expect(valid, "resolution", resolution, "a number from 0 to below 1", ScheduleError)
    with problem.evaluations(evaluation_limit(steps, len(levels))) as evaluate:
        _search(evaluate, problem.goal, steps, resolution, patience)
    return best_schedule(evaluate, problem.goal)


def check_goal(steps: int, levels: Mapping[str, float], max_cost: float | None, max_error: float | None) -> Goal:
    """The goal of a search. Raises ScheduleError naming the argument, its value and what was expected."""
    whole(steps, "steps", error=ScheduleError)
    if not isinstance(levels, Mapping) or len(levels) < 2:
        raise ScheduleError(f"levels is {levels!r}, expected at least two, {{name: relative cost}}, precise first")
    costs = check_costs(levels)
    if (max_cost is None) == (max_error is None):
        raise ScheduleError("give exactly one of max_cost (mean relative cost of a step) and max_error")
    name, value = ("max_cost", max_cost) if max_error is None else ("max_error", max_error)
    limit = real(value)
    if not 0 <= limit < math.inf:
        raise ScheduleError(f"{name} is {value!r}, expected a finite number >= 0")
    lowest = min(costs.values())
    if max_cost is not None and limit < lowest * (1 - 1e-9):
        raise ScheduleError(f"max_cost is {max_cost}, but even the cheapest level everywhere costs {lowest}")
    return Goal(np.array(list(costs.values()), dtype=np.float64), **{name: limit})


def open_store(path: str | os.PathLike[str] | None, steps: int, levels: Mapping[str, float], subject: str) -> Store:
    """The store of one subject's measurements. Costs do not change errors, so they are not part of its fingerprint."""
    settings = json.dumps({"kind": "schedule", "steps": steps, "levels": list(levels), "subject": subject})
    return Store(path, hashlib.blake2b(settings.encode(), digest_size=16).hexdigest())


def _search(evaluate: Evaluations, goal: Goal, steps: int, resolution: float, patience: int) -> None:
    bisection = Bisection(evaluate, steps)
    if goal.max_error is not None and not goal.fits(bisection.base, 0.0):
        name = evaluate.names[0]
        raise ScheduleError(
            f"max_error is {goal.max_error}, but level {name!r} at every step already has an error of {bisection.base}"
        )
    if goal.max_cost is not None and goal.fits(0.0, goal.cost((0,) * steps)):
        return  # every step at the most precise level
    try:
        bisection.refine(lambda shares: _expected(goal, shares, bisection.base), resolution)
        _polish(evaluate, goal, bisection, patience)
    except LimitReached:
        pass


def _expected(goal: Goal, shares: np.ndarray, base: float) -> float:
    """The expected error of the schedule to be found, if errors add up."""
    if goal.max_error is not None:
        return goal.max_error
    choice = goal.additive(shares, base)
    return base + (0.0 if choice is None else float(shares[np.arange(len(shares)), list(choice)].sum()))


def _polish(evaluate: Evaluations, goal: Goal, bisection: Bisection, patience: int) -> None:
    """Alternates descent with measurements of promising hand-set schedules, until neither improves on the best."""
    model = ErrorModel(bisection.shares(), bisection.base)
    for choice, error in evaluate.measured.items():
        model.learn(choice, error)
    additive = goal.additive(model.shares, model.base)
    known = [c for c in (additive, *at_cost(goal, bisection.steps).values()) if c is not None]
    while True:
        _descend(evaluate, goal, model, known, patience)
        best = _best(evaluate, goal)
        for choice in _rivals(evaluate, goal, model, known):
            model.learn(choice, evaluate(choice))
        if _best(evaluate, goal) == best:
            return


def _descend(evaluate: Evaluations, goal: Goal, model: ErrorModel, known: list[Choice], patience: int) -> None:
    """Measures the schedule with the best prediction and refits the model, until ``patience`` measurements in a row
    improved on the best by less than 0.1 %."""
    fruitless = 0
    while fruitless < patience:
        best = _best(evaluate, goal)
        model.fit(evaluate.measured[best])
        tops = {goal.improve(model, c) for c in (best, *known[:1])}
        near = {n for c in (best, *tops) for n in goal.ranked(model, c, NEAR)}
        candidates = {c: _predicted(goal, model, c) for c in {*tops, *near, *known} - set(evaluate.measured)}
        chosen = min(candidates, key=lambda c: (candidates[c], c), default=None)
        if chosen is None or candidates[chosen] >= OUTSIDE:
            return
        before = _key(goal, evaluate, best)
        model.learn(chosen, evaluate(chosen))
        fruitless = 0 if _key(goal, evaluate, chosen) < before * (1 - 1e-3) else fruitless + 1


def _rivals(evaluate: Evaluations, goal: Goal, model: ErrorModel, known: list[Choice]) -> list[Choice]:
    """Hand-set schedules not measured yet whose prediction is within ``CLOSE`` of the best, best prediction first."""
    most = CLOSE * _key(goal, evaluate, _best(evaluate, goal))
    predicted = {c: _predicted(goal, model, c) for c in set(known) - set(evaluate.measured)}
    return sorted((c for c, key in predicted.items() if key <= most), key=lambda c: (predicted[c], c))


def _best(evaluate: Evaluations, goal: Goal) -> Choice:
    return min(evaluate.measured, key=lambda c: _key(goal, evaluate, c))


def _key(goal: Goal, evaluate: Evaluations, choice: Choice) -> float:
    return float(goal.key(evaluate.measured[choice], goal.cost(choice)))


def _predicted(goal: Goal, model: ErrorModel, choice: Choice) -> float:
    return float(goal.key(model.predict(choice), goal.cost(choice)))


def best_schedule(evaluate: Evaluations, goal: Goal) -> Schedule:
    """The best of the measured schedules."""
    choice = _best(evaluate, goal)
    history = {evaluate.schedule(c): e for c, e in evaluate.measured.items()}
    return Schedule(evaluate.schedule(choice), evaluate.measured[choice], goal.cost(choice), len(evaluate), history)
