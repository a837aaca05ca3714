"""Measured errors of schedules, names of some of them, and whether errors add up; one JSON file, for reports.

    {"format": "mixdq-schedule-results", "version": 1, "metadata": {...}, "metric": "1 - SSIM",
     "levels": [{"name": "16", "cost": 1.0}, ...],
     "measured": {"0 0 1 2": 0.0123, ...},
     "named": {"found at 0.25": "0 0 1 2", ...},
     "additivity": {"1 - SSIM": {"singles": {...}, "schedules": [...], "predicted": [...], ...}}}

A schedule is written as the index of each step's level in ``levels`` (0: the most precise).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..document import Document
from ..errors import ScheduleError
from .plan import check_costs

KEYS = ("format", "version", "metadata", "metric", "levels", "measured", "named", "additivity")
Steps = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Additivity:
    """Predicted errors (sums of single-step errors) and measured errors of random schedules.

    Attributes:
        schedules: the random schedules; predicted, measured: their errors.
        singles: {level: error of each step at that level, all others precise}.
        r_squared: squared Pearson correlation of log measured and log predicted; 1 if errors add up, apart from a
            common power and factor; NaN (null in a file) if all predictions or all measurements are equal.
        ratio: median of measured / predicted; above 1 if the errors of steps correlate positively.
    """

    schedules: tuple[tuple[str, ...], ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    singles: Mapping[str, tuple[float, ...]]
    r_squared: float
    ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleResults(Document):
    """The measurements of one model.

    Attributes:
        levels: {name: relative cost of a step}, precise first.
        metric: what the errors are, in words.
        measured: {schedule: error}, all for one number of steps.
        named: {name: schedule}, each of them measured: "found at 0.25", "uniform W4A8", "last W8A8/W4A8", ...
        additivity: {what was compared: result}.
    """

    FORMAT, VERSION, ERROR = "mixdq-schedule-results", 1, ScheduleError
    levels: Mapping[str, float]
    metric: str
    measured: Mapping[Steps, float]
    named: Mapping[str, Steps] = field(default_factory=dict)
    additivity: Mapping[str, Additivity] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", check_costs(self.levels))
        if not self.measured:
            raise ScheduleError("measured is empty, expected the error of at least one schedule")
        for steps, error in self.measured.items():
            if len(steps) != self.steps or not set(steps) <= set(self.levels):
                raise ScheduleError(
                    f"schedule {' '.join(steps)!r}: expected {self.steps} levels out of {', '.join(self.levels)}"
                )
            if type(error) not in (int, float) or not abs(error) < 1e300:
                raise ScheduleError(f"schedule {' '.join(steps)!r}: error is {error!r:.60}, expected a finite number")
        for name, steps in self.named.items():
            if steps not in self.measured:
                raise ScheduleError(f"named {name!r}: schedule {' '.join(steps)!r} was not measured")

    @property
    def steps(self) -> int:
        return len(next(iter(self.measured)))

    def cost(self, steps: Steps) -> float:
        """Mean relative cost of a step."""
        return sum(self.levels[name] for name in steps) / len(steps)

    def step_errors(self) -> dict[str, list[tuple[float, int]]]:
        """{level: (error, n) of each step}, for the levels that have been measured at every step.

        The error of a step comes from the shortest measured interval that holds it: n adjacent steps at that level, all
        others at the most precise one. It is divided evenly among them; n is 1 if the step was measured by itself.
        """
        precise = next(iter(self.levels))
        base = self.measured.get((precise,) * self.steps, 0.0)
        found: dict[str, list[tuple[float, int]]] = {}
        for steps, error in sorted(self.measured.items(), key=lambda item: item[0].count(precise)):
            places = [i for i, name in enumerate(steps) if name != precise]
            level = steps[places[0]] if places else precise
            if not places or set(steps[places[0] : places[-1] + 1]) != {level}:
                continue  # not one interval at one level
            shares = found.setdefault(level, [(math.nan, self.steps + 1)] * self.steps)
            for place in places:
                shares[place] = (max(error - base, 0.0) / len(places), len(places))
        order = [name for name in self.levels if name in found]
        return {n: found[n] for n in order if not any(math.isnan(e) for e, _ in found[n])}

    def to_json(self) -> dict[str, Any]:
        places = {name: str(i) for i, name in enumerate(self.levels)}

        def text(steps: Steps) -> str:
            return " ".join(places[n] for n in steps)

        return {
            **self.header(),
            "metric": self.metric,
            "levels": [{"name": n, "cost": c} for n, c in self.levels.items()],
            "measured": {text(s): e for s, e in self.measured.items()},
            "named": {n: text(s) for n, s in self.named.items()},
            "additivity": {
                n: {f.name: getattr(a, f.name) for f in fields(Additivity)}
                | {"schedules": [text(s) for s in a.schedules], "r_squared": self._jsonable(a.r_squared, "r_squared")}
                for n, a in self.additivity.items()
            },
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ScheduleResults:
        _keys("", document, KEYS)
        for name, kind in (("metadata", dict), ("metric", str), ("levels", list), ("measured", dict), ("named", dict)):
            if not isinstance(document[name], kind):
                raise ScheduleError(f"{name} is {document[name]!r:.60}, expected {kind.__name__}")
        levels = {}
        for i, level in enumerate(document["levels"]):
            _keys(f"levels, {i}: ", level, ("name", "cost"))
            if not isinstance(level["name"], str) or level["name"] in levels:
                raise ScheduleError(f"levels, {i}: name is {level['name']!r:.60}, expected a text of its own")
            levels[level["name"]] = level["cost"]
        steps = _Reader(levels)
        if not isinstance(document["additivity"], dict):
            raise ScheduleError(f"additivity is {document['additivity']!r:.60}, expected an object")
        return cls(
            levels=levels,
            metric=document["metric"],
            measured={steps(s): e for s, e in document["measured"].items()},
            named={n: steps(s) for n, s in document["named"].items()},
            additivity={n: _additivity(n, a, steps) for n, a in document["additivity"].items()},
            metadata=document["metadata"],
        )


class _Reader:
    """Reads schedules from text: "0 0 2" is ("16", "16", "W4A8")."""

    def __init__(self, levels: Mapping[str, float]) -> None:
        self.names = {str(i): name for i, name in enumerate(levels)}

    def __call__(self, text: object) -> Steps:
        try:
            return tuple(self.names[place] for place in str(text).split(" "))
        except KeyError:
            raise ScheduleError(
                f"schedule {text!r:.60}: expected places of levels, 0 to {len(self.names) - 1}, one a step"
            ) from None


def _additivity(name: str, value: object, steps: _Reader) -> Additivity:
    where = f"additivity, {name!r}: "
    found = _keys(where, value, tuple(f.name for f in fields(Additivity)))
    schedules, singles = found["schedules"], found["singles"]
    if not isinstance(schedules, list) or not isinstance(singles, dict):
        raise ScheduleError(f"{where}expected a list of schedules and an object of singles")
    for part in ("predicted", "measured", *singles):
        _numbers(f"{where}{part}", singles[part] if part in singles else found[part])
    if not len(schedules) == len(found["predicted"]) == len(found["measured"]) > 0:
        raise ScheduleError(f"{where}schedules, predicted and measured differ in length")
    r_squared = math.nan if found["r_squared"] is None else found["r_squared"]
    _numbers(f"{where}r_squared and ratio", [found["ratio"], *([] if found["r_squared"] is None else [r_squared])])
    return Additivity(
        tuple(steps(s) for s in schedules),
        tuple(found["predicted"]),
        tuple(found["measured"]),
        {n: tuple(v) for n, v in singles.items()},
        r_squared,
        found["ratio"],
    )


def _numbers(where: str, values: object) -> None:
    if not isinstance(values, list) or not all(type(v) in (int, float) and abs(v) < 1e300 for v in values):
        raise ScheduleError(f"{where}: expected finite numbers, found {values!r:.60}")


def _keys(where: str, value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """``value``, which must be an object with exactly these keys. Raises ScheduleError."""
    if not isinstance(value, dict) or set(value) != set(keys):
        found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise ScheduleError(f"{where}is {found}, expected an object with exactly {', '.join(keys)}")
    return value
