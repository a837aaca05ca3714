"""Turns bits per layer and step into a TemporalPlan with one level for each set of steps with the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..layer_plan import LayerPlan
from ..plan import Plan
from ..search.sensitivity import Kind, LayerSensitivity
from .plan import TemporalPlan

Bits = NDArray[np.int64]
"""[sampled steps, layers]."""
Pairs = tuple[tuple[int, int], ...]
"""(weight bits, activation bits) of each layer."""
KINDS: tuple[Kind, Kind] = ("weight", "act")


@dataclass(frozen=True, slots=True)
class Served:
    """The layers and steps of an allocation.

    Attributes:
        layers: {name: sizes} of the layers that get bits.
        protected: names of the layers kept at 16 bits.
        sampled: steps that bits are chosen for.
        serves: for each sampled step, the steps of the run that use its bits.
        steps: number of steps of the run.
    """

    layers: Mapping[str, LayerSensitivity]
    protected: tuple[str, ...]
    sampled: tuple[int, ...]
    serves: tuple[tuple[int, ...], ...]
    steps: int


@dataclass(frozen=True, slots=True)
class _Level:
    """One level: the bits of each layer, the steps of the run that use it, and its mean weight and activation bits."""

    pairs: Pairs
    steps: tuple[int, ...]
    means: tuple[float, float]


def to_levels(served: Served, weights: Bits, acts: Bits, metadata: Mapping[str, Any]) -> TemporalPlan:
    """The plan; its levels are named after their steps ("0-1, 5"), most weight bits first. The cost of a level is its
    mean weight bits / 16; the plan has no costs if two are equal."""
    levels = {spans(level.steps): level for level in _levels(served, weights, acts)}
    plans: dict[str, Plan | None] = {n: _plan(served, n, level) for n, level in levels.items()}
    names = {t: n for n, level in levels.items() for t in level.steps}
    costs = {n: level.means[0] / 16 for n, level in levels.items()}
    falling = all(a > b for a, b in pairwise(costs.values()))
    weight, act = _means(served, [(v.pairs, len(v.steps)) for v in levels.values()])
    figures = {
        "sampled": list(served.sampled),
        "average_weight_bits": weight,
        "average_act_bits": act,
        "level_bits": {n: list(level.means) for n, level in levels.items()},
    }
    order = tuple(names[t] for t in range(served.steps))
    return TemporalPlan(plans, order, costs if falling else None, {**metadata, **figures})


def _levels(served: Served, weights: Bits, acts: Bits) -> list[_Level]:
    steps: dict[Pairs, list[int]] = {}
    for weight, act, here in zip(weights.tolist(), acts.tolist(), served.serves, strict=True):
        steps.setdefault(tuple(zip(weight, act, strict=True)), []).extend(here)
    levels = [_Level(pairs, tuple(sorted(here)), _means(served, [(pairs, 1)])) for pairs, here in steps.items()]
    return sorted(levels, key=lambda v: (-v.means[0], -v.means[1], v.steps))


def _means(served: Served, runs: Iterable[tuple[Pairs, int]]) -> tuple[float, float]:
    """Average weight and activation bits over (bits of each layer, number of steps) pairs. Activations of layers with
    16-bit weights are not counted; 16 if there are no others."""
    bits, sizes = [0, 0], [0, 0]
    for pairs, count in runs:
        for pair, layer in zip(pairs, served.layers.values(), strict=True):
            for i, kind in enumerate(KINDS):
                size = count * layer.size(kind) if i == 0 or pair[0] < 16 else 0
                bits[i], sizes[i] = bits[i] + pair[i] * size, sizes[i] + size
    return bits[0] / sizes[0], bits[1] / sizes[1] if sizes[1] else 16.0


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
