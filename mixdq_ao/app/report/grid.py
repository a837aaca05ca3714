"""The picture grid: one PNG cut into cells, so that captions and column names are text."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import MixDQError
from .html import Html, join, section, tag
from .names import describe, label

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST = 256  # pixels a cell is shown at; bigger ones are scaled down so that the page stays small


@dataclass(frozen=True, slots=True)
class Grid:
    """Pictures as data URIs: ``cells[row][column]``, or ``whole`` if grid.json has no positions of cells.

    ``psnr[row][column]``: dB of 8-bit pictures against the first column; None if they are identical.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...] = ()
    whole: str | None = None
    psnr: tuple[tuple[float | None, ...], ...] = ()


def read_grid(path: Path, document: Mapping[str, Any] | None) -> Grid | None:
    """The grid, or None unless both files are there.

    ``document``: {"columns": names, "rows": captions, "cell": [width, height], "origin": [x, y], "gap": pixels}.
    Without "cell" the picture is shown as a whole.

    Raises MixDQError if the picture cannot be read or is smaller than its cells.
    """
    if document is None or not path.exists():
        return None
    columns, rows = (_texts(path, document, key) for key in ("columns", "rows"))
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise MixDQError(f"{path}: cannot be read as a picture: {e}") from e
    if document.get("cell") is None:
        return Grid(columns, rows, whole=_uri(picture))
    (width, height), (left, top) = _pixels(path, document, "cell"), _pixels(path, document, "origin")
    across, down = (v + _pixels(path, document, "gap")[0] for v in (width, height))
    corners = [[(left + c * across, top + r * down) for c in range(len(columns))] for r in range(len(rows))]
    x, y = corners[-1][-1]
    if x + width > picture.width or y + height > picture.height or not width or not height:
        raise MixDQError(
            f"{path}: is {picture.width}x{picture.height} pixels, expected {len(columns)} columns and {len(rows)} rows "
            f"of {width}x{height} from ({left}, {top})"
        )
    crops = [[picture.crop((x, y, x + width, y + height)) for x, y in row] for row in corners]
    psnr = tuple(tuple(_psnr(crop, row[0]) for crop in row) for row in crops)
    return Grid(columns, rows, tuple(tuple(_uri(crop, LARGEST) for crop in row) for row in crops), psnr=psnr)


def _psnr(picture: Image, reference: Image) -> float | None:
    """10 log10(255^2 / mean squared difference), in dB; None if there is no difference."""
    from PIL import ImageChops, ImageStat

    squares = ImageStat.Stat(ImageChops.difference(picture, reference)).sum2
    error = sum(squares) / (len(squares) * picture.width * picture.height)
    return 10 * math.log10(255**2 / error) if error else None


def _texts(path: Path, document: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = document.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) for v in values):
        raise MixDQError(f"{path.with_suffix('.json')}: {key} is {values!r:.60}, expected a list of texts")
    return tuple(values)


def _pixels(path: Path, document: Mapping[str, Any], key: str) -> tuple[int, int]:
    """A field of grid.json that is [x, y] or one number for both; 0 if it is missing."""
    value = document.get(key, 0)
    pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(type(v) is int and v >= 0 for v in pair):
        raise MixDQError(f"{path.with_suffix('.json')}: {key} is {value!r:.60}, expected whole pixels")
    return pair[0], pair[1]


def _uri(picture: Image, largest: int | None = None) -> str:
    if largest is not None:
        picture.thumbnail((largest, largest))
    data = io.BytesIO()
    picture.save(data, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def grid_section(grid: Grid | None) -> Html:
    """A table of pictures: a row per caption, a column per variant."""
    if grid is None:
        return Html()
    shown = _whole(grid) if grid.whole else _table(grid)
    intro = "Each row is one caption, drawn from the same noise by every variant."
    return section("pictures", "Pictures", tag("p", intro), None if grid.whole else _compare(grid), shown)


def _compare(grid: Grid) -> Html:
    """Two pictures on top of each other with a slider between them; the script fills it from the table and shows it."""
    captions = tag("select", (tag("option", text, value=i) for i, text in enumerate(grid.rows)), id="compare-row")
    variants = [label(name) for name in grid.columns]
    last = len(variants) - 1
    left, right = (
        tag(
            "select",
            (tag("option", text, value=i, selected=i == chosen) for i, text in enumerate(variants)),
            id=f"compare-{side}",
        )
        for side, chosen in (("left", 0), ("right", last))
    )
    slider = tag("input", type="range", id="compare-at", min=0, max=100, value=50, aria_label="Where the right begins")
    return tag(
        "div",
        tag("div", tag("div", id="compare-stage", class_="stage"), slider),
        tag(
            "div",
            tag("label", "Caption ", captions),
            tag("label", "Left ", left),
            tag("label", "Right ", right),
            tag("label", tag("input", type="checkbox", id="compare-difference"), " difference, 8 times"),
            tag("p", "", id="compare-said", role="status"),
            tag("p", "Drag over the picture. A click on a picture in the table brings it here.", class_="note"),
            class_="choices",
        ),
        id="compare",
        class_="compare",
        hidden=True,
    )


def _table(grid: Grid) -> Html:
    head = [tag("th", label(name), scope="col", title=describe(name)) for name in grid.columns]
    table = tag(
        "table",
        tag("thead", tag("tr", tag("th", "Caption", scope="col"), head)),
        tag("tbody", (_row(grid, i) for i in range(len(grid.rows)))),
        class_="pictures",
    )
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="Pictures")


def _whole(grid: Grid) -> Html:
    """The whole picture, with the names of its columns and rows as text below."""
    alt = f"{len(grid.rows)} captions down, {len(grid.columns)} variants across"
    picture = tag("img", src=grid.whole, alt=alt, class_="whole")
    columns = "Columns: " + ", ".join(label(name) for name in grid.columns) + ". Rows:"
    box = tag("div", picture, class_="scroll", tabindex="0", role="region", aria_label="Pictures")
    return join(box, tag("p", columns), tag("ol", (tag("li", caption) for caption in grid.rows)))


def _row(grid: Grid, i: int) -> Html:
    caption = grid.rows[i]
    images = [
        tag(
            "td",
            tag("img", src=uri, alt=f"{label(name)}: {caption}", title=f"{label(name)}: {caption}"),
            data_psnr=None if psnr is None else f"{psnr:.1f}",
        )
        for name, uri, psnr in zip(grid.columns, grid.cells[i], grid.psnr[i], strict=True)
    ]
    return tag("tr", tag("th", caption, scope="row"), images)
