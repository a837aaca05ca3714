"""Collects everything that searches measured on one model, for a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .forms import hand_names
from .results import Additivity, ScheduleResults
from .schedule import Schedule


def results_of(
    found: Sequence[Schedule],
    levels: Mapping[str, float],
    metric: str,
    *,
    also: Iterable[Schedule] = (),
    added: Additivity | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ScheduleResults:
    """The measurements of the searches in ``found``, of the ``also`` schedules and of a check of additivity, together.

    Schedules that people set by hand are listed under their names ("last 2 W8A8/W4A8").
    """
    measured = {s: e for schedule in found for s, e in schedule.history.items()}
    measured |= {schedule.levels: schedule.error for schedule in also}
    precise = next(iter(levels))
    if added is not None:
        measured |= zip(added.schedules, added.measured, strict=True)
        steps = len(added.schedules[0])
        for name, errors in added.singles.items():
            measured |= {(precise,) * t + (name,) + (precise,) * (steps - t - 1): e for t, e in enumerate(errors)}
    by_hand = hand_names(len(next(iter(measured))), list(levels)) if measured else {}
    named = {by_hand[schedule]: schedule for schedule in measured if schedule in by_hand}
    named |= {f"found at {schedule.cost:.3g}": schedule.levels for schedule in found}
    checks = {} if added is None else {metric: added}
    return ScheduleResults(
        levels=levels, metric=metric, measured=measured, named=named, additivity=checks, metadata=metadata or {}
    )
