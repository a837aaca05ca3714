"""The section on predictions: predicted against measured errors of plans on this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from .chart import LogScale, axes, marker
from .html import Html, join, section, tag
from .inputs import Inputs
from .names import MISSING, OBJECTIVES, plan_label, significant

SQUARE = 420


@dataclass(frozen=True, slots=True)
class Pair:
    """Relative error powers of the model's output, of one plan."""

    name: str
    predicted: float
    measured: float


def prediction_section(inputs: Inputs) -> Html:
    """A chart, its figures as a table, and the agreement over random plans if measured; empty without a pair."""
    pairs = _pairs(inputs)
    if not pairs:
        return Html()
    words = (
        "The program adds the errors of single layers. Whether they add up is a property of the model: here is what "
        "that sum said of each plan, and what the whole plan was then measured to do to the model's output, both as "
        "parts of the output's power. The line is where they are the same."
    )
    ratios = [p.measured / p.predicted for p in pairs]
    count = f"{len(pairs)} plans" if len(pairs) > 1 else "one plan"
    said = f"Measured over predicted, {count}: {_range(ratios)}."
    return section(
        "prediction",
        "Predicted against measured",
        tag("p", words),
        _chart(pairs) if len(pairs) > 1 else None,
        tag("p", said),
        *(tag("p", text) for text in _agreements(inputs)),
        tag("details", tag("summary", "As a table"), _table(pairs)),
    )


def _pairs(inputs: Inputs) -> list[Pair]:
    points = [
        (f"{OBJECTIVES.get(p.objective, p.objective)}, {p.weight_bits:.2f} bits", p.predicted_error, p.measured_error)
        for p in inputs.points
    ]
    plans = [
        (plan_label(stem), plan.metadata.get("predicted_error"), plan.metadata.get("measured_error"))
        for stem, plan in inputs.plans.items()
    ]
    return [Pair(n, float(p), float(m)) for n, p, m in (*plans, *points) if _positive(p) and _positive(m)]  # type: ignore[arg-type]


def _positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300  # type: ignore[operator]


def _finite(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _range(ratios: list[float]) -> str:
    low, high = significant(min(ratios)), significant(max(ratios))
    return low if len(ratios) == 1 else f"{significant(median(ratios))} in the middle, from {low} to {high}"


def _agreements(inputs: Inputs) -> list[str]:
    """Results of ``mixdq allocate --check``, once for all plans of one run."""
    found: dict[str, None] = {}
    for plan in inputs.plans.values():
        agreement: Any = plan.metadata.get("prediction_agreement")
        if isinstance(agreement, Mapping) and _finite(agreement.get("rank")) and _positive(agreement.get("plans")):
            found[
                f"{agreement['plans']} random plans, measured too: rank correlation {agreement['rank']:.3f} with their "
                f"predictions{_gap(agreement)}."
            ] = None
    return list(found)


def _gap(agreement: Mapping[str, Any]) -> str:
    ratio, spread = agreement.get("ratio"), agreement.get("spread")
    if not _positive(ratio) or not _finite(spread):
        return ""
    return f"; measured over predicted {significant(ratio)} in the middle, spread {100 * spread:.0f} %"  # type: ignore[operator]


def _chart(pairs: list[Pair]) -> Html:
    values = [v for p in pairs for v in (p.predicted, p.measured)]
    x, y = LogScale.around(values, 64, SQUARE - 16), LogScale.around(values, SQUARE - 52, 14)
    line = tag("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="same")
    marks = [marker(0, x(p.predicted), y(p.measured), _hint(p), "mark s0", 5) for p in pairs]
    label = f"{len(pairs)} plans: measured error against predicted; the table below holds the figures"
    drawn = join(axes(x, y, "predicted", "measured"), line, *marks)
    svg = tag("svg", drawn, viewBox=f"0 0 {SQUARE} {SQUARE}", role="img", aria_label=label, class_="chart square")
    return tag("figure", tag("div", svg, class_="scroll"))


def _hint(pair: Pair) -> str:
    return f"{pair.name}: predicted {pair.predicted:.2e}, measured {pair.measured:.2e}"


def _table(pairs: list[Pair]) -> Html:
    header = tag("thead", tag("tr", (tag("th", h, scope="col") for h in ("Plan", "Predicted", "Measured", "Ratio"))))
    rows = (
        tag(
            "tr",
            tag("th", p.name or MISSING, scope="row"),
            tag("td", f"{p.predicted:.2e}"),
            tag("td", f"{p.measured:.2e}"),
            tag("td", f"{p.measured / p.predicted:.2f}"),
        )
        for p in pairs
    )
    return tag("div", tag("table", header, tag("tbody", rows), class_="figures"), class_="scroll")
