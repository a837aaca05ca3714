"""The arguments of an allocation, checked and in normal form before any program is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from ..errors import AllocationError
from ..expect import expect, is_number
from ..layer_plan import ACT_BITS, WEIGHT_BITS
from .objectives import OBJECTIVES, Objective
from .sensitivity import GROUPS, Kind, Sensitivity
from .split import SPLITS

Budget = float | Mapping[str, float]
Offer = Sequence[int] | Mapping[str, Sequence[int]]


class AllocationOptions(TypedDict, total=False):
    """Keyword arguments of ``allocate`` that functions built on it take as well; ``check_request`` has the defaults."""

    weight_choices: Offer | None
    act_choices: Offer | None
    weight_splits: Sequence[float] | None
    act_splits: Sequence[float] | None
    protect: Iterable[str]
    tie: Iterable[Iterable[str]]
    time_limit: float


class SweepOptions(AllocationOptions, total=False):
    """AllocationOptions, and the objective."""

    objective: str


PUBLISHED = {"weight": {"content": (2, 4, 8), "quality": (4, 8)}, "act": {"content": (4, 8), "quality": (4, 8)}}
"""Bits offered by default for the objective "decoupled", as published."""
ALL = {"weight": (2, 4, 8), "act": (4, 8)}
"""Bits offered by default for the other objectives."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The part of a request for one kind: its budget, choices per group, and the splits to try.

    Attributes:
        budget: average bits, one number or {group: bits}; bytes in all where ``in_bytes``; None where ``fixed``.
        fixed: bits of every layer, where no program is needed.
        kept: bytes of protected layers, already subtracted from the budget.
    """

    kind: Kind
    budget: float | dict[str, float] | None
    choices: dict[str, tuple[int, ...]]
    splits: tuple[float, ...]
    in_bytes: bool = False
    fixed: int | None = None
    kept: int = 0

    @property
    def field(self) -> str:
        return "weight_bytes" if self.in_bytes else f"{self.kind}_bits"


@dataclass(frozen=True, slots=True)
class Request:
    """A checked request. ``units``: layers that share a precision, every layer outside ``protect`` exactly once."""

    sensitivity: Sensitivity
    objective: Objective
    weight: Demand
    act: Demand
    protect: frozenset[str]
    units: tuple[tuple[str, ...], ...]
    time_limit: float


def check_request(
    sensitivity: Sensitivity,
    *,
    weight_bits: Budget | None = None,
    weight_bytes: int | None = None,
    act_bits: Budget | None = None,
    objective: str = "decoupled",
    weight_choices: Offer | None = None,
    act_choices: Offer | None = None,
    weight_splits: Sequence[float] | None = None,
    act_splits: Sequence[float] | None = None,
    protect: Iterable[str] = (),
    tie: Iterable[Iterable[str]] = (),
    time_limit: float = 60.0,
) -> Request:
    """The request in normal form. Raises AllocationError naming argument, value and what was expected; SensitivityError
    where ``sensitivity`` is not one."""
    sensitivity = Sensitivity.expect(sensitivity, "sensitivity")
    expect(objective in OBJECTIVES, "objective", objective, f"one of {', '.join(OBJECTIVES)}", AllocationError)
    expect(_number(time_limit) and time_limit > 0, "time_limit", time_limit, "seconds > 0", AllocationError)
    if (weight_bits is None) == (weight_bytes is None):
        raise AllocationError("give exactly one of weight_bits (an average) and weight_bytes (a total)")
    protected = protected_names(sensitivity, protect)
    if len(protected) == len(sensitivity.layers):
        raise AllocationError(f"protect names all {len(protected)} layers; nothing is left to allocate")
    in_bytes = weight_bytes is not None
    budget = weight_bytes if in_bytes else weight_bits
    return Request(
        sensitivity=sensitivity,
        objective=objective,  # type: ignore[arg-type]
        weight=_demand("weight", budget, weight_choices, weight_splits, objective, in_bytes),
        act=_demand("act", act_bits, act_choices, act_splits, objective, False),
        protect=protected,
        units=tied_units(sensitivity, protected, tie),
        time_limit=float(time_limit),
    )


def _demand(
    kind: Kind,
    budget: Budget | None,
    offer: Offer | None,
    splits: Sequence[float] | None,
    objective: str,
    in_bytes: bool,
) -> Demand:
    grid = tuple(SPLITS[kind] if splits is None else splits)
    if not grid or not all(_number(k) and k > 0 for k in grid):
        raise AllocationError(f"{kind}_splits is {splits!r}, expected one or more numbers > 0 (content / quality bits)")
    grid = tuple(float(k) for k in grid)
    choices = _choices(kind, offer, objective)
    amount = None if budget is None else _budget("weight_bytes" if in_bytes else f"{kind}_bits", budget)
    fixed = None if in_bytes else _fixed(kind, amount, choices, offer is None)
    return Demand(kind, None if fixed else amount, choices, grid, in_bytes, fixed)


def _fixed(
    kind: Kind, budget: float | dict[str, float] | None, choices: dict[str, tuple[int, ...]], default: bool
) -> int | None:
    """The bits of all layers where no program is needed, else None: 8 for activations without a budget, 16 to keep a
    kind unquantized, or the only bits offered.

    Four-bit activations save no time, so a budget of 8 does not offer them, even where measurement noise favours them.
    """
    if budget is None:
        return 8
    if default and isinstance(budget, float) and budget >= 16:
        return 16
    if default and kind == "act" and isinstance(budget, float) and budget >= 8:
        return 8
    offered = {bits for group in choices.values() for bits in group}
    return offered.pop() if len(offered) == 1 and isinstance(budget, float) and budget >= max(offered) else None


def _choices(kind: Kind, offer: Offer | None, objective: str) -> dict[str, tuple[int, ...]]:
    name, bits = f"{kind}_choices", WEIGHT_BITS if kind == "weight" else ACT_BITS
    if offer is None:
        return dict(PUBLISHED[kind]) if objective == "decoupled" else dict.fromkeys(GROUPS, ALL[kind])
    if isinstance(offer, Mapping) and set(offer) != set(GROUPS):
        raise AllocationError(f"{name} has keys {sorted(map(str, offer))}, expected content and quality")
    per_group = offer if isinstance(offer, Mapping) else dict.fromkeys(GROUPS, offer)
    for group, values in per_group.items():
        if not values or not all(type(b) is int and b in bits for b in values):
            expected = ", ".join(map(str, bits))
            raise AllocationError(f"{name} of {group} layers is {values!r}, expected one or more of {expected}")
    return {group: tuple(sorted(set(values))) for group, values in per_group.items()}


def _budget(name: str, budget: Budget) -> float | dict[str, float]:
    if isinstance(budget, Mapping):
        if name == "weight_bytes" or set(budget) != set(GROUPS):
            raise AllocationError(f"{name} is {dict(budget)!r}, expected a number or {{'content': b, 'quality': b}}")
        return {group: positive(f"{name} of {group} layers", budget[group]) for group in GROUPS}
    return positive(name, budget)


def positive(name: str, value: object) -> float:
    """``value`` as a float. Raises AllocationError unless it is a finite number above 0."""
    good = _number(value) and value > 0  # type: ignore[operator]
    expect(good, name, value, "a finite number > 0", AllocationError)
    return float(value)  # type: ignore[arg-type]


def _number(value: object) -> bool:
    """Whether a value is a finite number of Python or NumPy."""
    return is_number(value.item() if isinstance(value, np.generic) else value)


def protected_names(sensitivity: Sensitivity, protect: Iterable[str]) -> frozenset[str]:
    names = frozenset([protect] if isinstance(protect, str) else protect)
    if unknown := sorted(map(str, names - set(sensitivity.layers))):
        raise AllocationError(
            f"protect: layer {unknown[0]!r} is not in the sensitivity ({len(sensitivity.layers)} layers)"
        )
    return names


def tied_units(
    sensitivity: Sensitivity, protected: frozenset[str], tie: Iterable[Iterable[str]]
) -> tuple[tuple[str, ...], ...]:
    """The units of Request, in the order of the sensitivity: tied layers together, any other layer by itself. Raises
    AllocationError where groups overlap or mix protected layers with others."""
    unit_of: dict[str, frozenset[str]] = {}
    for names in tie:
        group = frozenset([names] if isinstance(names, str) else names)
        if unknown := sorted(map(str, group - set(sensitivity.layers))):
            raise AllocationError(f"tie: layer {unknown[0]!r} is not in the sensitivity")
        if group & protected and not group <= protected:
            raise AllocationError(
                f"tie: {min(group & protected)!r} is protected, {min(group - protected)!r} is not; "
                "protect both or neither"
            )
        for name in group:
            if name in unit_of:
                raise AllocationError(f"tie: layer {name!r} is in two groups; join them")
            unit_of[name] = group
    units: dict[frozenset[str], list[str]] = {}
    for name in sensitivity.layers:
        if name not in protected:
            units.setdefault(unit_of.get(name, frozenset([name])), []).append(name)
    return tuple(map(tuple, units.values()))
