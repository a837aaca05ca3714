"""The integer program of an allocation, arrays in and arrays out: relaxation in HiGHS, then exact search.

Minimise the summed value of one column per item with every summed cost within its limit. The multipliers of HiGHS'
linear relaxation rule out most columns (a column whose Lagrangian bound is above a known solution's value is in no
better one). What is left is searched exactly: with one limit by ``knapsack``, else by HiGHS' branch and bound.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import knapsack
from .highs import Array, Choices, Relaxation, branch_and_bound, relax

ROUNDING = 1e-9
"""Relative excess over a limit that is put down to float64 in the limit itself (a number of bits times a size)."""
FILL_TRIES = 5000
PROVEN = 1e-12
"""Relative gap that float64 sums cannot resolve."""


class InfeasibleProgram(Exception):
    """No choice keeps all limits."""


class OutOfTime(Exception):
    """The time limit passed before any choice within the limits was found."""


@dataclass(frozen=True, slots=True)
class Solution:
    """choice: [n] columns; value: their sum; gap: proven relative distance to the optimum, of the value above
    what the limits do not force (0: optimal)."""

    choice: NDArray[np.int64]
    value: float
    gap: float
    seconds: float


def solve(value: Array, cost: Array, limit: Array, *, time_limit: float = 60.0) -> Solution:
    """The best choice of one column per item.

    Args:
        value: [n, c], to minimise; inf where a column is not offered. At least one per item.
        cost: [m, n, c], finite.
        limit: [m], an upper bound of each summed cost.

    Raises InfeasibleProgram or OutOfTime.
    """
    began = time.perf_counter()
    rows = np.arange(len(value))
    floor = value.min(axis=1, initial=np.inf)
    limit = limit + ROUNDING * np.abs(limit)
    problem = Choices(value - floor[:, None], cost, limit)
    choice, gap = _search(problem, began + time_limit)
    return Solution(choice, float(value[rows, choice].sum()), gap, time.perf_counter() - began)


def _search(problem: Choices, deadline: float) -> tuple[NDArray[np.int64], float]:
    ideal = np.lexsort((problem.cost.sum(axis=0), problem.value), axis=-1)[:, 0]
    if problem.fits(ideal):
        return ideal, 0.0
    cheapest = _cheapest(problem)
    if any(problem.spent(c)[m] > problem.limit[m] for m, c in enumerate(cheapest)):
        raise InfeasibleProgram
    scale, relaxed, bound = _relax(problem, cheapest, deadline)
    problem, factors = replace(problem, value=problem.value / scale), relaxed.factors
    best = _first(problem, relaxed, cheapest)
    if best is not None and _gap(problem.total(best), bound) <= PROVEN:
        return best, 0.0
    core = _core(problem, factors, bound, best)
    if len(problem.limit) == 1 and best is not None:
        base = _lagrangian(core, factors).argmin(axis=1)
        try:
            better = knapsack.improve(
                core.value, core.cost[0], core.limit[0], float(factors[0]), base, problem.total(best), deadline
            )
            return (best if better is None else better), 0.0
        except TimeoutError:
            pass
    return _branch(problem, core, best, bound, deadline)


def _cheapest(problem: Choices) -> list[NDArray[np.int64]]:
    """Per constraint, the choice that costs least in it (of equal ones the best)."""
    costs = np.where(problem.offered[None], problem.cost, np.inf)
    return [np.lexsort((problem.value, cost), axis=-1)[:, 0] for cost in costs]


def _relax(problem: Choices, cheapest: list[NDArray[np.int64]], deadline: float) -> tuple[float, Relaxation, float]:
    """A scale for the values, the relaxation of the scaled problem, and the Lagrangian bound it proves.

    HiGHS' tolerances are absolute while error powers span twelve decades, so values are scaled until the optimum
    is of the order of one. The bound holds for any multipliers, whatever the solver's tolerance.
    """
    scale = max(problem.total(c) for c in cheapest) or 1.0
    result = scale, Relaxation(np.zeros(len(problem.limit)), cheapest[0]), 0.0
    for _ in range(4):
        scaled = replace(problem, value=problem.value / scale)
        relaxed = relax(scaled, deadline - time.perf_counter())
        if relaxed is None:
            break
        prices = _lagrangian(scaled, relaxed.factors).min(axis=1).sum()
        bound = float(prices - relaxed.factors @ problem.limit)
        result = scale, relaxed, max(bound, 0.0)
        if bound > 0.01 or bound <= 0:
            break
        scale *= bound
    return result


def _lagrangian(problem: Choices, factors: Array) -> Array:
    """[n, c] value plus priced costs; inf where not offered."""
    return problem.value + np.tensordot(factors, problem.cost, axes=1)


def _first(problem: Choices, relaxed: Relaxation, cheapest: list[NDArray[np.int64]]) -> NDArray[np.int64] | None:
    """A good choice that fits: the relaxation rounded, else at rising prices, filled up with what room is left;
    None where no attempt fits."""
    for choice in _roundings(problem, relaxed, cheapest):
        if problem.fits(choice):
            return _fill(problem, choice)
    return None


def _roundings(problem: Choices, relaxed: Relaxation, cheapest: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    yield relaxed.choice
    for price in (1.0001, 1.001, 1.01, 1.1, 2.0, 10.0):
        yield _lagrangian(problem, price * relaxed.factors).argmin(axis=1)
    yield from cheapest


def _fill(problem: Choices, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """Takes single improvements that fit, the largest first."""
    choice, rows = choice.copy(), np.arange(len(choice))
    gain = problem.value[rows, choice][:, None] - problem.value
    extra = problem.cost - problem.cost[:, rows, choice][:, :, None]
    room = problem.limit - problem.spent(choice)
    candidates = np.argwhere((gain > 0) & (extra <= room[:, None, None]).all(axis=0))
    for item, column in candidates[np.argsort(-gain[tuple(candidates.T)], kind="stable")][:FILL_TRIES]:
        step = problem.cost[:, item, column] - problem.cost[:, item, choice[item]]
        if problem.value[item, column] < problem.value[item, choice[item]] and (step <= room).all():
            room, choice[item] = room - step, column
    return choice


def _core(problem: Choices, factors: Array, bound: float, best: NDArray[np.int64] | None) -> Choices:
    """The problem without the columns that are in no solution better than ``best``."""
    if best is None:
        return problem
    lagrangian = _lagrangian(problem, factors)
    regret = lagrangian - lagrangian.min(axis=1, keepdims=True)
    total = problem.total(best)
    keep = regret <= total - bound + PROVEN * total
    keep[np.arange(len(best)), best] = True
    return replace(problem, value=np.where(keep, problem.value, np.inf))


def _branch(
    problem: Choices, core: Choices, best: NDArray[np.int64] | None, bound: float, deadline: float
) -> tuple[NDArray[np.int64], float]:
    """HiGHS on the core. Its feasibility tolerance may let a limit be exceeded by a millionth; the limit is then
    tightened by as much, and what was excluded counts as a gap."""
    tight, exact = core, True
    for _ in range(4):
        found = branch_and_bound(tight, best, deadline - time.perf_counter())
        if exact:
            bound = max(bound, found.bound) if np.isfinite(found.bound) else bound
        if found.infeasible and exact:
            if best is None:
                raise InfeasibleProgram
            return best, 0.0
        if found.choice is None:
            break
        if problem.fits(found.choice):
            if best is None or problem.total(found.choice) < problem.total(best):
                best = found.choice
            break
        excess = np.maximum(problem.spent(found.choice) - problem.limit, 0.0)
        tight, exact = replace(tight, limit=tight.limit - 2 * excess), False
    if best is None:
        raise OutOfTime
    gap = _gap(problem.total(best), bound)
    return best, gap if gap > ROUNDING else 0.0


def _gap(total: float, bound: float) -> float:
    return max(total - bound, 0.0) / total if total > 0 else 0.0
