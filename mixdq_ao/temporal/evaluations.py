"""Measurements of schedules: checked, counted against a limit, and kept in an append-only store."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from ..errors import ScheduleError
from ..search.store import Store

Error = Callable[[tuple[str, ...]], float]
Choice = tuple[int, ...]
"""The index of each step's level (0: the most precise)."""


class LimitReached(Exception):
    """The next evaluation would exceed the limit. Caught inside this package."""


class Evaluations:
    """Measures the error of each requested schedule once.

    Attributes:
        measured: {choice: error} in the order of the requests, results from the store included: a search that was
            stopped and continued takes the same decisions as one that was not.
        new: how many were measured now rather than read from the store.
    """

    def __init__(self, error: Error, names: Sequence[str], *, limit: int | None = None, store: Store) -> None:
        self.error, self.names, self.limit, self.store = error, tuple(names), limit, store
        self.measured: dict[Choice, float] = {}
        self.new = 0

    def __len__(self) -> int:
        return len(self.measured)

    def schedule(self, choice: Choice) -> tuple[str, ...]:
        return tuple(self.names[level] for level in choice)

    def __call__(self, choice: Choice) -> float:
        """The error of a choice. Raises LimitReached; ScheduleError if the error is not a finite number >= 0."""
        choice = tuple(int(level) for level in choice)
        if choice in self.measured:
            return self.measured[choice]
        if self.limit is not None and len(self.measured) >= self.limit:
            raise LimitReached
        schedule = self.schedule(choice)
        key = json.dumps(schedule)
        stored = self.store.get(key)
        if stored is None:
            value = _checked(self.error(schedule), schedule)
            self.new += 1
            self.store.put(key, {"error": value})
        else:
            value = _checked(stored.get("error"), schedule)
        self.measured[choice] = value
        return value


def _checked(value: object, schedule: tuple[str, ...]) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as e:
        raise ScheduleError(
            f"the error of {' '.join(schedule)} is {value!r}, expected a number; the error function is at fault"
        ) from e
    if not math.isfinite(number):
        raise ScheduleError(
            f"the error of {' '.join(schedule)} is {number}, expected a finite number; look at the pictures of this "
            "schedule: a level may overflow"
        )
    if number < 0:
        raise ScheduleError(
            f"the error of {' '.join(schedule)} is {number}, expected a number from 0 up; of a score that is better "
            "when higher, give how far it falls short, as 1 - SSIM"
        )
    return number
