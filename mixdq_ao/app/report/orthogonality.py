"""The section on network orthogonality: correlations of layers' outputs as a picture, and the importance of layers."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .html import Html, breakable, join, section, tag
from .names import block_of

if TYPE_CHECKING:
    from ...search.orthogonality import Orthogonality

COLOURS = np.array([(68, 1, 84), (49, 104, 142), (53, 183, 121), (253, 231, 37)], dtype=np.float64)
"""Colours from no correlation to identical outputs, evenly spaced."""
SIDE, LEFT = 600, 150
PICTURES, LISTED = 4, 8
"""The numbers of steps shown beside the mean, and of layers listed at either end."""


def orthogonality_section(found: Orthogonality | None) -> Html:
    """The mean matrix with its blocks, some steps beside each other, and the layers at both ends."""
    if found is None:
        return Html()
    low = min(0.0, float(found.matrices.min()))
    mean = np.array(found.aggregated())
    constant = int((np.diagonal(mean) == 0).sum())
    many = len(found.sampled)
    intro = (
        f"Correlation of the outputs of each pair of {len(found.names)} layers over the samples ({found.estimator} "
        f"centred linear CKA), layers in the order of the model: the mean of {many} of {found.steps} denoising steps. "
        "MPQ-Diff takes a layer for important where it correlates little with the others; no error is measured."
    )
    dark = f" Layers whose output is the same for every sample correlate with none: {constant}." if constant else ""
    return section(
        "orthogonality",
        "How layers correlate",
        tag("p", intro + dark),
        tag("figure", tag("div", _matrix(mean, found.names, low), class_="scroll"), _key(low)),
        _steps(found, low) if many > 1 else None,
        tag("h3", "Most and least important"),
        _table(found),
    )


def png(matrix: NDArray[np.float64], low: float) -> str:
    """The matrix as a data URI, a pixel an entry; ``low`` to 1 from dark to bright."""
    from PIL import Image

    place = np.clip((matrix - low) / (1 - low), 0, 1) * (len(COLOURS) - 1)
    channels = [np.interp(place, np.arange(len(COLOURS)), COLOURS[:, c]) for c in range(3)]
    data = io.BytesIO()
    Image.fromarray(np.stack(channels, -1).round().astype(np.uint8)).save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def _matrix(matrix: NDArray[np.float64], names: Sequence[str], low: float) -> Html:
    """The picture with the names of the blocks at its left and lines between them."""
    image = tag("image", href=png(matrix, low), x=LEFT, y=0, width=SIDE, height=SIDE, class_="pixels")
    parts, start = [image], 0
    for block, members in itertools.groupby(names, block_of):
        stop = start + len(list(members))
        top, bottom = (SIDE * i / len(names) for i in (start, stop))
        if bottom - top >= 12:
            parts.append(tag("text", block, x=LEFT - 8, y=f"{(top + bottom) / 2 + 4:.1f}", text_anchor="end"))
        if start:
            parts.append(tag("line", x1=LEFT - 6, x2=LEFT + SIDE, y1=f"{top:.1f}", y2=f"{top:.1f}", class_="cut"))
            across = f"{LEFT + top:.1f}"
            parts.append(tag("line", x1=across, x2=across, y1=0, y2=SIDE, class_="cut"))
        start = stop
    label = f"correlation matrix of {len(names)} layers"
    box = f"0 0 {LEFT + SIDE} {SIDE}"
    return tag("svg", parts, viewBox=box, role="img", aria_label=label, class_="chart matrix")


def _key(low: float) -> Html:
    colours = ", ".join(f"rgb({r:.0f},{g:.0f},{b:.0f})" for r, g, b in COLOURS)
    bar = tag("i", class_="ramp", style=f"background:linear-gradient(90deg,{colours})")
    return tag("figcaption", tag("span", f"{low:.2g}", bar, "1"), class_="legend")


def _steps(found: Orthogonality, low: float) -> Html:
    places = np.unique(np.linspace(0, len(found.sampled) - 1, PICTURES).round().astype(int)).tolist()
    pictures = [
        tag(
            "figure",
            tag(
                "img",
                src=png(found.matrices[p], low),
                alt=f"correlations at step {found.sampled[p] + 1}",
                class_="pixels",
            ),
            tag("figcaption", f"step {found.sampled[p] + 1}"),
        )
        for p in places
    ]
    return join(tag("h3", "Step by step"), tag("div", pictures, class_="small-multiples"))


def _table(found: Orthogonality) -> Html:
    """The most and least important layers; all layers if there are few."""
    ranked = sorted(found.importance().items(), key=lambda item: -item[1])
    shown = ranked if len(ranked) <= 2 * LISTED else [*ranked[:LISTED], None, *ranked[-LISTED:]]
    rows = [
        tag("tr", tag("th", "…", scope="row"), tag("td"))
        if entry is None
        else tag("tr", tag("th", breakable(entry[0]), scope="row"), tag("td", f"{entry[1]:.3f}"))
        for entry in shown
    ]
    head = tag("thead", tag("tr", (tag("th", h, scope="col") for h in ("Layer", "Importance"))))
    return tag("div", tag("table", head, tag("tbody", rows), class_="figures narrow"), class_="scroll fit")
