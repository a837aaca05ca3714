"""The Pareto front: how close the pictures stay, against the bytes of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..output import counted
from .chart import Scale, axes, marker
from .html import Html, join, section, tag
from .inputs import Point
from .names import MISSING, OBJECTIVES, decibel, number, percent, size

WIDTH, HEIGHT = 760, 420
Placed = tuple[Point, float, float]


def pareto_section(points: Sequence[Point]) -> Html:
    """A chart of the plans, and its figures as a table."""
    measured = any(p.psnr is not None for p in points)
    placed = [(p, p.weight_bytes / 2**20, y) for p in points if (y := _height(p, measured)) is not None]
    if not placed:
        return Html()
    title = "PSNR, dB" if measured else "predicted SQNR, dB"
    what = (
        "the measured PSNR of the pictures" if measured else "the predicted signal-to-noise ratio of the model's output"
    )
    words = (
        f"Each mark is a plan: {what} against the bytes of its weights. Up and to the left is better. "
        "Lines join the plans that no other plan of the same search beats; a hollow grey mark is beaten by some plan "
        "that is no larger and no worse."
    )
    return section(
        "pareto",
        "Size against quality",
        tag("p", words),
        _chart(placed, title),
        tag("details", tag("summary", "As a table"), _table(points)),
    )


def _height(point: Point, measured: bool) -> float | None:
    if measured:
        return point.psnr
    return (
        -10 * math.log10(point.predicted_error)
        if point.predicted_error is not None and point.predicted_error > 0
        else None
    )


def dominated(placed: Sequence[Placed]) -> list[bool]:
    """For each plan, whether another plan is no larger and no worse, and better in one of the two."""
    return [
        any(a <= x and b >= y and (a < x or b > y) for _, a, b in placed)
        for _, x, y in placed
    ]  # fmt: skip


def _chart(placed: list[Placed], y_title: str) -> Html:
    x = Scale.around([p[1] for p in placed], 64, WIDTH - 16)
    y = Scale.around([p[2] for p in placed], HEIGHT - 52, 14)
    found = {p[0].objective for p in placed}
    objectives = [name for name in OBJECTIVES if name in found] + sorted(found - set(OBJECTIVES))
    beaten = dominated(placed)
    lines, marks = [], []
    for kind, objective in enumerate(objectives):
        own = [p for p in placed if p[0].objective == objective]
        front = sorted((p for p, bad in zip(own, dominated(own), strict=True) if not bad), key=lambda p: p[1])
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for _, a, b in front)
        lines.append(tag("polyline", points=path, class_=f"series s{kind % 4}"))
    for (point, a, b), bad in zip(placed, beaten, strict=True):
        kind = objectives.index(point.objective)
        marks.append((bad, marker(kind, x(a), y(b), _hint(point), "beaten" if bad else f"mark s{kind % 4}")))
    legend = [
        tag(
            "span", tag("svg", marker(k, 8, 8, name, f"mark s{k % 4}"), width=16, height=16), OBJECTIVES.get(name, name)
        )
        for k, name in enumerate(objectives)
    ]
    ordered = [mark for _, mark in sorted(marks, key=lambda m: not m[0])]
    label = f"{counted(len(placed), 'plan')}: {y_title} against weights in MiB; the table below holds the figures"
    drawn = join(axes(x, y, "weights, MiB", y_title), *lines, *ordered)
    svg = tag("svg", drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, class_="chart")
    return tag("figure", tag("div", svg, class_="scroll"), tag("figcaption", legend, class_="legend"))


def _hint(point: Point) -> str:
    parts = [
        OBJECTIVES.get(point.objective, point.objective),
        f"{point.weight_bits:.2f} bits",
        size(point.weight_bytes),
    ]
    parts += [decibel(point.psnr)] if point.psnr is not None else []
    parts += [f"SSIM {point.ssim:.4f}"] if point.ssim is not None else []
    parts += [f"agreement {percent(point.agreement)}"] if point.agreement is not None else []
    return ", ".join(parts)


def _table(points: Sequence[Point]) -> Html:
    head = ("Search", "Bits", "Weights", "Predicted error", "Measured", "PSNR", "SSIM", "Agreement")
    rows = (
        (
            OBJECTIVES.get(p.objective, p.objective),
            f"{p.weight_bits:.2f}",
            size(p.weight_bytes),
            MISSING if p.predicted_error is None else f"{p.predicted_error:.2e}",
            MISSING if p.measured_error is None else f"{p.measured_error:.2e}",
            decibel(p.psnr),
            number(p.ssim, 4),
            percent(p.agreement),
        )
        for p in sorted(points, key=lambda p: (p.objective, p.weight_bytes))
    )
    body = (tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:])) for row in rows)
    header = tag("thead", tag("tr", (tag("th", h, scope="col") for h in head)))
    return tag("div", tag("table", header, tag("tbody", body), class_="figures"), class_="scroll")
