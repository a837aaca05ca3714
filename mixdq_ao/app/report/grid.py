"""The picture grid: one PNG cut into cells, so that captions and column names are text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MixDQError
from .html import Html, section, tag
from .names import describe, label

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 256  # pixels a cell is shown at; bigger ones are scaled down so that the page stays small


@dataclass(frozen=True, slots=True)
class Grid:
    """Pictures as data URIs: ``cells[row][column]``."""

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]


def read_grid(path: Path, document: Mapping[str, Any] | None) -> Grid | None:
    """The grid, or None unless both files are there. ``document``: {"columns": names, "rows": captions, "gap": pixels}.

    Raises MixDQError when the picture cannot be read or does not divide into the cells.
    """
    if document is None or not path.exists():
        return None
    columns, rows = (_texts(path, document, key) for key in ("columns", "rows"))
    gap = document.get("gap", 0)
    if type(gap) is not int or gap < 0:
        raise MixDQError(f"{path.with_suffix('.json')}: gap is {gap!r}, expected pixels between the cells")
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise MixDQError(f"{path}: cannot be read as a picture: {e}") from e
    cell = [(extent + gap) / len(names) - gap for extent, names in zip(picture.size, (columns, rows), strict=True)]
    if any(side < 1 or side != int(side) for side in cell):
        raise MixDQError(
            f"{path}: is {picture.width}x{picture.height} pixels, expected {len(columns)} columns and {len(rows)} rows "
            f"of equal size, {gap} pixels apart"
        )
    width, height = int(cell[0]), int(cell[1])
    corners = [[(c * (width + gap), r * (height + gap)) for c in range(len(columns))] for r in range(len(rows))]
    cells = tuple(tuple(_uri(picture.crop((x, y, x + width, y + height))) for x, y in row) for row in corners)
    return Grid(columns, rows, cells)


def _texts(path: Path, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = document.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise MixDQError(f"{path.with_suffix('.json')}: {key} is {values!r:.60}, expected a list of texts")
    return tuple(values)


def _uri(picture: Image) -> str:
    picture.thumbnail((LARGEST, LARGEST))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def grid_section(grid: Grid | None) -> Html:
    """Captions down, variants across."""
    if grid is None:
        return Html()
    head = [tag("th", label(name), scope="col", title=describe(name)) for name in grid.columns]
    return section(
        "pictures",
        "Pictures",
        tag("p", "Each row is one caption, drawn from the same noise by every variant."),
        tag(
            "div",
            tag(
                "table",
                tag("thead", tag("tr", tag("th", "Caption", scope="col"), head)),
                tag("tbody", (_row(grid, i) for i in range(len(grid.rows)))),
                class_="pictures",
            ),
            class_="scroll",
            tabindex="0",
            role="region",
            aria_label="Pictures",
        ),
    )


def _row(grid: Grid, i: int) -> Html:
    caption = grid.rows[i]
    images = [
        tag("td", tag("img", src=uri, alt=f"{label(name)}: {caption}", title=f"{label(name)}: {caption}"))
        for name, uri in zip(grid.columns, grid.cells[i], strict=True)
    ]
    return tag("tr", tag("th", caption, scope="row"), images)
