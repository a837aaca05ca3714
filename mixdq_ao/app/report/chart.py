"""Scales, axes and markers of the inline SVG charts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .html import Html, join, tag


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps ``low``..``high`` to pixels ``start``..``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: list[float], start: float, end: float) -> Scale:
        """A scale for all values with 5 % of margin; a single value lies in the middle."""
        low, high = min(values), max(values)
        room = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def text(self, value: float) -> str:
        """A tick's label."""
        return f"{value:g}"

    def ticks(self, about: int = 6) -> list[float]:
        """Round values inside the scale."""
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(s for s in (power, 2 * power, 5 * power, 10 * power) if s >= rough)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


class LogScale(Scale):
    """Maps positive values by their logarithm."""

    @classmethod
    def around(cls, values: list[float], start: float, end: float) -> LogScale:
        """A scale for all values with 5 % of margin on either side."""
        room = max((max(values) / min(values)) ** 0.05, 1.1)
        return cls(min(values) / room, max(values) * room, start, end)

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def text(self, value: float) -> str:
        return f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")

    def ticks(self, about: int = 6) -> list[float]:
        """Powers of ten; 2 and 5 times them as well if these are few, only some of them if they are many."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        fine = [float(f"{m}e{e}") for e in range(first, last + 1) for m in (1, 2, 5)]
        fine, powers = ([v for v in values if self.low <= v <= self.high] for values in (fine, fine[::3]))
        return fine if len(fine) <= about + 2 else powers[:: math.ceil(len(powers) / about)]


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> Html:
    """Grid lines, ticks and titles of a chart with its origin at (x.start, y.start)."""
    parts = []
    for value in x.ticks():
        at = f"{x(value):.1f}"
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="gridline"))
        parts.append(tag("text", x.text(value), x=at, y=y.start + 18, text_anchor="middle"))
    for value in y.ticks():
        at = y(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=f"{at:.1f}", y2=f"{at:.1f}", class_="gridline"))
        parts.append(tag("text", y.text(value), x=x.start - 8, y=f"{at + 4:.1f}", text_anchor="end"))
    middle = (y.start + y.end) / 2
    turned = f"rotate(-90 16 {middle})"
    parts.append(tag("text", x_title, x=(x.start + x.end) / 2, y=y.start + 40, text_anchor="middle", class_="axis"))
    parts.append(tag("text", y_title, x=16, y=middle, text_anchor="middle", class_="axis", transform=turned))
    return join(*parts)


def marker(kind: int, x: float, y: float, title: str, class_: str, r: float = 6) -> Html:
    """Circle, square, diamond, triangle by ``kind``: objectives differ in shape as well as colour."""
    hint = tag("title", title)
    if kind % 4 == 0:
        return tag("g", hint, tag("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=r), class_=class_)
    offsets = {1: ((-1, -1), (1, -1), (1, 1), (-1, 1)), 2: ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0))}
    corners = offsets.get(kind % 4, ((0, -1.3), (1.2, 0.9), (-1.2, 0.9)))
    scale = 0.88 * r
    points = " ".join(f"{x + scale * dx:.1f},{y + scale * dy:.1f}" for dx, dy in corners)
    return tag("g", hint, tag("polygon", points=points), class_=class_)
