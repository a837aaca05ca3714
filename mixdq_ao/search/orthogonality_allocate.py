"""Bits per layer from network orthogonality: the published program, and one whose objective is shaped like an error.

"linear": maximise sum theta_i b_i within the budget as a linear program (MPQ-Diff, arXiv 2412.00144), each b_i anywhere
between the lowest and the highest bits offered, then rounded down to offered ones. "integer": the same over offered
bits only, solved exactly. "error": minimise sum theta_i 4^-b_i exactly: each bit quarters the power of a rounding
error, so the first bits of a layer gain most, whereas in the published form every bit gains the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from ..errors import AllocationError
from ..expect import expect, is_number
from .allocation import Allocation, Assembler, KindBits
from .arrays import Array
from .highs import Choices, shares
from .kinds import quantized_units
from .orthogonality import DECAY, Orthogonality
from .program import ROUNDING, InfeasibleProgram, OutOfTime, Solution, solve
from .request import Demand, Request, check_request
from .sensitivity import Sensitivity
from .tables import stored

Form = Literal["linear", "integer", "error"]


def allocate_orthogonal(
    orthogonality: Orthogonality,
    *,
    weight_bits: float | None = None,
    weight_bytes: int | None = None,
    act_bits: float | None = None,
    form: Form = "error",
    beta: float | None = None,
    decay: float = DECAY,
    importance: Mapping[str, float] | None = None,
    weight_choices: Sequence[int] | None = None,
    act_choices: Sequence[int] | None = None,
    protect: Iterable[str] = (),
    tie: Iterable[Iterable[str]] = (),
    time_limit: float = 60.0,
) -> Allocation:
    """Chooses the bits per layer that are best by ``form`` within a budget, the same at all steps.

    Args:
        orthogonality: from ``orthogonality``.
        weight_bits, weight_bytes, act_bits, protect, tie, time_limit: as for ``allocate``; one number each. Bytes need
            an orthogonality that was measured with a calibration.
        form: "linear", "integer" or "error" (see above).
        beta, decay: see ``Orthogonality.importance``.
        importance: {layer: theta} instead, > 0.
        weight_choices, act_choices: bits offered. Default: weights {2, 4, 8}, activations {4, 8}.

    The allocation's ``objective`` is {"weight", "act"}: sum theta b (linear and integer: higher is better) or sum
    theta 4^-b; no error is predicted.

    Raises AllocationError: an argument is wrong, or no plan within the budget. SensitivityError: beta or decay.
    """
    check_form(form)
    orthogonality = Orthogonality.expect(orthogonality, "orthogonality")
    theta = orthogonality.importance(beta=beta, decay=decay) if importance is None else importance
    _check_importance(orthogonality, theta)
    request = check_request(
        Sensitivity(orthogonality.layers),
        weight_bits=weight_bits,
        weight_bytes=weight_bytes,
        act_bits=act_bits,
        objective="additive",
        weight_choices=weight_choices,
        act_choices=act_choices,
        protect=protect,
        tie=tie,
        time_limit=time_limit,
    )
    weight = _part(request, request.weight, theta, form)
    act = _part(replace(request, units=quantized_units(request, weight)), request.act, theta, form)
    return _labelled(Assembler(request.sensitivity, request.objective)(weight, act), theta, form, weight, act)


def check_form(form: object) -> None:
    """Raises AllocationError unless ``form`` is a Form."""
    expect(form in get_args(Form), "form", form, f"one of {', '.join(get_args(Form))}", AllocationError)


def worth(form: Form, bits: int) -> float:
    """The term of the minimised sum for a layer of importance 1."""
    return 4.0**-bits if form == "error" else -float(bits)


def choose(form: Form, value: Array, cost: Array, limit: float, *, field: str, time_limit: float) -> Solution:
    """Chooses one column for each item within a limit. value and cost: [n, c]; value is inf where a column is not
    offered.

    "linear" solves the linear relaxation; the one item that it divides gets the best column within its share.

    Raises AllocationError naming ``field`` and what would be reachable.
    """
    try:
        if form != "linear":
            return solve(value, cost[None], np.array([limit]), time_limit=time_limit)
        return _rounded_relaxation(value, cost, limit, time_limit)
    except InfeasibleProgram:
        least = np.where(np.isfinite(value), cost, np.inf).min(1).sum()
        raise AllocationError(
            f"{field}: no plan within the budget of {limit:.6g}, the least that the choices allow is {least:.6g}; "
            "raise it, offer smaller choices, or protect less"
        ) from None
    except OutOfTime:
        raise AllocationError(f"{field}: no plan found within time_limit={time_limit:g} seconds; raise it") from None


def _rounded_relaxation(value: Array, cost: Array, limit: float, time_limit: float) -> Solution:
    offered, rows = np.isfinite(value), np.arange(len(value))
    if np.where(offered, cost, np.inf).min(1).sum() > limit * (1 + ROUNDING):
        raise InfeasibleProgram
    floor = value.min(1, keepdims=True)
    scale = np.where(offered, value - floor, 0.0).max() or 1.0  # HiGHS' tolerances are absolute
    taken = shares(Choices((value - floor) / scale, cost[None], np.array([limit * (1 + ROUNDING)])), time_limit)
    if taken is None:
        raise OutOfTime
    share = np.maximum((taken * cost).sum(1) * (1 + ROUNDING), np.where(offered, cost, np.inf).min(1))
    choice = np.where(cost <= share[:, None], value, np.inf).argmin(1)
    return Solution(choice, float(value[rows, choice].sum()), 0.0, 0.0)


def _check_importance(orthogonality: Orthogonality, theta: Mapping[str, float]) -> None:
    for name in orthogonality.layers:
        value = theta.get(name)
        good = is_number(value) and value > 0
        expect(good, f"layer {name!r}: importance", value, "a finite number > 0", AllocationError)


def _part(request: Request, demand: Demand, theta: Mapping[str, float], form: Form) -> KindBits:
    kind, layers = demand.kind, request.sensitivity.layers
    if not request.units:
        return KindBits(kind, {})
    if demand.fixed is not None:
        return KindBits(kind, {n: demand.fixed for unit in request.units for n in unit})
    if not isinstance(demand.budget, float):
        raise AllocationError(f"{demand.field} is {demand.budget!r}, expected one number")
    bits = sorted({b for offered in demand.choices.values() for b in offered})
    value = np.array([[sum(theta[n] for n in unit) * worth(form, b) for b in bits] for unit in request.units])
    cost = np.array([[sum(_cost(request, demand, n, b) for n in unit) for b in bits] for unit in request.units])
    size = sum(layers[n].size(kind) for unit in request.units for n in unit)
    kept = sum(stored(n, layers[n], 16) for n in request.protect) if demand.in_bytes else 0
    limit = demand.budget - kept if demand.in_bytes else demand.budget * size
    solution = choose(form, value, cost, limit, field=demand.field, time_limit=request.time_limit)
    chosen = zip(request.units, solution.choice, strict=True)
    return KindBits(kind, {n: bits[c] for unit, c in chosen for n in unit}, solution.gap, None, solution.seconds)


def _cost(request: Request, demand: Demand, name: str, bits: int) -> float:
    layer = request.sensitivity.layers[name]
    return float(stored(name, layer, bits)) if demand.in_bytes else float(bits * layer.size(demand.kind))


def _labelled(
    allocation: Allocation, theta: Mapping[str, float], form: Form, weight: KindBits, act: KindBits
) -> Allocation:
    """The allocation with the objective and source of this program in place of those of an allocation by errors."""
    sums = {p.kind: sum(theta[n] * abs(worth(form, b)) for n, b in p.bits.items()) for p in (weight, act)}
    status = "linear program, rounded down" if form == "linear" else allocation.status
    source = f"network orthogonality, form {form}"
    metadata = {**allocation.plan.metadata, "source": source, "status": status, "predicted_error": None}
    plan = replace(allocation.plan, metadata=metadata)
    return replace(allocation, plan=plan, status=status, objective=dict(sums), predicted_error=None)
