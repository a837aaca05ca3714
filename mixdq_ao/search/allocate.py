"""Bits per layer from sensitivities: integer programs under a size budget.

Section 4.3 of arXiv 2405.17873 (objective "decoupled"): four programs, {weight, act} x {content, quality}, each
maximising the summed score of its layers, with the budget divided between the groups by a swept ratio. "sqnr" and
"additive" are one program per kind over all layers: the sum of dB (the paper's ablation), and the sum of error
powers, which adds up to the error of the whole plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Unpack

from ..errors import AllocationError
from ..plan import Plan
from .allocation import Allocation, Assembler, KindBits
from .infeasible import Unreachable
from .kinds import quantized_units, solve_kind
from .objectives import Objective
from .request import Budget, Offer, Request, SweepOptions, check_request
from .sensitivity import Kind, Sensitivity

Judge = Callable[[Plan], float]


def allocate(
    sensitivity: Sensitivity,
    *,
    weight_bits: Budget | None = None,
    weight_bytes: int | None = None,
    act_bits: Budget | None = None,
    objective: Objective = "decoupled",
    weight_choices: Offer | None = None,
    act_choices: Offer | None = None,
    weight_splits: Sequence[float] | None = None,
    act_splits: Sequence[float] | None = None,
    protect: Iterable[str] = (),
    tie: Iterable[Iterable[str]] = (),
    judge: Judge | None = None,
    time_limit: float = 60.0,
) -> Allocation:
    """Chooses the best bits per layer within a budget.

    Args:
        sensitivity: from ``analyze`` or ``Sensitivity.from_mixdq_yaml``.
        weight_bits: average bits over the weights, a number or {"content": b, "quality": b}; 16 leaves the weights
            unquantized, for a plan of activations alone (which only ``mode="fake"`` can run).
        weight_bytes: instead of weight_bits, bytes of all weights as stored, scales and protected layers included.
        act_bits: average bits over the input elements, likewise. None, or 8 and more with the default choices: all
            activations at 8 bits; 16: no activation is quantized. Where 16 is a choice and a weight gets it, its
            activation is not quantized either (no integer product has a 16-bit weight) and not counted in the average.
        objective: "decoupled", "sqnr" or "additive" (see above).
        weight_choices, act_choices: bits offered, for all layers or {"content": ..., "quality": ...}. Default:
            weights {2, 4, 8}, but quality layers {4, 8} in "decoupled", as published; activations {4, 8}.
        weight_splits, act_splits: ratios k = content / quality bits to try where "decoupled" gets one number
            (default: the published grids, and 1). A split is skipped where a group's choices cannot reach its share.
        protect: layers kept at 16 bits, weights and activations; not counted in average bits.
        tie: groups of layers that must share a precision (for instance layers that read the same tensor).
        judge: measures the quality of a plan, higher is better, to choose among splits: weights first, then
            activations. None chooses the smallest predicted error where errors are known, else the k nearest 1.
        time_limit: seconds for the programs of weights, and again for those of activations.

    Raises:
        AllocationError: invalid argument, no plan within the budget, or none found in time; says what to do.
    """
    request = check_request(
        sensitivity,
        weight_bits=weight_bits,
        weight_bytes=weight_bytes,
        act_bits=act_bits,
        objective=objective,
        weight_choices=weight_choices,
        act_choices=act_choices,
        weight_splits=weight_splits,
        act_splits=act_splits,
        protect=protect,
        tie=tie,
        time_limit=time_limit,
    )
    assemble = Assembler(request.sensitivity, request.objective)
    weights, acts = solve_kind(request, "weight"), _acts_beside([request])

    def neutral(part: KindBits) -> KindBits:
        """Activations for judging weights: the only candidate, or 16 bits while there are several."""
        return acts(part)[0] if len(acts(part)) == 1 else _constant(request, 16)

    weight = _pick(weights, assemble, judge, lambda part: assemble(part, neutral(part)).plan)
    act = _pick(acts(weight), assemble, judge, lambda part: assemble(weight, part).plan)
    return assemble(weight, act)


def sweep(
    sensitivity: Sensitivity,
    *,
    weight_bits: Budget | Sequence[Budget],
    act_bits: Budget | Sequence[Budget] | None = None,
    **options: Unpack[SweepOptions],
) -> list[Allocation]:
    """All candidates: every split of every weight budget, with every split of every activation budget.

    The published search is ``weight_bits=numpy.linspace(T - 0.3, T, 10)`` for a target T. Budgets that no split can
    meet are left out. ``options``: as for ``allocate``, without judge and weight_bytes.

    Raises AllocationError where no budget can be met.
    """
    weight_budgets, act_budgets = _sequence(weight_bits), _sequence(act_bits)
    weights = _reachable([_request(sensitivity, w, act_budgets[0], options) for w in weight_budgets], "weight")
    acts = _acts_beside([_request(sensitivity, weight_budgets[0], a, options) for a in act_budgets])
    first = _request(sensitivity, weight_budgets[0], act_budgets[0], options)
    assemble = Assembler(first.sensitivity, first.objective)
    return [assemble(weight, act) for weight in weights for act in acts(weight)]


def _acts_beside(requests: list[Request]) -> Callable[[KindBits], list[KindBits]]:
    """The function from a weight part to the candidates for activations, which solves once for all weight parts that
    quantize the same layers."""
    solved = cache(lambda units: _reachable([replace(r, units=units) for r in requests], "act"))
    return lambda weight: solved(quantized_units(requests[0], weight))


def _reachable(requests: list[Request], kind: Kind) -> list[KindBits]:
    """The candidates of all budgets that can be met. Raises the last Unreachable where none can."""
    parts: list[KindBits] = []
    reason: Unreachable | None = None
    for request in requests:
        try:
            parts += solve_kind(request, kind)
        except Unreachable as e:
            reason = e
    if not parts:
        raise reason or AllocationError(f"{kind}_bits: expected at least one budget")
    return parts


def _sequence(budgets: Any) -> list[Any]:
    listed = hasattr(budgets, "__len__") and not isinstance(budgets, dict | str)
    items: list[Any] = list(budgets) if listed else [budgets]
    if not items:
        raise AllocationError("weight_bits and act_bits: expected at least one budget, got none")
    return items


def _request(sensitivity: Sensitivity, weight: Any, act: Any, options: SweepOptions) -> Request:
    known = SweepOptions.__optional_keys__
    if unknown := set(options) - known:
        raise AllocationError(f"unknown option {min(unknown)!r}; expected {', '.join(sorted(known))}")
    return check_request(sensitivity, weight_bits=weight, act_bits=act, **options)


def _constant(request: Request, bits: int) -> KindBits:
    return KindBits("act", {n: bits for unit in request.units for n in unit})


def _pick(
    parts: list[KindBits], assemble: Assembler, judge: Judge | None, plan: Callable[[KindBits], Plan]
) -> KindBits:
    """The candidate that ``judge`` scores highest; without a judge, that of the smallest predicted error where all
    errors are known, else that whose k is nearest 1."""
    if len(parts) == 1:
        return parts[0]
    if judge is not None:
        scores = [float(judge(plan(part))) for part in parts]
        if any(math.isnan(s) for s in scores):
            raise AllocationError("judge returned NaN, expected a number that is higher for better plans")
        return parts[scores.index(max(scores))]
    errors = [assemble.figures(part).predicted for part in parts]
    known = [e for e in errors if e is not None]
    if len(known) == len(parts):
        return parts[known.index(min(known))]
    return min(parts, key=lambda part: abs((part.k or 1.0) - 1.0))
