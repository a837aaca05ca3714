"""TemporalPlan: the precision of each denoising step. Stored as one readable JSON file; nothing is unpickled."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..document import Document
from ..errors import PlanError, ScheduleError
from ..expect import located, whole
from ..plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from ..search.calibration import Calibration

KEYS = ("format", "version", "metadata", "levels", "steps")


@dataclass(frozen=True, slots=True)
class TemporalPlan(Document):
    """A precision for every step of a scheduler (the idea of TMPDiff, arXiv 2603.14062).

    Attributes:
        levels: {name: Plan, or None for 16 bit}, precise first.
        steps: the level of each denoising step, first step (most noise) first.
        costs: {name: relative cost of a step} for every level, falling; None if costs are not known.
    """

    FORMAT, VERSION, ERROR = "mixdq-temporal-plan", 1, ScheduleError
    levels: Mapping[str, Plan | None]
    steps: tuple[str, ...]
    costs: Mapping[str, float] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.levels:
            raise ScheduleError("levels is empty, expected at least one {name: Plan, or None for 16 bit}")
        for name, plan in self.levels.items():
            if not isinstance(name, str) or not name:
                raise ScheduleError(f"level {name!r}: expected a non-empty text as name")
            if plan is not None and not isinstance(plan, Plan):
                raise ScheduleError(f"level {name!r} is {type(plan).__name__}, expected a Plan, or None for 16 bit")
        if isinstance(self.steps, str) or not self.steps:
            raise ScheduleError(f"steps is {self.steps!r}, expected a level name for each of one or more steps")
        object.__setattr__(self, "steps", tuple(self.steps))
        for i, name in enumerate(self.steps):
            if name not in self.levels:
                raise ScheduleError(f"step {i}: level is {name!r}, expected one of {', '.join(self.levels)}")
        if self.costs is not None:
            if list(self.costs) != list(self.levels):
                raise ScheduleError(f"costs are of {list(self.costs)}, expected of {list(self.levels)}, in that order")
            object.__setattr__(self, "costs", check_costs(self.costs))

    @property
    def cost(self) -> float | None:
        """Mean relative cost of a step; None if costs are not known."""
        return None if self.costs is None else sum(self.costs[n] for n in self.steps) / len(self.steps)

    @property
    def counts(self) -> dict[str, int]:
        """Number of steps at each level, in the order of the levels; 0 for unused ones."""
        used = Counter(self.steps)
        return {name: used[name] for name in self.levels}

    def to_json(self) -> dict[str, Any]:
        levels = [
            {"name": name, "cost": None if self.costs is None else self.costs[name], "plan": plan and plan.to_json()}
            for name, plan in self.levels.items()
        ]
        return {**self.header(), "levels": levels, "steps": list(self.steps)}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TemporalPlan:
        unknown = set(document) - set(KEYS)
        if unknown:
            raise ScheduleError(f"unknown key {min(unknown)!r}; expected {', '.join(KEYS)}")
        metadata, levels, steps = (document.get(n) for n in ("metadata", "levels", "steps"))
        if not isinstance(metadata, dict):
            raise ScheduleError(f"metadata is {type(metadata).__name__}, expected an object")
        if not isinstance(levels, list) or not all(isinstance(v, dict) for v in levels):
            raise ScheduleError("levels is no list of objects, expected [{name, cost, plan}, ...], precise first")
        if not isinstance(steps, list) or not all(isinstance(s, str) for s in steps):
            raise ScheduleError(f"steps is {steps!r}, expected a list of level names")
        read = [_level_from_json(i, v) for i, v in enumerate(levels)]
        names = [name for name, _, _ in read]
        if len(set(names)) < len(names):
            raise ScheduleError(f"levels name {Counter(names).most_common(1)[0][0]!r} twice")
        costs = {name: cost for name, cost, _ in read}
        missing = [name for name, cost in costs.items() if cost is None]
        if missing and len(missing) < len(costs):
            raise ScheduleError(f"level {missing[0]!r}: cost is null, expected a number for every level or for none")
        known = None if missing else costs
        return cls({name: plan for name, _, plan in read}, tuple(steps), known, metadata)  # type: ignore[arg-type]

    def validate(self, steps: int, model: nn.Module | None = None) -> None:
        """Raises ScheduleError unless this plan is for ``steps`` steps; with a model, PlanError unless every level fits
        it."""
        if steps != len(self.steps):
            raise ScheduleError(
                f"the plan is for {len(self.steps)} steps, the scheduler runs {steps}; "
                f"use plan.resampled({steps}), or search a schedule for {steps} steps"
            )
        if model is None:
            return
        for name, plan in self.levels.items():
            if plan is not None:
                with located(f"level {name!r}", PlanError):
                    plan.validate(model)

    def resampled(self, steps: int) -> TemporalPlan:
        """The plan stretched or shrunk to another number of steps. Warns that its error there was not measured.

        Each new step takes the level of the old step at the same fraction of the run. The first and the last step,
        which most often need a precision of their own, keep their levels; a single step has the level of the last.
        """
        whole(steps, "steps", error=ScheduleError)
        old = len(self.steps)
        if steps == old:
            return self
        warnings.warn(
            f"the schedule was found for {old} steps and is resampled to {steps}; its error there is not known: "
            f"measure it, or search for {steps} steps",
            stacklevel=2,
        )
        places = [int((i + 0.5) * old / steps) for i in range(steps)]
        places[0], places[-1] = 0, old - 1
        metadata = {**self.metadata, "resampled_from": list(self.steps)}
        return replace(self, steps=tuple(self.steps[p] for p in places), metadata=metadata)

    def with_steps(self, steps: Sequence[str]) -> TemporalPlan:
        """A copy with the same levels and another schedule."""
        return replace(self, steps=tuple(steps))

    def with_calibration(self, calibration: Calibration) -> TemporalPlan:
        """A copy whose levels take ranges, split points and BOS handling from a calibration."""
        levels = {n: p and p.with_calibration(calibration) for n, p in self.levels.items()}
        return replace(self, levels=levels)


def real(value: object) -> float:
    """A Python or NumPy number as float; NaN for anything else, booleans, and numbers outside float64."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def check_costs(costs: Mapping[str, float]) -> dict[str, float]:
    """The costs as Python floats. Raises ScheduleError unless they are positive, finite and falling."""
    found, last = {name: real(cost) for name, cost in costs.items()}, math.inf
    for name, cost in found.items():
        if not 0 < cost < 1e300:
            raise ScheduleError(f"level {name!r}: cost is {costs[name]!r}, expected a finite number > 0")
        if not cost < last:
            raise ScheduleError(
                f"level {name!r}: cost is {cost}, expected less than the {last} of the level before it: "
                "levels go from precise to cheap"
            )
        last = cost
    return found


def _level_from_json(place: int, value: dict[str, Any]) -> tuple[str, float | None, Plan | None]:
    if set(value) != {"name", "cost", "plan"}:
        raise ScheduleError(f"level {place}: has keys {sorted(value)}, expected exactly cost, name, plan")
    name, cost, plan = value["name"], value["cost"], value["plan"]
    if not isinstance(name, str) or not name:
        raise ScheduleError(f"level {place}: name is {name!r}, expected a non-empty text")
    if plan is None:
        return name, cost, None
    try:
        return name, cost, Plan.from_embedded(plan)
    except PlanError as e:
        raise ScheduleError(f"level {name!r}: plan {e}") from e
