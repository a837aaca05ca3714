"""Baselines for ``search_schedule``: exhaustive search, greedy search, and the schedules people set by hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Required, TypedDict, Unpack

from ..errors import ScheduleError
from .evaluations import Choice, Error, Evaluations
from .forms import at_cost
from .goal import Goal
from .schedule import Schedule, ScheduleProblem, best_schedule

MOST = 20_000
"""Most schedules that ``exhaustive`` measures."""


class Arguments(TypedDict, total=False):
    """Keyword arguments of a search, as for ``search_schedule``."""

    steps: Required[int]
    levels: Required[Mapping[str, float]]
    max_cost: float | None
    max_error: float | None
    store: str | os.PathLike[str] | None
    subject: str


def exhaustive(error: Error, **arguments: Unpack[Arguments]) -> Schedule:
    """The optimum, found by measuring every schedule within the cost."""
    problem = ScheduleProblem(error=error, **arguments)
    goal, steps, levels = problem.goal, problem.steps, len(problem.levels)
    if levels**steps > MOST:
        raise ScheduleError(
            f"{levels} levels at {steps} steps are {levels**steps} schedules, expected at most {MOST}; "
            "use search_schedule"
        )
    with problem.evaluations() as evaluate:
        for choice in itertools.product(range(levels), repeat=steps):
            if goal.max_cost is None or goal.fits(0.0, goal.cost(choice)):
                evaluate(choice)
    return best_schedule(evaluate, goal)


def greedy(error: Error, **arguments: Unpack[Arguments]) -> Schedule:
    """Greedy descent: starts with every step at the most precise level, and changes one step at a time, the one that
    adds the least error per cost saved.

    Measures every such change each time: up to (steps x (levels - 1))^2 / 2 schedules.
    """
    problem = ScheduleProblem(error=error, **arguments)
    with problem.evaluations() as evaluate:
        _descend(evaluate, problem.goal, (0,) * problem.steps)
    return best_schedule(evaluate, problem.goal)


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
    """Measures every schedule a person would set within the cost: {"uniform W8A8", "last W8A8/W4A8", ...}.

    These are each level at all steps, where that fits; and for each pair of levels the first, the last or evenly
    spread n steps at the more precise one, with the largest n that fits.
    """
    problem = ScheduleProblem(error=error, steps=steps, levels=levels, max_cost=max_cost, store=store, subject=subject)
    names, goal = tuple(levels), problem.goal
    found = {}
    with problem.evaluations() as evaluate:
        for (form, *used), choice in at_cost(goal, steps).items():
            label = f"{form} {'/'.join(names[k] for k in used)}"
            found[label] = Schedule(evaluate.schedule(choice), evaluate(choice), goal.cost(choice), 1)
    return found
