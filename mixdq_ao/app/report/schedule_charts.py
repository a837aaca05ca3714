"""Charts of measured schedules: error per step, error against cost, predicted against measured error."""

from __future__ import annotations

from ...temporal.results import Additivity, ScheduleResults
from .chart import LogScale, Scale, axes, marker
from .html import Html, join, tag
from .names import significant
from .steps import level_class

WIDTH, HEIGHT = 760, 360
SQUARE = 400
KINDS = {"uniform": (1, "s1"), "first": (3, "l4"), "last": (2, "s3"), "spread": (1, "s2"), "found": (0, "s0")}
"""{first word of a name: (marker, colour)}, the last one on top."""


def kind_of(name: str) -> str:
    """The first word of a schedule's name if it says how the schedule was made, else ""."""
    word = name.partition(" ")[0]
    return word if word in KINDS else ""


def step_chart(results: ScheduleResults) -> Html:
    """A line for each level: the error with one step alone at that level, for each step."""
    found = {n: v for n, v in results.step_errors().items() if any(e > 0 for e, _ in v)}
    errors = [e for shares in found.values() for e, _ in shares if e > 0]
    if not errors:
        return tag("p", "Nothing of that kind was measured.", class_="note")
    x, y = _Steps(0.5, results.steps + 0.5, 64, WIDTH - 16), LogScale.around(errors, HEIGHT - 52, 14)
    parts = []
    for place, level in enumerate(results.levels):
        points = [(i, e, n) for i, (e, n) in enumerate(found.get(level, ()), 1) if e > 0]
        line = " ".join(f"{x(i):.1f},{y(e):.1f}" for i, e, _ in points)
        parts.append(tag("polyline", points=line, class_=f"series {level_class(place)}"))
        for i, e, n in points:
            words = f"step {i} at {level}: {significant(e)}" + (f", shared by {n} steps" if n > 1 else "")
            parts.append(marker(place - 1, x(i), y(e), words, f"{'hollow' if n > 1 else 'mark'} {level_class(place)}"))
    return _figure(axes(x, y, "denoising step", "error"), parts, "error of each step by level")


class _Steps(Scale):
    """Ticks at whole steps only."""

    def ticks(self, about: int = 20) -> list[float]:
        last = int(self.high)
        return [float(i) for i in range(1, last + 1, -(-last // about))]


def pareto_chart(results: ScheduleResults) -> Html:
    """Every measured schedule, named ones on top; found ones joined."""
    placed = {s: (results.cost(s), e) for s, e in results.measured.items() if e > 0}
    if not placed:
        return tag("p", "Every measured schedule is without error.", class_="note")
    x = Scale.around([c for c, _ in placed.values()], 64, WIDTH - 16)
    y = LogScale.around([e for _, e in placed.values()], HEIGHT + 8, 14)
    dots = [tag("circle", cx=f"{x(c):.1f}", cy=f"{y(e):.1f}", r=2) for c, e in placed.values()]
    parts = [tag("g", dots, class_="dots")]
    for kind, (shape, colour) in KINDS.items():
        named = [(n, *placed[s]) for n, s in results.named.items() if kind_of(n) == kind and s in placed]
        if kind == "found":
            line = " ".join(f"{x(c):.1f},{y(e):.1f}" for _, c, e in sorted(named, key=lambda p: p[1]))
            parts.append(tag("polyline", points=line, class_=f"series {colour}"))
        radius = 7 if kind in ("found", "uniform") else 5
        for name, cost, error in named:
            words = f"{name}: cost {cost:.3f}, error {significant(error)}"
            parts.append(marker(shape, x(cost), y(error), words, f"mark {colour}", radius))
    svg = _figure(axes(x, y, "mean cost of a step", "error"), parts, "error against cost", HEIGHT + 60)
    items = [
        tag("span", tag("svg", marker(shape, 8, 8, kind, f"mark {colour}"), width=16, height=16), words)
        for (kind, (shape, colour)), words in zip(
            KINDS.items(),
            ("one level", "first steps precise", "last steps precise", "precise steps spread", "found by the search"),
            strict=True,
        )
    ]
    return join(svg, tag("p", items, class_="legend"))


def added_chart(name: str, added: Additivity) -> Html:
    """Measured against predicted errors of random schedules, with the line where they are the same."""
    pairs = [(p, m) for p, m in zip(added.predicted, added.measured, strict=True) if p > 0 and m > 0]
    if not pairs:
        return Html()
    values = [v for pair in pairs for v in pair]
    x, y = LogScale.around(values, 64, SQUARE - 16), LogScale.around(values, SQUARE - 52, 14)
    diagonal = tag("line", x1=x.start, y1=y.start, x2=x.end, y2=y.end, class_="same")
    marks = [
        marker(0, x(p), y(m), f"predicted {significant(p)}, measured {significant(m)}", "mark s0", 5) for p, m in pairs
    ]
    drawn = axes(x, y, "sum of single steps", "measured")
    return _figure(drawn, [diagonal, *marks], f"{name}: measured against predicted", SQUARE, SQUARE)


def _figure(drawn: Html, parts: list[Html], label: str, height: int = HEIGHT, width: int = WIDTH) -> Html:
    class_ = "chart" if width == WIDTH else "chart square"
    svg = tag("svg", drawn, parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_=class_)
    caption = tag("figcaption", label) if width != WIDTH else None
    return tag("figure", tag("div", svg, class_="scroll"), caption)
