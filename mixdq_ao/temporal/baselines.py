"""What a found schedule is compared with: exhaustive and greedy search, and schedules as people set them by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping

from ..errors import ScheduleError
from .evaluations import Choice, Error, Evaluations
from .forms import at_cost
from .goal import Goal
from .schedule import Schedule, best_schedule, check_goal, open_store

MOST = 20_000
"""Schedules that ``exhaustive`` is willing to measure."""


def exhaustive(
    error: Error,
    *,
    steps: int,
    levels: Mapping[str, float],
    max_cost: float | None = None,
    max_error: float | None = None,
    store: str | os.PathLike[str] | None = None,
    subject: str = "",
) -> Schedule:
    """The optimum, by measuring every schedule within the cost (arguments as ``search_schedule``)."""
    goal = check_goal(steps, levels, max_cost, max_error)
    if len(levels) ** steps > MOST:
        raise ScheduleError(
            f"{len(levels)} levels at {steps} steps are {len(levels) ** steps} schedules, expected at most {MOST}; "
            "use search_schedule"
        )
    with open_store(store, steps, levels, subject) as results:
        evaluate = Evaluations(error, tuple(levels), store=results)
        for choice in itertools.product(range(len(levels)), repeat=steps):
            if goal.max_cost is None or goal.fits(0.0, goal.cost(choice)):
                evaluate(choice)
    return best_schedule(evaluate, goal)


def greedy(
    error: Error,
    *,
    steps: int,
    levels: Mapping[str, float],
    max_cost: float | None = None,
    max_error: float | None = None,
    store: str | os.PathLike[str] | None = None,
    subject: str = "",
) -> Schedule:
    """From all precise, always the change of one step that costs least error per saving (arguments as
    ``search_schedule``). Measures every such change at every turn: up to (steps x (levels - 1))^2 / 2 schedules."""
    goal = check_goal(steps, levels, max_cost, max_error)
    with open_store(store, steps, levels, subject) as results:
        evaluate = Evaluations(error, tuple(levels), store=results)
        _descend(evaluate, goal, (0,) * steps)
    return best_schedule(evaluate, goal)


def _descend(evaluate: Evaluations, goal: Goal, choice: Choice) -> None:
    here = evaluate(choice)
    while goal.max_cost is None or not goal.fits(0.0, goal.cost(choice)):
        slopes = {}
        for t, level in enumerate(choice):
            for cheaper in range(level + 1, len(goal.costs)):
                changed = choice[:t] + (cheaper,) + choice[t + 1 :]
                if goal.max_error is None or goal.fits(evaluate(changed), 0.0):
                    saving = goal.cost(choice) - goal.cost(changed)
                    slopes[changed] = (evaluate(changed) - here) / saving
        if not slopes:
            return
        choice = min(slopes, key=lambda c: (slopes[c], c))
        here = evaluate(choice)


def hand_set(
    error: Error,
    *,
    steps: int,
    levels: Mapping[str, float],
    max_cost: float,
    store: str | os.PathLike[str] | None = None,
    subject: str = "",
) -> dict[str, Schedule]:
    """Every schedule a person would set within the cost, measured: {"uniform W8A8", "last W8A8/W4A8", ...}.

    A uniform level where it fits; first, last and spread n steps at one level with the others at a cheaper one, for
    each pair of levels with the largest n that fits.
    """
    goal = check_goal(steps, levels, max_cost, None)
    names = tuple(levels)
    with open_store(store, steps, levels, subject) as results:
        evaluate = Evaluations(error, names, store=results)
        found = {}
        for (form, *used), choice in at_cost(goal, steps).items():
            label = f"{form} {'/'.join(names[k] for k in used)}"
            schedule = evaluate.schedule(choice)
            found[label] = Schedule(schedule, evaluate(choice), goal.cost(choice), 1)
    return found
