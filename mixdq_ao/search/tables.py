"""The arrays of one kind's programs: value and cost of each unit of tied layers at each bit width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import AllocationError
from .additive import Errors, additive_errors
from .arrays import Array
from .request import Demand, Request
from .sensitivity import GROUPS, Kind, LayerSensitivity


@dataclass(frozen=True, slots=True)
class Table:
    """Arrays over units [n] and bit widths [c].

    Attributes:
        bits: the columns.
        value: [n, c], to be minimised; inf where a unit is not offered the bits.
        cost: {group: [n, c]} bits of the unit's layers of that group, as stored where the budget is in bytes.
        size: {group: weights or input elements}; groups without layers are absent.
    """

    bits: tuple[int, ...]
    value: Array
    cost: dict[str, Array]
    size: dict[str, float]

    def of_group(self, group: str) -> NDArray[np.bool_]:
        """[n] whether a unit has layers of the group (only such layers, where each group is a program of its own)."""
        return self.cost[group].max(axis=1) > 0

    def reach(self, group: str) -> tuple[float, float]:
        """Lowest and highest average bits of a group that the choices allow."""
        offered = np.isfinite(self.value)
        cost, size = self.cost[group], self.size[group]
        low = np.where(offered, cost, np.inf).min(axis=1).sum() / size
        return float(low), float(np.where(offered, cost, 0.0).max(axis=1).sum() / size)


def build_table(request: Request, demand: Demand) -> Table:
    """The table of a request. Raises AllocationError naming the layer, bits and figure that are missing, or a tie that
    cannot be met."""
    layers, bits = request.sensitivity.layers, tuple(sorted({b for c in demand.choices.values() for b in c}))
    errors = additive_errors(request.sensitivity, demand.kind)[0] if request.objective == "additive" else {}
    groups = [g for g in GROUPS if any(layers[n].group == g for unit in request.units for n in unit)]
    value = np.full((len(request.units), len(bits)), np.inf)
    cost = {g: np.zeros_like(value) for g in groups}
    for row, unit in enumerate(request.units):
        offered = _offered(request, demand, unit)
        for column in sorted(bits.index(b) for b in offered):
            value[row, column] = sum(_value(request, demand.kind, n, bits[column], errors) for n in unit)
        for name in unit:
            cost[layers[name].group][row] += [_cost(name, layers[name], demand, b) if b in offered else 0 for b in bits]
    names = [n for unit in request.units for n in unit]
    size = {g: float(sum(layers[n].size(demand.kind) for n in names if layers[n].group == g)) for g in groups}
    return Table(bits, value, cost, size)


def _offered(request: Request, demand: Demand, unit: tuple[str, ...]) -> set[int]:
    groups = {request.sensitivity.layers[n].group for n in unit}
    if len(groups) > 1 and request.objective == "decoupled":
        raise AllocationError(
            f"tie: {unit[0]!r} and others are of both groups, whose scores are not comparable; "
            "use objective='additive' or 'sqnr', or tie within a group"
        )
    offered = set.intersection(*(set(demand.choices[g]) for g in groups))
    if not offered:
        raise AllocationError(f"tie: {unit[0]!r} and its tied layers share none of the {demand.kind}_choices")
    return offered


def _value(request: Request, kind: Kind, name: str, bits: int, errors: Errors) -> float:
    """The minimised figure of a layer: minus its score, or its error power."""
    layer = request.sensitivity.layers[name]
    if request.objective == "additive":
        return _figure(errors.get(name, {}), bits, name, f"{kind}_errors", "additive")
    if request.objective == "sqnr":
        return -_figure(layer.sqnr(kind), bits, name, f"{kind}_errors", "sqnr")
    return -_figure(layer.scores(kind), bits, name, f"{kind}_scores", "decoupled")


def _figure(table: Mapping[int, float], bits: int, name: str, field: str, objective: str) -> float:
    if bits not in table:
        raise AllocationError(
            f"layer {name!r}: no {field} at {bits} bits, which objective={objective!r} needs; "
            f"analyze with {bits} bits, leave {bits} out of the choices, or protect the layer"
        )
    return table[bits]


def _cost(name: str, layer: LayerSensitivity, demand: Demand, bits: int) -> float:
    if not demand.in_bytes:
        return float(bits * layer.size(demand.kind))
    return 8.0 * stored(name, layer, bits)


def stored(name: str, layer: LayerSensitivity, bits: int) -> int:
    """Recorded bytes of the layer's weights; at 16 bits, where not recorded, two per element."""
    if bits in layer.weight_bytes:
        return layer.weight_bytes[bits]
    if bits == 16:
        return 2 * layer.weight_size
    raise AllocationError(
        f"layer {name!r}: no weight_bytes at {bits} bits, which a budget in bytes needs; use weight_bits"
    )
