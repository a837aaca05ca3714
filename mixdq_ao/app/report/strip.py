"""The strip chart of one layer: its score at every bit width, weights above, activations below."""

from __future__ import annotations

from collections.abc import Mapping

from ...search.sensitivity import LayerSensitivity
from .chart import Scale
from .html import Html, tag
from .metric import Metric

WIDTH, HEIGHT, EDGE = 150, 30, 6
LANES = (("weight", "W", 9.0), ("act", "A", 22.0))


def scales(layers: Mapping[str, LayerSensitivity], metrics: Mapping[str, Metric]) -> dict[str, Scale]:
    """{group: scale}: one scale per group, so that its layers can be compared down the column."""
    found: dict[str, list[float]] = {}
    for layer in layers.values():
        values = [*layer.weight_scores.values(), *layer.act_scores.values()]
        found.setdefault(layer.group, []).extend(map(metrics[layer.group].position, values))
    return {g: Scale(min(v), max(v) + 1e-9, EDGE + 10, WIDTH - EDGE) for g, v in found.items() if v}


def strip(layer: LayerSensitivity, scale: Scale | None, metric: Metric) -> Html | None:
    """Dots coloured by bits; further left is worse."""
    if scale is None:
        return None
    parts: list[Html] = []
    for kind, letter, y in LANES:
        parts.append(tag("text", letter, x=1, y=y + 3.5))
        parts.append(tag("line", x1=scale.start, x2=scale.end, y1=y, y2=y, class_="gridline"))
        for bits, value in sorted(layer.scores(kind).items()):  # type: ignore[arg-type]
            hint = tag("title", f"{letter}{bits}: {metric.score(value)}")
            dot = tag("circle", cx=f"{scale(metric.position(value)):.1f}", cy=y, r=4)
            parts.append(tag("g", hint, dot, class_=f"b{bits}"))
    return tag("svg", parts, width=WIDTH, height=HEIGHT, viewBox=f"0 0 {WIDTH} {HEIGHT}", class_="strip", role="img")
