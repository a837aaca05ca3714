"""Plans for several budgets that no other plan beats in bytes, predicted error and time at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Unpack

from ..errors import AllocationError
from ..plan import Plan
from .allocate import sweep
from .allocation import Allocation
from .joint import JointOptions, allocate_jointly
from .limits import Latency, Limits
from .request import Budget, SweepOptions
from .sensitivity import Sensitivity


def pareto(
    sensitivity: Sensitivity,
    *,
    weight_bits: Sequence[Budget],
    act_bits: Any = None,
    latency: Latency | None = None,
    **options: Unpack[SweepOptions],
) -> list[Allocation]:
    """Plans by rising weight bytes and falling predicted error, from every split of every budget.

    Args:
        weight_bits: budgets, each as for ``allocate``.
        act_bits: one budget or several.
        latency: a table from ``layer_latencies``; every plan then has ``totals["seconds"]``, and a plan is also kept
            for being faster.
        options: as for ``allocate`` (objective, choices, splits, protect, tie, time_limit).

    Budgets that cannot be met are left out. Raises AllocationError where none can, errors were not measured, or the
    table lacks a layer's precision.
    """
    candidates = sweep(sensitivity, weight_bits=weight_bits, act_bits=act_bits, **options)
    if any(a.predicted_error is None for a in candidates):
        raise AllocationError(
            "pareto needs a predicted error of every plan: the sensitivity lacks weight_errors or act_errors "
            "for some layer; analyze all layers, or give act_bits=16 to leave activations out"
        )
    if latency is not None:
        candidates = [replace(a, totals={**a.totals, "seconds": seconds(a.plan, latency)}) for a in candidates]
    return undominated(candidates)


def pareto_jointly(
    sensitivity: Sensitivity, limits: Iterable[Limits], **options: Unpack[JointOptions]
) -> list[Allocation]:
    """The Pareto front of ``allocate_jointly`` over several limits. ``options``: as for ``allocate_jointly``.

    Limits that cannot be kept are left out. Raises the AllocationError of the last one where none can.
    """
    found: list[Allocation] = []
    reason: AllocationError | None = None
    for limit in limits:
        try:
            allocation = allocate_jointly(sensitivity, limit, **options)
        except AllocationError as e:
            reason = e
            continue
        if limit.latency is not None and "seconds" not in allocation.totals:
            totals = {**allocation.totals, "seconds": seconds(allocation.plan, limit.latency)}
            allocation = replace(allocation, totals=totals)
        found.append(allocation)
    if not found:
        raise reason or AllocationError("limits: expected at least one")
    return undominated(found)


def seconds(plan: Plan, latency: Latency) -> float:
    """Summed latency of a plan's layers. Raises AllocationError naming a layer whose precision was not measured."""
    total = 0.0
    for name, layer in plan.layers.items():
        pair = layer.weight_bits, layer.act_bits
        if (name, *pair) not in latency:
            raise AllocationError(f"layer {name!r}: the latency table has no W{pair[0]}A{pair[1]}; measure it")
        total += latency[name, *pair]
    return total


def undominated(allocations: Iterable[Allocation]) -> list[Allocation]:
    """The allocations that no other beats in bytes, predicted error and seconds (where known) at once, by rising bytes;
    of equal ones the first."""

    def key(a: Allocation) -> tuple[float, float, float]:
        return a.weight_bytes, _error(a), a.totals.get("seconds", 0.0)

    front: list[Allocation] = []
    for allocation in sorted(allocations, key=key):
        _, error, time = key(allocation)
        if not any(_error(other) <= error and other.totals.get("seconds", 0.0) <= time for other in front):
            front.append(allocation)
    return front


def _error(allocation: Allocation) -> float:
    return float("inf") if allocation.predicted_error is None else allocation.predicted_error
