"""Compares the predicted error of random schedules, the sum of their single-step errors, with the measured one.

TMPDiff (arXiv 2603.14062) assumes that the errors of steps add up. Whether they do depends on the model, the metric and
the levels.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping

import numpy as np

from ..errors import ScheduleError
from ..expect import expect
from .evaluations import Choice, Error, Evaluations
from .goal import TIE
from .plan import check_costs
from .results import Additivity
from .schedule import open_store


def check_additivity(
    error: Error,
    *,
    steps: int,
    levels: Mapping[str, float],
    schedules: int = 40,
    seed: int = 0,
    store: str | os.PathLike[str] | None = None,
    subject: str = "",
) -> Additivity:
    """Measures every step at every cheaper level, all others precise; then random schedules, levels drawn uniformly.

    Makes steps x (levels - 1) + 1 + schedules measurements. ``store`` may be the file of a ``search_schedule``.

    Raises:
        ScheduleError: fewer than three schedules, an error that is not positive or not finite.
    """
    check_costs(levels)
    check_count(schedules, steps, len(levels))
    names, draw = tuple(levels), random.Random(seed)
    with open_store(store, steps, levels, subject) as results:
        evaluate = Evaluations(error, names, store=results)
        base = evaluate((0,) * steps)
        singles = {
            name: tuple(evaluate((0,) * t + (k,) + (0,) * (steps - t - 1)) for t in range(steps))
            for k, name in enumerate(names)
            if k
        }
        drawn: dict[Choice, None] = {}
        while len(drawn) < schedules:
            choice = tuple(draw.randrange(len(names)) for _ in range(steps))
            if sum(level > 0 for level in choice) > 1:
                drawn[choice] = None
        measured = [evaluate(choice) for choice in drawn]
    predicted = [base + sum(singles[names[k]][t] - base for t, k in enumerate(c) if k) for c in drawn]
    if min(*predicted, *measured) <= 0:
        raise ScheduleError("an error is not positive, so it has no logarithm; use a metric that is 0 only where equal")
    logs = np.log([predicted, measured])
    r = math.nan if np.ptp(logs, axis=1).min() <= TIE else float(np.corrcoef(logs)[0, 1])
    ratio = float(np.median(np.array(measured) / np.array(predicted)))
    shown = tuple(evaluate.schedule(choice) for choice in drawn)
    return Additivity(shown, tuple(predicted), tuple(measured), singles, r * r, ratio)


def check_count(schedules: int, steps: int, levels: int) -> None:
    """Raises ScheduleError unless ``schedules`` is at least 3 and that many have two or more cheaper steps."""
    expect(type(schedules) is int and schedules >= 3, "schedules", schedules, "at least 3", ScheduleError)
    if levels**steps - steps * (levels - 1) - 1 < schedules:
        raise ScheduleError(f"schedules is {schedules}, but {steps} steps of {levels} levels have fewer")
