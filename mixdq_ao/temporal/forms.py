"""Schedules as people set them by hand: one level, or the first, the last or evenly spread steps more precise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from .evaluations import Choice
from .goal import Goal


def uniform(steps: int, level: int) -> Choice:
    """One level at every step."""
    return (level,) * steps


def first_n(steps: int, n: int, precise: int, cheap: int) -> Choice:
    """The first n steps precise."""
    return (precise,) * n + (cheap,) * (steps - n)


def last_n(steps: int, n: int, precise: int, cheap: int) -> Choice:
    """The last n steps precise."""
    return (cheap,) * (steps - n) + (precise,) * n


def spread(steps: int, n: int, precise: int, cheap: int) -> Choice:
    """n precise steps, evenly spread, each at the end of its share of the run."""
    marks = {(i + 1) * steps // n - 1 for i in range(n)}
    return tuple(precise if t in marks else cheap for t in range(steps))


FORMS = {"first": first_n, "last": last_n, "spread": spread}


def at_cost(goal: Goal, steps: int) -> dict[tuple, Choice]:
    """Hand-set schedules within ``goal.max_cost``: {("uniform", level): choice, ("last", precise, cheap): choice, ...}.

    Each pair of levels has as many precise steps as fit. Empty if the goal limits the error instead.
    """
    if goal.max_cost is None:
        return {}
    levels, found = range(len(goal.costs)), {}
    for level in levels:
        if goal.fits(0.0, goal.cost(uniform(steps, level))):
            found["uniform", level] = uniform(steps, level)
    for precise, cheap in itertools.combinations(levels, 2):
        fitting = [n for n in range(1, steps) if goal.fits(0.0, goal.cost(first_n(steps, n, precise, cheap)))]
        for name, form in FORMS.items() if fitting else ():
            found[name, precise, cheap] = form(steps, fitting[-1], precise, cheap)
    return found


def hand_names(steps: int, names: Sequence[str]) -> dict[tuple[str, ...], str]:
    """Names of all hand-set schedules, whatever their cost: {("16", "W4A8", "W4A8"): "first 1 16/W4A8", ...}."""
    found = {uniform(steps, level): f"uniform {name}" for level, name in enumerate(names)}
    for precise, cheap in itertools.combinations(range(len(names)), 2):
        for (form, make), n in itertools.product(FORMS.items(), range(1, steps)):
            found.setdefault(make(steps, n, precise, cheap), f"{form} {n} {names[precise]}/{names[cheap]}")
    return {tuple(names[level] for level in choice): name for choice, name in found.items()}
