"""The README's pictures are cells of the demo's grid, rearranged."""

from __future__ import annotations

import torch
from PIL import Image

from benchmarks.pictures import LABELS, ROWS, strip
from mixdq_ao.app.grid import save_grid
from mixdq_ao.jsonfile import read_object


def test_each_cell_is_that_of_its_variant_and_caption(tmp_path):
    names = ["naive_w4a8", *reversed(ROWS)]  # other order, one that is not shown
    pictures = torch.rand(len(names), 3, 3, 4, 5)
    save_grid(tmp_path, dict(zip(names, pictures, strict=True)), ["one", "two", "three"])
    where = read_object(tmp_path / "grid.json", ValueError)
    with Image.open(tmp_path / "grid.png") as grid:
        sheet = strip(grid.convert("RGB"), where, dict.fromkeys(names, {"weight_bytes": 2**20}))
    (width, height), gap = where["cell"], where["gap"]
    for y, name in enumerate(ROWS):
        for x, picture in enumerate(pictures[names.index(name)]):
            corner = LABELS + x * (width + gap), y * (height + gap)
            expected = tuple((picture[:, 0, 0] * 255).round().int().tolist())
            assert sheet.getpixel(corner) == expected
