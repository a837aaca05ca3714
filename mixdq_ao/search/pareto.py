"""Several budgets from one scoring: the plans that no other beats in both bytes and predicted error."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import AllocationError
from .allocate import sweep
from .allocation import Allocation
from .request import Budget
from .sensitivity import Sensitivity


def pareto(
    sensitivity: Sensitivity, *, weight_bits: Sequence[Budget], act_bits: Any = None, **options: Any
) -> list[Allocation]:
    """Plans by rising weight bytes and falling predicted error, from every split of every budget.

    Args:
        weight_bits: budgets, each as for ``allocate``.
        act_bits: one budget or several.
        options: as for ``allocate`` (objective, choices, splits, protect, tie, time_limit).

    Budgets that cannot be met are left out. Raises AllocationError where none can, or errors were not measured.
    """
    candidates = sweep(sensitivity, weight_bits=weight_bits, act_bits=act_bits, **options)
    if any(a.predicted_error is None for a in candidates):
        raise AllocationError(
            "pareto needs a predicted error of every plan: the sensitivity lacks weight_errors or act_errors "
            "for some layer; analyze all layers, or give act_bits=16 to leave activations out"
        )
    return undominated(candidates)


def undominated(allocations: Iterable[Allocation]) -> list[Allocation]:
    """Those that no other beats in bytes and predicted error at once, by rising bytes; of equals the first."""

    def key(a: Allocation) -> tuple[float, float]:
        return a.weight_bytes, _error(a)

    front: list[Allocation] = []
    for allocation in sorted(allocations, key=key):
        if not front or _error(allocation) < _error(front[-1]):
            front.append(allocation)
    return front


def _error(allocation: Allocation) -> float:
    return float("inf") if allocation.predicted_error is None else allocation.predicted_error
