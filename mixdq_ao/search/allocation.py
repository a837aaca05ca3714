"""The result of an allocation: the plan and its figures, assembled from the bits of weights and of activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import ceil

from ..layer_plan import LayerPlan
from ..plan import Plan
from .additive import Errors, additive_errors
from .objectives import Objective
from .roundings import rounded_as
from .sensitivity import GROUPS, Kind, Sensitivity
from .tables import stored


@dataclass(frozen=True, slots=True)
class Allocation:
    """A plan and its figures.

    Attributes:
        plan: bits of every layer; no ranges yet (see Plan.with_calibration).
        status: "optimal", or "feasible, gap 0.1 %" where time ran out.
        objective: {"weight/content", "weight/quality", "act/content", "act/quality": the group's sum of the optimised
            figure} (SSIM or dB: higher is better; error power: lower is better), without protected layers. A key is
            absent where the figure is not known for all layers of the group.
        average_bits: {the same keys: mean over weights or input elements}, without protected layers, and for
            activations without layers whose weight has 16 bits.
        predicted_error: relative error power of the model's output, the sum over all layers, weights and
            activations; None where it was not measured for all of them.
        weight_bytes: bytes of all layers' weights, protected ones at 16 bits: as stored where the sensitivity
            records it, else computed from bits times weights.
        repaired: layers whose measured errors were not monotone in bits (see ``additive_errors``).
        k: {"weight": B_content / B_quality, "act": ...} where a budget was split between the groups.
        seconds: time the solver took for the programs of this plan.
        totals: {"weight_bytes", "act_bytes", "seconds", "bit_operations": amount} of the limits given to
            ``allocate_jointly``.
    """

    plan: Plan
    status: str
    objective: Mapping[str, float]
    average_bits: Mapping[str, float]
    predicted_error: float | None
    weight_bytes: int
    repaired: tuple[str, ...] = ()
    k: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    totals: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KindBits:
    """Bits of one kind, from one or two programs, for every layer that is not protected; for activations only layers
    whose weight has less than 16 bits."""

    kind: Kind
    bits: Mapping[str, int]
    gap: float = 0.0
    k: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one part of an allocation, computed once for all allocations that share the part."""

    objective: dict[str, float]
    average: dict[str, float]
    predicted: float | None
    bytes: int


class Assembler:
    """Makes an Allocation with all figures from a weight part and an activation part."""

    def __init__(self, sensitivity: Sensitivity, objective: Objective) -> None:
        self.sensitivity, self.objective = sensitivity, objective
        self.errors: dict[Kind, Errors] = {}
        self._figures: dict[int, tuple[KindBits, Figures]] = {}
        repaired: set[str] = set()
        for kind in ("weight", "act"):
            self.errors[kind], names = additive_errors(sensitivity, kind)
            repaired.update(names)
        self.repaired = tuple(n for n in sensitivity.layers if n in repaired)

    def __call__(self, weight: KindBits, act: KindBits) -> Allocation:
        w, a, gap = self.figures(weight), self.figures(act), max(weight.gap, act.gap)
        status = "optimal" if gap == 0 else f"feasible, gap {100 * gap:.2g} %"
        k = {part.kind: part.k for part in (weight, act) if part.k is not None}
        error = None if w.predicted is None or a.predicted is None else w.predicted + a.predicted
        average = w.average | a.average
        metadata = {
            "source": f"allocate, objective {self.objective}",
            "status": status,
            "average_bits": average,
            "k": k,
            "predicted_error": error,
        }
        return Allocation(
            plan=Plan(self._layers(weight, act), metadata),
            status=status,
            objective=w.objective | a.objective,
            average_bits=average,
            predicted_error=error,
            weight_bytes=w.bytes,
            repaired=self.repaired,
            k=k,
            seconds=weight.seconds + act.seconds,
        )

    def figures(self, part: KindBits) -> Figures:
        # The cache holds the part as well: while it lives, no other object has its id.
        if id(part) not in self._figures:
            figures = Figures(
                objective=self._objectives(part),
                average=self._averages(part),
                predicted=self._predicted(part),
                bytes=self._bytes(part) if part.kind == "weight" else 0,
            )
            self._figures[id(part)] = part, figures
        return self._figures[id(part)][1]

    def _layers(self, weight: KindBits, act: KindBits) -> dict[str, LayerPlan]:
        kept, layers = LayerPlan(), self.sensitivity.layers
        return {
            name: _layer(bits, act.bits[name], layers[name].rounding(bits)) if name in act.bits else kept
            for name, bits in {**dict.fromkeys(layers, 16), **weight.bits}.items()
        }

    def _groups(self, part: KindBits) -> dict[str, list[str]]:
        """{"weight/content": layers, ...}; groups without layers are absent."""
        layers = self.sensitivity.layers
        groups = {f"{part.kind}/{g}": [n for n in part.bits if layers[n].group == g] for g in GROUPS}
        return {key: names for key, names in groups.items() if names}

    def _averages(self, part: KindBits) -> dict[str, float]:
        layers = self.sensitivity.layers
        return {
            key: sum(part.bits[n] * layers[n].size(part.kind) for n in names)
            / sum(layers[n].size(part.kind) for n in names)
            for key, names in self._groups(part).items()
        }

    def _objectives(self, part: KindBits) -> dict[str, float]:
        """{group: sum of the optimised figure}, without groups where it is not known for every layer."""
        sums: dict[str, float] = {}
        for key, names in self._groups(part).items():
            values = [self._score(part.kind, n).get(part.bits[n]) for n in names]
            known = [v for v in values if v is not None]
            if len(known) == len(values):
                sums[key] = sum(known)
        return sums

    def _score(self, kind: Kind, name: str) -> Mapping[int, float]:
        layer = self.sensitivity.layers[name]
        if self.objective == "additive":
            return self.errors[kind].get(name, {})
        return layer.sqnr(kind) if self.objective == "sqnr" else layer.scores(kind)

    def _predicted(self, part: KindBits) -> float | None:
        """Summed error power, 0 at 16 bits; None where a layer's error was not measured."""
        errors = self.errors[part.kind]
        values = [0.0 if bits == 16 else errors.get(name, {}).get(bits) for name, bits in part.bits.items()]
        known = [v for v in values if v is not None]
        return sum(known) if len(known) == len(values) else None

    def _bytes(self, weight: KindBits) -> int:
        layers = self.sensitivity.layers
        recorded = all(bits == 16 or bits in layers[n].weight_bytes for n, bits in weight.bits.items())
        total = 0
        for name, layer in layers.items():
            bits = weight.bits.get(name, 16)
            total += stored(name, layer, bits) if recorded else ceil(layer.weight_size * bits / 8)
        return total


@cache
def _layer(weight_bits: int, act_bits: int, rounding: str) -> LayerPlan:
    layer = LayerPlan(weight_bits=weight_bits, act_bits=act_bits)
    return layer if weight_bits == 16 else rounded_as(layer, rounding)
