"""Divides one budget between content and quality layers, by a sweep of their ratio as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SPLITS: Mapping[str, tuple[float, ...]] = {
    "weight": (*np.linspace(0.46, 1.36, 10).tolist(), 1.0),
    "act": (*np.linspace(0.94, 1.09, 20).tolist(), 1.0),
}
"""k = B_content / B_quality: the published grids, and 1, where both groups get the same average."""
TOLERANCE = 1e-9


def group_budgets(budget: float, ratio: float, k: float) -> dict[str, float]:
    """{group: average bits} such that the average over both is ``budget`` and B_content = k B_quality.

    ``ratio`` is size_content / size_quality: B_quality = B (1 + r) / (k r + 1).
    """
    quality = budget * (1 + ratio) / (k * ratio + 1)
    return {"content": k * quality, "quality": quality}


def split_budgets(
    budget: float, ratio: float, grid: Sequence[float], reach: Mapping[str, tuple[float, float]]
) -> list[tuple[float, dict[str, float]]]:
    """(k, {group: average bits}) for every k that keeps both groups within ``reach`` ({group: (lowest, highest)}).

    A budget that allows the highest bits in both groups is not split: k = 1.
    """
    if all(budget >= high for _, high in reach.values()):
        return [(1.0, dict.fromkeys(reach, budget))]
    candidates = [(k, group_budgets(budget, ratio, k)) for k in grid]
    return [(k, b) for k, b in candidates if all(_within(b[g], *reach[g]) for g in reach)]


def smallest_budget(ratio: float, grid: Sequence[float], reach: Mapping[str, tuple[float, float]]) -> float | None:
    """The smallest average bits for which some k of the grid keeps both groups within reach."""
    budgets = []
    for k in grid:
        share = group_budgets(1.0, ratio, k)
        budget = max(reach[g][0] / share[g] for g in reach)
        if all(_within(budget * share[g], *reach[g]) for g in reach):
            budgets.append(budget)
    return min(budgets, default=None)


def _within(value: float, low: float, high: float) -> bool:
    return low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE)
