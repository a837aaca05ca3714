"""Bits per layer and step as a TemporalPlan: a level for every set of steps whose bits are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..plan import LayerPlan, Plan
from ..search.sensitivity import Kind, LayerSensitivity
from .plan import TemporalPlan

Bits = Mapping[int, Mapping[str, int]]
"""{sampled step: {layer: bits}}."""
KINDS: tuple[Kind, Kind] = ("weight", "act")


@dataclass(frozen=True, slots=True)
class Served:
    """Which layers get bits at which steps.

    Attributes:
        layers: {name: sizes} that get bits. protected: names of those kept at 16.
        sampled: steps that bits were chosen for. serves: for each, the steps of the run that take its bits.
        steps: of the run.
    """

    layers: Mapping[str, LayerSensitivity]
    protected: tuple[str, ...]
    sampled: tuple[int, ...]
    serves: tuple[tuple[int, ...], ...]
    steps: int


@dataclass(frozen=True, slots=True)
class _Level:
    """pairs: (weight bits, activation bits) of each layer; steps: of the run; means: of weight and activation bits."""

    pairs: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    means: tuple[float, float]


def to_levels(served: Served, weights: Bits, acts: Bits, metadata: Mapping[str, Any]) -> TemporalPlan:
    """Levels named after their steps ("0-1, 5"), most weight bits first. They cost their mean weight bits / 16, or
    nothing is said of costs where two come out equal."""
    levels = {spans(level.steps): level for level in _levels(served, weights, acts)}
    plans: dict[str, Plan | None] = {n: _plan(served, n, level) for n, level in levels.items()}
    names = {t: n for n, level in levels.items() for t in level.steps}
    costs = {n: level.means[0] / 16 for n, level in levels.items()}
    falling = all(a > b for a, b in pairwise(costs.values()))
    mean = lambda i: sum(v.means[i] * len(v.steps) for v in levels.values()) / served.steps  # noqa: E731
    figures = {
        "sampled": list(served.sampled),
        "average_weight_bits": mean(0),
        "average_act_bits": mean(1),
        "level_bits": {n: list(level.means) for n, level in levels.items()},
    }
    order = tuple(names[t] for t in range(served.steps))
    return TemporalPlan(plans, order, costs if falling else None, {**metadata, **figures})


def _levels(served: Served, weights: Bits, acts: Bits) -> list[_Level]:
    steps: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for sampled, here in zip(served.sampled, served.serves, strict=True):
        pairs = tuple((weights[sampled][n], acts[sampled][n]) for n in served.layers)
        steps.setdefault(pairs, []).extend(here)
    levels = [_Level(pairs, tuple(sorted(here)), _means(served, pairs)) for pairs, here in steps.items()]
    return sorted(levels, key=lambda v: (-v.means[0], -v.means[1], v.steps))


def _means(served: Served, pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
    sizes = [[layer.size(kind) for layer in served.layers.values()] for kind in KINDS]
    weight, act = (sum(p[i] * s for p, s in zip(pairs, sizes[i], strict=True)) / sum(sizes[i]) for i in (0, 1))
    return weight, act


def _plan(served: Served, name: str, level: _Level) -> Plan:
    bits = zip(served.layers, level.pairs, strict=True)
    layers = {n: LayerPlan(weight_bits=w, act_bits=a) for n, (w, a) in bits}
    kept = dict.fromkeys(served.protected, LayerPlan())
    return Plan(layers | kept, {"source": f"bits per layer and step, steps {name}"})


def spans(steps: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
