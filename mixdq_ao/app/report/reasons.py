"""Why a layer got its bits, in words: where it stands in its group, and what one step down or up would change."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import ceil

from ...layer_plan import LayerPlan
from ...search.sensitivity import LayerSensitivity, Sensitivity
from .metric import Metric, metrics
from .names import ordinal, size


class Reasons:
    """Sentences for the layers of one sensitivity file."""

    def __init__(self, sensitivity: Sensitivity) -> None:
        self.layers, self.metrics = sensitivity.layers, metrics(sensitivity)

    @cached_property
    def ranks(self) -> Mapping[tuple[str, int], tuple[int, int]]:
        """{(layer, bits): (place in its group, 1 the most sensitive; layers of the group)}."""
        scores: dict[tuple[str, int], list[tuple[float, str]]] = {}
        for name, layer in self.layers.items():
            for bits, score in layer.weight_scores.items():
                scores.setdefault((layer.group, bits), []).append((score, name))
        return {
            (name, bits): (place, len(group))
            for (_, bits), group in scores.items()
            for place, (_, name) in enumerate(sorted(group), 1)
        }

    def weight(self, name: str, plan: LayerPlan) -> str:
        """About the weight bits of one layer under one plan."""
        layer, bits = self.layers.get(name), plan.weight_bits
        if bits == 16:
            return "kept in full precision"
        if layer is None or bits not in layer.weight_scores:
            return "not measured at these bits"
        lower = max((b for b in layer.weight_scores if b < bits), default=None)
        higher = min((b for b in layer.weight_scores if bits < b < 16), default=None)
        metric = self.metrics[layer.group]
        steps = [_step(layer, metric, bits, other) for other in (lower, higher) if other is not None]
        return "; ".join([self._rank(name, layer, lower or bits), *steps])

    def _rank(self, name: str, layer: LayerSensitivity, bits: int) -> str:
        place, count = self.ranks[name, bits]
        which = "most" if place == 1 else f"{ordinal(place)} most"
        return f"{which} sensitive of {count} {layer.group} layers at {bits}\u00a0bit"


def _step(layer: LayerSensitivity, metric: Metric, bits: int, other: int) -> str:
    """ "4 bit would save 21 KiB and lose 22.4 dB"."""
    moved = stored(layer, other) - stored(layer, bits)
    change = layer.weight_scores[other] - layer.weight_scores[bits]
    bytes_verb, score_verb = "add" if moved >= 0 else "save", "gain" if change >= 0 else "lose"
    return f"{other}\u00a0bit would {bytes_verb} {size(abs(moved))} and {score_verb} {metric.amount(abs(change))}"


def stored(layer: LayerSensitivity, bits: int) -> int:
    """Bytes of the weight at these bits, as recorded, else bits times weights."""
    return layer.weight_bytes.get(bits, ceil(layer.weight_size * bits / 8))
