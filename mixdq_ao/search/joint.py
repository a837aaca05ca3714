"""One program over weights and activations together: the least predicted error under several limits at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import numpy as np

from ..errors import AllocationError
from ..expect import expect
from ..layer_plan import ACT_BITS, WEIGHT_BITS
from .additive import Errors, additive_errors
from .allocation import Allocation, Assembler, KindBits
from .arrays import Array
from .limits import Limits, Pair
from .program import InfeasibleProgram, OutOfTime, Solution, solve
from .request import positive, protected_names, tied_units
from .sensitivity import Kind, Sensitivity


class JointOptions(TypedDict, total=False):
    """Keyword arguments of ``allocate_jointly``."""

    weight_choices: Sequence[int]
    act_choices: Sequence[int]
    protect: Iterable[str]
    tie: Iterable[Iterable[str]]
    time_limit: float


def allocate_jointly(
    sensitivity: Sensitivity,
    limits: Limits,
    *,
    weight_choices: Sequence[int] = (2, 4, 8, 16),
    act_choices: Sequence[int] = (8, 16),
    protect: Iterable[str] = (),
    tie: Iterable[Iterable[str]] = (),
    time_limit: float = 60.0,
) -> Allocation:
    """Finds the plan with the least summed error power (weights and activations, see ``additive_errors``) within
    ``limits``.

    Every layer gets a pair (weight bits, activation bits) of the choices. A weight of 16 bits leaves the whole layer
    unquantized, unless 16 is the only choice. Pairs that exceed ``act_bytes`` by themselves, or that the latency table
    lacks, are not offered. ``protect`` and ``tie`` as for ``allocate``; protected layers count in every limit, at 16
    bits.

    Raises AllocationError: a figure is missing, or no plan keeps the limits; names what is missing, or the least that
    each limit allows by itself.
    """
    for field, bits, offered in (
        ("weight_choices", weight_choices, WEIGHT_BITS),
        ("act_choices", act_choices, ACT_BITS),
    ):
        known = bool(bits) and set(bits) <= set(offered)
        expect(known, field, bits, f"one or more of {', '.join(map(str, offered))}", AllocationError)
    positive("time_limit", time_limit)
    protected = protected_names(Sensitivity.expect(sensitivity, "sensitivity"), protect)
    units = tied_units(sensitivity, protected, tie)
    weights, acts = sorted(set(weight_choices)), sorted(set(act_choices))
    alone = weights == [16]  # a plan of activations alone; otherwise W16A8 is not offered, as no product runs it
    pairs = [(w, a) for w in weights for a in (acts if w < 16 or alone else [16])]
    value, cost = _arrays(sensitivity, limits, units, pairs)
    kept = _protected_amounts(sensitivity, limits, protected)
    bound = np.array([amount - kept[name] for name, amount in limits.summed().items()])
    solution = _solve(limits, value, cost, bound, kept, time_limit)
    chosen = {n: pairs[c] for unit, c in zip(units, solution.choice, strict=True) for n in unit}
    return _allocation(sensitivity, limits, protected, chosen, solution)


def _arrays(
    sensitivity: Sensitivity, limits: Limits, units: Sequence[tuple[str, ...]], pairs: list[Pair]
) -> tuple[Array, Array]:
    """value [n, c], inf where a pair is not offered, and cost [m, n, c] of the limits that are sums over layers."""
    errors: dict[Kind, Errors] = {kind: additive_errors(sensitivity, kind)[0] for kind in ("weight", "act")}
    names = list(limits.summed())
    value = np.full((len(units), len(pairs)), np.inf)
    cost = np.zeros((len(names), *value.shape))
    for row, unit in enumerate(units):
        for column, pair in enumerate(pairs):
            amounts = [[limits.amount(limit, n, sensitivity, pair) for n in unit] for limit in names]
            peak = [limits.amount("act_bytes", n, sensitivity, pair) or 0.0 for n in unit]
            if any(a is None for row_ in amounts for a in row_) or max(peak) > (limits.act_bytes or np.inf):
                continue
            value[row, column] = sum(
                _error(errors, kind, n, b) for n in unit for kind, b in zip(errors, pair, strict=True)
            )
            cost[:, row, column] = [sum(a for a in row_ if a is not None) for row_ in amounts]
        if not np.isfinite(value[row]).any():
            raise AllocationError(
                f"layer {unit[0]!r}: none of the choices {pairs} fits act_bytes={limits.act_bytes} and is in the "
                "latency table; raise act_bytes, offer smaller choices, or benchmark the layer"
            )
    return value, cost


def _error(errors: Mapping[Kind, Errors], kind: Kind, name: str, bits: int) -> float:
    if bits == 16:
        return 0.0
    if bits not in errors[kind].get(name, {}):
        raise AllocationError(
            f"layer {name!r}: no {kind}_errors at {bits} bits; analyze with {bits} bits or leave them out"
        )
    return errors[kind][name][bits]


def _protected_amounts(sensitivity: Sensitivity, limits: Limits, protected: frozenset[str]) -> dict[str, float]:
    """{limit: sum over the protected layers, at 16 bits}."""
    totals = dict.fromkeys(limits.summed(), 0.0)
    for name in sorted(protected):
        peak = limits.amount("act_bytes", name, sensitivity, (16, 16)) or 0.0
        if limits.act_bytes is not None and peak > limits.act_bytes:
            raise AllocationError(
                f"layer {name!r}: protected, and its input alone takes {peak:.0f} bytes of act_bytes={limits.act_bytes}"
            )
        for limit in totals:
            amount = limits.amount(limit, name, sensitivity, (16, 16))
            if amount is None:
                raise AllocationError(f"layer {name!r}: protected, but latency has no entry ({name!r}, 16, 16)")
            totals[limit] += amount
    return totals


def _solve(
    limits: Limits, value: Array, cost: Array, bound: Array, kept: dict[str, float], time_limit: float
) -> Solution:
    try:
        return solve(value, cost, bound, time_limit=time_limit)
    except InfeasibleProgram:
        least = np.where(np.isfinite(value), cost, np.inf).min(axis=2).sum(axis=1)
        asked = zip(limits.summed().items(), least, strict=True)
        words = [f"{name} {amount:.6g} (least reachable alone {low + kept[name]:.6g})" for (name, amount), low in asked]
        raise AllocationError(
            f"no plan keeps all limits: {', '.join(words)}; raise one of them, offer smaller choices, or protect less"
        ) from None
    except OutOfTime:
        raise AllocationError(f"no plan found within time_limit={time_limit:g} seconds; raise it") from None


def _allocation(
    sensitivity: Sensitivity,
    limits: Limits,
    protected: frozenset[str],
    chosen: Mapping[str, Pair],
    solution: Solution,
) -> Allocation:
    weight = KindBits("weight", {n: pair[0] for n, pair in chosen.items()}, solution.gap, None, solution.seconds)
    act = KindBits("act", {n: pair[1] for n, pair in chosen.items() if pair[0] < 16 or pair[1] < 16})
    every = {**chosen, **dict.fromkeys(protected, (16, 16))}
    totals = {m: sum(limits.amount(m, n, sensitivity, p) or 0.0 for n, p in every.items()) for m in limits.summed()}
    totals["act_bytes"] = max(limits.amount("act_bytes", n, sensitivity, p) or 0.0 for n, p in every.items())
    return replace(Assembler(sensitivity, "additive")(weight, act), totals=totals)
