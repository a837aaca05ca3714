"""The picture grid: a column per variant, a row per prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..evaluate.pictures import to_bytes
from ..evaluate.resize import to_pillow
from ..jsonfile import write_document

SCALE, GAP, HEADER = 2, 6, 30


def save_grid(directory: Path, columns: Mapping[str, Tensor], captions: Sequence[str]) -> None:
    """Writes grid.png, with the variants' names above the columns, and grid.json, with names and captions as text and
    the positions of the cells in pixels.

    ``columns``: {name: pictures [N, 3, H, W] in [0, 1]}, with the same N prompts and seeds in each.
    """
    first = next(iter(columns.values()))
    height, width = (SCALE * s + GAP for s in first.shape[-2:])
    sheet = Image.new("RGB", (GAP + width * len(columns), HEADER + height * len(first)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for x, (name, images) in enumerate(columns.items()):
        centre = GAP + x * width + (width - GAP) / 2
        draw.text((centre, HEADER / 2), name, fill="black", font=font, anchor="mm")
        for y, image in enumerate(to_bytes(images)):
            sheet.paste(_picture(image), (GAP + x * width, HEADER + y * height))
    sheet.save(directory / "grid.png", optimize=True)
    where = {"cell": [width - GAP, height - GAP], "origin": [GAP, HEADER], "gap": GAP}
    write_document(directory / "grid.json", {"columns": list(columns), "rows": list(captions), **where})


def _picture(image: Tensor) -> Image.Image:
    picture = to_pillow(image)
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)
