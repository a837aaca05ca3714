"""The integer program of an allocation, arrays in and arrays out: relaxation in HiGHS, then exact search.

Minimise the summed value of one column per item with every summed cost within its limit. The multipliers of HiGHS'
linear relaxation rule out most columns (a column whose Lagrangian bound is above a known solution's value is in no
better solution). The remaining columns are searched: with one limit by ``knapsack``, exactly; else by HiGHS' branch and
bound, which ignores improvements below a millionth of its unit of value. The unit is the value of a known solution, at
most twice that of the one found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import knapsack
from .arrays import Array
from .highs import Choices, Relaxation, branch_and_bound, relax

ROUNDING = 1e-9
"""Relative excess over a limit that is allowed for float64 rounding of the limit (a number of bits times a size)."""
FILL_TRIES = 5000
"""Improvements that ``_fill`` tries: a bound on the time of a Python loop; the result is only a first solution."""
PRICES = (1.0001, 1.001, 1.01, 1.1, 2.0, 10.0)
"""Multiples of the relaxation's factors that are tried until a choice fits. The factors themselves exceed a limit by at
most the items that the relaxation divides, so small increases come first."""
PROVEN = 1e-12
"""Relative gap below which float64 sums cannot tell two values apart."""


class InfeasibleProgram(Exception):
    """No choice keeps all limits."""


class OutOfTime(Exception):
    """The time limit passed before any choice within the limits was found."""


@dataclass(frozen=True, slots=True)
class Solution:
    """choice: [n] columns; value: their sum; gap: proven relative distance to the optimum of the value in excess of
    each item's minimum (0: optimal; with several limits to two millionths)."""

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
    """Repeats the search in a finer unit of value while the solution is below half of the unit that HiGHS was given.

    HiGHS' tolerances are absolute and error powers span twelve decades: for values far below the unit, neither the
    choice nor the bound that HiGHS reports as optimal is reliable.
    """
    ideal = np.lexsort((problem.cost.sum(axis=0), problem.value), axis=-1)[:, 0]
    if problem.fits(ideal):
        return ideal, 0.0
    if any(problem.spent(c)[m] > problem.limit[m] for m, c in enumerate(_cheapest(problem))):
        raise InfeasibleProgram
    best = None
    while True:
        best, gap, unit = _attempt(problem, best, deadline)
        total = problem.total(best)
        if total >= unit / 2 or total == 0:
            return best, gap
        problem = replace(problem, value=np.where(problem.value <= total, problem.value / total, np.inf))


def _attempt(
    problem: Choices, known: NDArray[np.int64] | None, deadline: float
) -> tuple[NDArray[np.int64], float, float]:
    """A choice at least as good as ``known``, its gap, and the unit of value used."""
    cheapest = _cheapest(problem)
    relaxed, bound, scale = _relax(problem, cheapest, deadline)
    best = _better(problem, known, _first(problem, relaxed, cheapest))
    unit = scale if best is None else problem.total(best)
    if best is not None and _gap(unit, bound) <= PROVEN:
        return best, 0.0, unit
    problem, bound, factors = replace(problem, value=problem.value / unit), bound / unit, relaxed.factors / unit
    core = _core(problem, factors, bound, best)
    if len(problem.limit) == 1 and best is not None:
        base = _lagrangian(core, factors).argmin(axis=1)
        try:
            better = knapsack.improve(
                core.value, core.cost[0], core.limit[0], float(factors[0]), base, problem.total(best), deadline
            )
            return (best if better is None else better), 0.0, unit
        except TimeoutError:
            pass
    return *_branch(problem, core, best, bound, deadline), unit


def _cheapest(problem: Choices) -> list[NDArray[np.int64]]:
    """For each constraint the choice of least cost (of equal ones the best)."""
    costs = np.where(problem.offered[None], problem.cost, np.inf)
    return [np.lexsort((problem.value, cost), axis=-1)[:, 0] for cost in costs]


def _relax(problem: Choices, cheapest: list[NDArray[np.int64]], deadline: float) -> tuple[Relaxation, float, float]:
    """The relaxation, the Lagrangian bound it proves, and the unit of value it was solved in.

    The unit is lowered until the bound is of the order of one, if it is positive. The bound holds for any multipliers,
    whatever the solver's tolerance. Poor multipliers may make it negative; ``_core`` must use it as it is, not raised
    to the 0 that is known anyway, as its regrets are relative to this bound.
    """
    unit = max(problem.total(c) for c in cheapest) or 1.0
    result = Relaxation(np.zeros(len(problem.limit)), cheapest[0]), 0.0, unit
    for _ in range(4):
        scaled = replace(problem, value=problem.value / unit)
        relaxed = relax(scaled, deadline - time.perf_counter())
        if relaxed is None:
            break
        prices = _lagrangian(scaled, relaxed.factors).min(axis=1).sum()
        bound = float(prices - relaxed.factors @ problem.limit)
        result = replace(relaxed, factors=relaxed.factors * unit), bound * unit, unit
        if bound > 0.01 or bound <= 0:
            break
        unit *= bound
    return result


def _lagrangian(problem: Choices, factors: Array) -> Array:
    """[n, c] value plus priced costs; inf where not offered."""
    return problem.value + np.tensordot(factors, problem.cost, axes=1)


def _better(
    problem: Choices, one: NDArray[np.int64] | None, other: NDArray[np.int64] | None
) -> NDArray[np.int64] | None:
    """The choice of the smaller total, if there is one."""
    return min((c for c in (one, other) if c is not None), key=problem.total, default=None)


def _first(problem: Choices, relaxed: Relaxation, cheapest: list[NDArray[np.int64]]) -> NDArray[np.int64] | None:
    """A good choice that fits: the rounded relaxation, or the choice at increased prices, then improved within the room
    left; None where no attempt fits."""
    for choice in _roundings(problem, relaxed, cheapest):
        if problem.fits(choice):
            return _fill(problem, choice)
    return None


def _roundings(problem: Choices, relaxed: Relaxation, cheapest: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    yield relaxed.choice
    for price in PRICES:
        yield _lagrangian(problem, price * relaxed.factors).argmin(axis=1)
    yield from cheapest


def _fill(problem: Choices, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    """``choice`` after single-item improvements that fit, the largest first."""
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
    """The problem without columns that no solution better than ``best`` can contain."""
    if best is None:
        return problem
    lagrangian = _lagrangian(problem, factors)
    regret = lagrangian - lagrangian.min(axis=1, keepdims=True)
    total = problem.total(best)
    keep = (regret <= total - bound + PROVEN * total) & (problem.value <= total)
    keep[np.arange(len(best)), best] = True
    return replace(problem, value=np.where(keep, problem.value, np.inf))


def _branch(
    problem: Choices, core: Choices, best: NDArray[np.int64] | None, bound: float, deadline: float
) -> tuple[NDArray[np.int64], float]:
    """Branch and bound of the core in HiGHS. Its feasibility tolerance may exceed a limit by a millionth; the limit is
    then tightened by twice the excess, and the bound of the tightened problem is not used, so that solutions it
    excludes count as a gap."""
    tight, exact = core, True
    for _ in range(4):
        found = branch_and_bound(tight, best, deadline - time.perf_counter())
        if exact:
            bound = max(bound, found.bound) if np.isfinite(found.bound) else bound
        if found.infeasible and exact and best is None:
            raise InfeasibleProgram
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
    return max(total - max(bound, 0.0), 0.0) / total if total > 0 else 0.0
