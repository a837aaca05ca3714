"""The README's pictures, cut from those of a demo: a row for each variant, a column for each caption.

    make demo && python -m benchmarks.pictures [--demo out/demo] [--out docs/pictures.png]

Sizes beside the rows are those of the same demo's results.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from mixdq_ao.errors import MixDQError
from mixdq_ao.jsonfile import read_object

ROWS = {
    "fp32": "full precision",
    "naive_w8a8": "W8A8, min-max",
    "bos_w4a8": "W4A8, BOS apart",
    "mixdq_w4a8": "W4A8, MixDQ",
    "mixdq_w3a8": "W3A8, MixDQ",
}
LABELS = 190
"""Width of the column of labels, pixels."""


def strip(grid: Image.Image, where: dict[str, Any], variants: dict[str, Any]) -> Image.Image:
    """The sheet. ``grid``, ``where``: grid.png and grid.json; ``variants``: those of results.json."""
    (width, height), (left, top), gap = where["cell"], where["origin"], where["gap"]
    count = len(where["rows"])
    sheet = Image.new("RGB", (LABELS + (width + gap) * count, (height + gap) * len(ROWS) - gap), "white")
    draw, bold, small = ImageDraw.Draw(sheet), ImageFont.load_default(20), ImageFont.load_default(16)
    for y, (name, label) in enumerate(ROWS.items()):
        middle = y * (height + gap) + height / 2
        size = f"{variants[name]['weight_bytes'] / 2**20:.1f} MiB"
        draw.text((LABELS - 14, middle - 2), label, fill="black", font=bold, anchor="rb")
        draw.text((LABELS - 14, middle + 6), size, fill="dimgray", font=small, anchor="rt")
        x = left + where["columns"].index(name) * (width + gap)
        for column in range(count):
            above = top + column * (height + gap)
            cell = grid.crop((x, above, x + width, above + height))
            sheet.paste(cell, (LABELS + column * (width + gap), y * (height + gap)))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("out/demo"), help="what make demo wrote")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures.png")
    options = parser.parse_args()
    where = read_object(options.demo / "grid.json", MixDQError, "; run make demo")
    variants = read_object(options.demo / "results.json", MixDQError, "; run make demo")["variants"]
    with Image.open(options.demo / "grid.png") as grid:
        strip(grid.convert("RGB"), where, variants).save(options.out, optimize=True)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
