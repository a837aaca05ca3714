"""The programs of one kind (weights or activations), solved for every split of its budget."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ..errors import AllocationError
from . import infeasible
from .allocation import KindBits
from .highs import Choices
from .program import InfeasibleProgram, OutOfTime, Solution, solve
from .request import Demand, Request
from .sensitivity import Kind
from .split import split_budgets
from .tables import Table, build_table, stored


def solve_kind(request: Request, kind: Kind) -> list[KindBits]:
    """The candidates of one kind: one, or one per split. Raises AllocationError where there is none."""
    demand = request.weight if kind == "weight" else request.act
    if not request.units:
        return [KindBits(kind, {})]
    if demand.fixed is not None:
        return [KindBits(kind, {n: demand.fixed for unit in request.units for n in unit})]
    demand = _without_protected(request, demand)
    table = build_table(request, demand)
    deadline = time.perf_counter() + request.time_limit
    if request.objective != "decoupled":
        return [_joint(request, demand, table, deadline)]
    return [_decoupled(request, demand, table, k, budgets, deadline) for k, budgets in _splits(request, demand, table)]


def quantized_units(request: Request, weight: KindBits) -> tuple[tuple[str, ...], ...]:
    """Units whose activations are allocated: those whose weights get less than 16 bits. Others stay unquantized, as
    protected layers do: no integer product has a 16-bit weight. Where all weights are fixed at 16 bits the plan is of
    activations alone, and these are all units."""
    if request.weight.fixed == 16:
        return request.units
    return tuple(unit for unit in request.units if weight.bits[unit[0]] < 16)


def _without_protected(request: Request, demand: Demand) -> Demand:
    """A budget in bytes includes the protected layers; here their bytes are subtracted."""
    if not demand.in_bytes or not isinstance(demand.budget, float):
        return demand
    layers = request.sensitivity.layers
    kept = sum(stored(name, layers[name], 16) for name in request.protect)
    if demand.budget <= kept:
        raise infeasible.Unreachable(infeasible.protected_alone(demand.budget, kept, len(request.protect)))
    return replace(demand, budget=demand.budget - kept, kept=kept)


def _splits(request: Request, demand: Demand, table: Table) -> Iterator[tuple[float | None, dict[str, float]]]:
    """(k, {group: average bits}) of every candidate."""
    reach = {group: table.reach(group) for group in table.size}
    if isinstance(demand.budget, dict):
        yield None, {group: demand.budget[group] for group in reach}
        return
    average = _average(demand, table)
    if len(reach) == 1:
        yield None, dict.fromkeys(reach, average)
        return
    ratio = table.size["content"] / table.size["quality"]
    found = split_budgets(average, ratio, demand.splits, reach)
    if not found:
        raise infeasible.Unreachable(infeasible.no_split(request, demand, average, ratio, reach))
    yield from found


def _average(demand: Demand, table: Table) -> float:
    assert isinstance(demand.budget, float)
    return 8.0 * demand.budget / sum(table.size.values()) if demand.in_bytes else demand.budget


def _decoupled(
    request: Request, demand: Demand, table: Table, k: float | None, budgets: dict[str, float], deadline: float
) -> KindBits:
    """Two independent programs, one per group."""
    bits: dict[str, int] = {}
    gap = seconds = 0.0
    for group, budget in budgets.items():
        rows = table.of_group(group)
        limit = np.array([budget * table.size[group]])
        part = Choices(table.value[rows], table.cost[group][None, rows], limit)
        with _explained(request, demand, table, [group]):
            solution = _solve(part, deadline)
        bits |= _bits(request, table, np.flatnonzero(rows), solution)
        gap, seconds = max(gap, solution.gap), seconds + solution.seconds
    return KindBits(demand.kind, bits, gap, k, seconds)


def _joint(request: Request, demand: Demand, table: Table, deadline: float) -> KindBits:
    """One program over all layers; budgets per group make one constraint each."""
    groups = list(table.size)
    if isinstance(demand.budget, dict):
        cost = np.stack([table.cost[g] for g in groups])
        limit = np.array([demand.budget[g] * table.size[g] for g in groups])
    else:
        cost = np.sum([table.cost[g] for g in groups], axis=0)[None]
        limit = np.array([_average(demand, table) * sum(table.size.values())])
    with _explained(request, demand, table, groups):
        solution = _solve(Choices(table.value, cost, limit), deadline)
    bits = _bits(request, table, np.arange(len(table.value)), solution)
    return KindBits(demand.kind, bits, solution.gap, None, solution.seconds)


def _solve(program: Choices, deadline: float) -> Solution:
    left = deadline - time.perf_counter()
    if left <= 0:
        raise OutOfTime
    return solve(program.value, program.cost, program.limit, time_limit=left)


@contextmanager
def _explained(request: Request, demand: Demand, table: Table, groups: list[str]) -> Iterator[None]:
    """Raises AllocationError with a full explanation where the program of ``groups`` has no solution."""
    try:
        yield
    except InfeasibleProgram:
        raise infeasible.Unreachable(infeasible.too_small(request, demand, table, groups)) from None
    except OutOfTime:
        raise AllocationError(infeasible.out_of_time(request, demand)) from None


def _bits(request: Request, table: Table, rows: np.ndarray, solution: Solution) -> dict[str, int]:
    chosen = zip(rows, solution.choice, strict=True)
    return {name: table.bits[column] for row, column in chosen for name in request.units[row]}
