"""Limits of an allocation over weights and activations together: bytes, time and operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import AllocationError
from .request import positive
from .sensitivity import Sensitivity
from .tables import stored

Pair = tuple[int, int]
Latency = Mapping[tuple[str, int, int], float]

ACT_BYTES = {4: 1, 8: 1, 16: 2}
"""Bytes an activation element takes; 4 bits use an 8-bit container."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Any combination of limits; None: no limit.

    Attributes:
        weight_bytes: all weights as stored, scales included, protected layers at 16 bits.
        act_bytes: peak over layers of the input's bytes for ``batch`` samples, plus ``live_bytes[layer]``, the other
            bytes alive while the layer runs (skip connections, the output).
        seconds: sum over layers of ``latency[layer, weight bits, activation bits]``, a table from a benchmark run.
        bit_operations: sum over layers of ``macs[layer]`` x weight bits x activation bits (Yao et al., HAWQ-V3, 2021).
    """

    weight_bytes: int | None = None
    act_bytes: int | None = None
    seconds: float | None = None
    bit_operations: float | None = None
    batch: int = 1
    live_bytes: Mapping[str, int] | None = None
    latency: Latency | None = None
    macs: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        amounts = {n: getattr(self, n) for n in ("weight_bytes", "act_bytes", "seconds", "bit_operations")}
        if all(amount is None for amount in amounts.values()):
            raise AllocationError(f"give at least one limit: {', '.join(amounts)}")
        for name, amount in amounts.items():
            if amount is not None:
                positive(name, amount)
        for limit, needs in (("seconds", "latency"), ("bit_operations", "macs")):
            if amounts[limit] is not None and not getattr(self, needs):
                raise AllocationError(f"{limit} is limited but {needs} is not given")
        positive("batch", self.batch)

    def summed(self) -> dict[str, float]:
        """{limit: amount} of the given limits that are sums over layers."""
        amounts = {n: getattr(self, n) for n in ("weight_bytes", "seconds", "bit_operations")}
        return {name: float(amount) for name, amount in amounts.items() if amount is not None}

    def amount(self, limit: str, name: str, sensitivity: Sensitivity, pair: Pair) -> float | None:
        """One layer's contribution to a limit; None where the latency table lacks the pair."""
        layer, (weight, act) = sensitivity.layers[name], pair
        if limit == "weight_bytes":
            return stored(name, layer, weight)
        if limit == "act_bytes":
            return layer.act_size * self.batch * ACT_BYTES[act] + (self.live_bytes or {}).get(name, 0)
        if limit == "seconds":
            return (self.latency or {}).get((name, weight, act))
        if name not in (self.macs or {}):
            raise AllocationError(f"layer {name!r}: not in macs, which a limit of bit_operations needs")
        return float((self.macs or {})[name]) * weight * act
