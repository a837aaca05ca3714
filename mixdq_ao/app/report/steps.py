"""A schedule as a strip: one cell a denoising step, coloured by its level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .html import Html, tag

COLOURS = 6
"""Classes l0 to l5 of the style sheet, from precise to cheap."""


def level_class(place: int) -> str:
    return f"l{place % COLOURS}"


def steps_strip(steps: Sequence[str], levels: Iterable[str], *, mini: bool = False) -> Html:
    """``levels``: all names, precise first. ``mini``: without text, for a row of a table."""
    places = {name: i for i, name in enumerate(levels)}
    cells = [
        tag("span", None if mini else name, class_=level_class(places[name]), title=f"step {i}: {name}")
        for i, name in enumerate(steps, 1)
    ]
    label = ", ".join(f"{i} {name}" for i, name in enumerate(steps, 1))
    return tag(
        "div", cells, class_="steps mini" if mini else "steps", role="img", aria_label=f"levels by step: {label}"
    )


def levels_legend(costs: Mapping[str, float | None]) -> Html:
    """The legend of levels, with their relative costs if known."""
    items = [
        tag("span", tag("i", class_=f"swatch {level_class(k)}"), name if cost is None else f"{name}, cost {cost:g}")
        for k, (name, cost) in enumerate(costs.items())
    ]
    return tag("p", items, class_="legend")
