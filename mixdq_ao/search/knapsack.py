"""Exact solver of multiple-choice programs with one limit, by dynamic programming over undominated states.

Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995): start from the Lagrangian choice,
add items one at a time, and keep a partial choice only while no other is both cheaper and better and its Lagrangian
bound is below the best solution known. Branch and bound is slow for transformers, as many of their layers have the same
size: 54 s for 374 layers against 25 ms here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

Choice = NDArray[np.int64]

MAX_STATES = 5_000_000
"""States kept over all steps (25 bytes each) before giving up."""
SLACK = 1e-12
"""Relative tolerance for float64 sums, so that rounding does not discard an optimal state."""


@dataclass(slots=True)
class _States:
    """Undominated partial choices, in order of rising cost; cost and value are relative to the base choice."""

    cost: Array
    value: Array


@dataclass(slots=True)
class _Step:
    """The origin of each state after an item: index of the state before it, and the column chosen."""

    parent: NDArray[np.int32]
    column: NDArray[np.int8]


@dataclass(slots=True)
class _Best:
    """The best feasible state so far: its value, the step it follows, and its index among that step's states."""

    value: float
    step: int = -1
    state: int = -1


def improve(
    value: Array, cost: Array, limit: float, multiplier: float, base: Choice, bound: float, deadline: float
) -> Choice | None:
    """The optimal choice [n], or None where none is better than ``bound``. Raises TimeoutError.

    Args:
        value, cost: [n, c]; value is inf where the column cannot be in a better solution.
        multiplier: Lagrange multiplier of the limit, >= 0.
        base: [n] minimises value + multiplier * cost in each row.
        bound: summed value of a known solution; only better ones are searched for.
        deadline: ``time.perf_counter()`` after which to give up.
    """
    rows = np.arange(len(base))
    room, best = limit - cost[rows, base].sum(), _Best(bound - value[rows, base].sum())
    value, cost = value - value[rows, base][:, None], cost - cost[rows, base][:, None]
    order = _order(value + multiplier * cost)
    states, steps, kept = _States(np.zeros(1), np.zeros(1)), [], 0
    _update(best, states, room, 0)
    saving = np.where(np.isfinite(value), cost, np.inf).min(axis=1)[order]
    to_come = np.concatenate([np.cumsum(saving[::-1])[::-1][1:], [0.0]])
    for step, item in enumerate(order):
        states, parent, column = _extend(states, value[item], cost[item])
        alive = _alive(states, multiplier, room, best.value, to_come[step])
        states = _States(states.cost[alive], states.value[alive])
        steps.append(_Step(parent[alive].astype(np.int32), column[alive].astype(np.int8)))
        kept += len(states.cost)
        if kept > MAX_STATES or time.perf_counter() > deadline:
            raise TimeoutError
        _update(best, states, room, step + 1)
    return None if best.step < 0 else _trace(best, steps, order, base)


def _order(reduced: Array) -> Choice:
    """Items with several columns left, those that are cheapest to change first: the bound then soon rules out changes
    of the last ones."""
    second = np.sort(reduced, axis=1)[:, 1] if reduced.shape[1] > 1 else np.full(len(reduced), np.inf)
    items = np.flatnonzero(np.isfinite(second))
    return items[np.argsort(second[items], kind="stable")]


def _extend(states: _States, value: Array, cost: Array) -> tuple[_States, Choice, Choice]:
    """The states combined with every offered column of one item, by rising cost, without dominated ones."""
    columns = np.flatnonzero(np.isfinite(value))
    costs = (states.cost[None, :] + cost[columns, None]).ravel()
    values = (states.value[None, :] + value[columns, None]).ravel()
    order = np.lexsort((values, costs))
    sorted_values = values[order]
    lowest = np.minimum.accumulate(sorted_values)
    order = order[np.concatenate([[True], sorted_values[1:] < lowest[:-1]])]
    taken, parent = np.divmod(order, len(states.cost))
    return _States(costs[order], values[order]), parent, columns[taken]


def _alive(states: _States, multiplier: float, room: float, best: float, to_come: float) -> NDArray[np.bool_]:
    """Which states can still become a better solution. Whatever follows, a state ends at a value of at least its own +
    multiplier * (cost - room)."""
    bound = states.value + multiplier * (states.cost - room)
    tolerance = SLACK * (abs(best) + multiplier * abs(room))
    return (bound < best + tolerance) & (states.cost + to_come <= room)


def _update(best: _Best, states: _States, room: float, step: int) -> None:
    """Updates ``best``. States have rising cost and falling value, so the last that fits is the best that fits."""
    state = int(np.searchsorted(states.cost, room, side="right")) - 1
    if state >= 0 and states.value[state] < best.value:
        best.value, best.step, best.state = float(states.value[state]), step, state


def _trace(best: _Best, steps: list[_Step], order: Choice, base: Choice) -> Choice:
    choice, state = base.copy(), best.state
    for step in range(best.step - 1, -1, -1):
        choice[order[step]] = steps[step].column[state]
        state = steps[step].parent[state]
    return choice
