"""Multiple-choice programs in HiGHS, passed as arrays: one column per offered choice, no Python expression objects."""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from .arrays import Array

_MINIMIZE, _ROWWISE = 1, 2


@dataclass(frozen=True, slots=True)
class Choices:
    """Choose one column per item: minimise the summed value with every summed cost within its limit.

    Attributes:
        value: [n, c]; inf where the column is not offered to the item.
        cost: [m, n, c], one slice per constraint.
        limit: [m].
    """

    value: Array
    cost: Array
    limit: Array

    @property
    def offered(self) -> NDArray[np.bool_]:
        return np.isfinite(self.value)

    def total(self, choice: NDArray[np.int64]) -> float:
        return float(self.value[np.arange(len(choice)), choice].sum())

    def spent(self, choice: NDArray[np.int64]) -> Array:
        """[m] the summed costs of a choice per item [n]."""
        return self.cost[:, np.arange(len(choice)), choice].sum(axis=1)

    def fits(self, choice: NDArray[np.int64]) -> bool:
        return bool((self.spent(choice) <= self.limit).all())


def build(problem: Choices, *, integer: bool, time_limit: float) -> highspy.Highs:
    """The HiGHS model, not run yet. Building 100 000 columns takes some 20 ms."""
    offered = problem.offered
    items, columns = len(offered), int(offered.sum())
    costs = problem.cost[:, offered]
    scale = _scale(problem)
    rows = items + len(costs)
    per_item = offered.sum(axis=1)
    start = np.concatenate([[0], np.cumsum(per_item), columns * np.arange(2, len(costs) + 2)])
    index = np.tile(np.arange(columns), len(costs) + 1)
    entries = np.concatenate([np.ones(columns), (costs / scale[:, None]).ravel()])
    lower = np.concatenate([np.ones(items), np.full(len(costs), -highspy.kHighsInf)])
    upper = np.concatenate([np.ones(items), problem.limit / scale])
    kinds = np.full(columns, 1 if integer else 0, np.int32)
    model = highspy.Highs()
    for option, value in _options(time_limit).items():
        model.setOptionValue(option, value)
    model.passModel(
        columns, rows, len(entries), _ROWWISE, _MINIMIZE, 0.0,
        problem.value[offered], np.zeros(columns), np.ones(columns), lower, upper,
        start.astype(np.int32), index.astype(np.int32), entries, kinds,
    )  # fmt: skip
    return model


def _options(time_limit: float) -> dict[str, bool | int | float]:
    """HiGHS options. The gap is zero: by default HiGHS stops 1e-6 from the optimum, which may exceed the whole error
    power."""
    limit = max(time_limit, 1e-3)
    return {"output_flag": False, "threads": 1, "time_limit": limit, "mip_rel_gap": 0.0, "mip_abs_gap": 0.0}


def _scale(problem: Choices) -> Array:
    """[m] divisor of each constraint: its limit (12 times faster than its largest entry at 100 000 columns)."""
    largest = np.abs(problem.cost).max(axis=(1, 2), initial=0.0)
    return np.where(problem.limit > 0, problem.limit, np.where(largest > 0, largest, 1.0))


@dataclass(frozen=True, slots=True)
class Relaxation:
    """factors: [m] Lagrange multipliers (>= 0) at the optimum of the linear relaxation; choice: [n] its solution, with
    the cheapest column where an item is divided between several."""

    factors: Array
    choice: NDArray[np.int64]


def relax(problem: Choices, time_limit: float) -> Relaxation | None:
    """Solves the linear relaxation; None where HiGHS found no optimum (infeasible, or out of time)."""
    model = _relaxed(problem, time_limit)
    if model is None:
        return None
    solution, scale = model.getSolution(), _scale(problem)
    factors = np.maximum(-np.array(solution.row_dual)[len(problem.value) :], 0.0) / scale
    taken = _spread(problem, np.array(solution.col_value))
    price = np.where(taken > 1e-6, (problem.cost / scale[:, None, None]).sum(axis=0), np.inf)
    return Relaxation(factors, price.argmin(axis=1))


def shares(problem: Choices, time_limit: float) -> Array | None:
    """[n, c] share of each column in the relaxation's solution, summing to 1 per item; None as for ``relax``."""
    model = _relaxed(problem, time_limit)
    if model is None:
        return None
    return np.maximum(_spread(problem, np.array(model.getSolution().col_value)), 0.0)


def _relaxed(problem: Choices, time_limit: float) -> highspy.Highs | None:
    model = build(problem, integer=False, time_limit=time_limit)
    model.run()
    return model if model.getModelStatus() == highspy.HighsModelStatus.kOptimal else None


def _spread(problem: Choices, columns: Array) -> Array:
    """[n, c] values of HiGHS' columns; -1 where a column is not offered."""
    table = np.full(problem.value.shape, -1.0)
    table[problem.offered] = columns
    return table


@dataclass(frozen=True, slots=True)
class BranchAndBound:
    """choice: [n], None where no solution was found; bound: proven lower bound of the value; infeasible: proven so."""

    choice: NDArray[np.int64] | None
    bound: float
    infeasible: bool


def branch_and_bound(problem: Choices, start: NDArray[np.int64] | None, time_limit: float) -> BranchAndBound:
    """HiGHS' branch and bound, started from an optional solution [n]."""
    model = build(problem, integer=True, time_limit=time_limit)
    offered = problem.offered
    if start is not None:
        chosen = np.zeros_like(offered)
        chosen[np.arange(len(start)), start] = True
        solution = highspy.HighsSolution()
        solution.col_value = chosen[offered].astype(float).tolist()
        model.setSolution(solution)
    model.run()
    if model.getModelStatus() == highspy.HighsModelStatus.kSolveError:
        # HiGHS 1.15's presolve lost a constraint in one of 20 000 small random programs, and reported it as this status
        model.setOptionValue("presolve", "off")
        model.run()
    status, info = model.getModelStatus(), model.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return BranchAndBound(None, np.inf, True)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return BranchAndBound(None, info.mip_dual_bound, False)
    taken = _spread(problem, np.array(model.getSolution().col_value))
    return BranchAndBound(taken.argmax(axis=1), float(info.mip_dual_bound), False)
