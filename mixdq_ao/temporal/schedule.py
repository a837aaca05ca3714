"""Search for a precision per denoising step with a number of measurements linear in the steps.

After TMPDiff (arXiv 2603.14062), written from its abstract. First, adaptive bisection: the error of running an
interval of steps at a cheaper level, halved where it is large. Then the schedule that should be best is computed,
measured, and what was measured teaches how the errors of steps correlate, until nothing better is expected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from ..errors import ScheduleError
from ..expect import is_number
from ..search.store import Store
from .correlation import ErrorModel
from .evaluations import Choice, Error, Evaluations, LimitReached
from .forms import at_cost
from .goal import OUTSIDE, Goal
from .intervals import Bisection
from .plan import check_costs, real

CLOSE = 1.5
"""A schedule set by hand is measured before the search ends where its predicted error is within this factor."""
NEAR = 64
"""Neighbours of the best schedules looked at for the next measurement."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A found schedule.

    Attributes:
        levels: the level of each step, first step first.
        error: as measured for exactly this schedule.
        cost: mean relative cost of a step.
        evaluations: different schedules measured (or read from the store) to find it.
        history: {schedule: error} of all of them, in the order asked.
    """

    levels: tuple[str, ...]
    error: float
    cost: float
    evaluations: int
    history: Mapping[tuple[str, ...], float] = field(default_factory=dict, repr=False)


def evaluation_limit(steps: int, levels: int) -> int:
    """No search measures more schedules than this: 4 x steps x (levels - 1)."""
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
    """The schedule with the smallest error within a cost, or the cheapest within an error.

    Args:
        error: ``error(schedule)``, schedule a tuple with a level name for each step, measures a whole generation
            against full precision: latent MSE, 1 - SSIM, LPIPS, ... Must give the same for the same schedule.
        steps: denoising steps.
        levels: {name: relative cost of a step}, precise first, costs falling.
        max_cost, max_error: give one of them; the cost is the mean over the steps, so it lies between the costs of
            the cheapest and the most precise level.
        store: a file that every measurement is appended to; the same call continues from it.
        subject: says what is measured (model, prompts, metric); a store of another subject is refused.
        resolution: intervals of steps whose error is below this part of the expected answer's are not split.
        patience: measurements without improvement before the search ends (default: half the steps, at least 4).

    Measures at most ``4 * steps * (len(levels) - 1)`` schedules, often half of that.

    Raises:
        ScheduleError: an argument is wrong, nothing can satisfy the limit, or the error function gave no finite
            number. SensitivityError: the store cannot be used.
    """
    goal = check_goal(steps, levels, max_cost, max_error)
    patience = max(4, steps // 2) if patience is None else patience
    if type(patience) is not int or patience < 1:
        raise ScheduleError(f"patience is {patience!r}, expected a whole number of at least 1")
    if not is_number(resolution) or not 0 <= resolution < 1:
        raise ScheduleError(f"resolution is {resolution!r}, expected a number from 0 to below 1")
    with open_store(store, steps, levels, subject) as results:
        evaluate = Evaluations(error, tuple(levels), limit=evaluation_limit(steps, len(levels)), store=results)
        _search(evaluate, goal, steps, resolution, patience)
    return best_schedule(evaluate, goal)


def check_goal(steps: int, levels: Mapping[str, float], max_cost: float | None, max_error: float | None) -> Goal:
    """The goal of a search. Raises ScheduleError naming the argument, its value and what was expected."""
    if type(steps) is not int or steps < 1:
        raise ScheduleError(f"steps is {steps!r}, expected a whole number of at least 1")
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
    """The store of one subject's measurements. Costs are no part of its identity: they change no error."""
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
    """The error the answer will have, as far as shares tell."""
    if goal.max_error is not None:
        return goal.max_error
    choice = goal.additive(shares, base)
    return base + (0.0 if choice is None else float(shares[np.arange(len(shares)), list(choice)].sum()))


def _polish(evaluate: Evaluations, goal: Goal, bisection: Bisection, patience: int) -> None:
    """Measures what should be best, learns from it, until ``patience`` measurements in a row brought nothing and no
    schedule set by hand is better."""
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
    """What a person might set and nobody measured, where the model does not rule it out; likely ones first."""
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
    """The best of what was measured."""
    choice = _best(evaluate, goal)
    history = {evaluate.schedule(c): e for c, e in evaluate.measured.items()}
    return Schedule(evaluate.schedule(choice), evaluate.measured[choice], goal.cost(choice), len(evaluate), history)
