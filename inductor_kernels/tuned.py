"""Which tile is the default for a product: from a table of SDXL's shapes, else from a model of the machine.

``tuned.json`` says of each architecture where its tiles come from: "modelled" (:func:`roofline.seconds`; nothing was
measured) or the name of the GPU that timed them. ``benchmarks/gpu.sh tiles`` measures and replaces a table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from . import roofline, tiles
from .roofline import Product
from .tiles import Tile

PATH = Path(__file__).with_name("tuned.json")


def key(product: Product) -> str:
    """Name of a shape in the table: rows, outputs, inputs, and the taps of a convolution."""
    return f"{product.m}x{product.n}x{product.k}" + (f"/{product.taps}" if product.taps > 1 else "")


def read(text: str) -> dict[int, dict[str, Tile]]:
    """Tiles by capability and shape. Raises ValueError naming the entry that is not one of the listed tiles."""
    document: dict[str, Any] = json.loads(text)
    found: dict[int, dict[str, Tile]] = {}
    for arch, table in document.items():
        capability = int(arch.removeprefix("sm_"))
        for shape, numbers in table["tiles"].items():
            tile = Tile(*numbers) if isinstance(numbers, list) and len(numbers) == 5 else None
            if capability not in tiles.TILES or tile not in tiles.TILES[capability]:
                raise ValueError(
                    f"tuned.json: {arch} {shape} is {numbers!r}; expected a tile of tiles.TILES[{capability}]"
                )
            found.setdefault(capability, {})[shape] = tile
    return found


@functools.cache
def _table() -> dict[int, dict[str, Tile]]:
    return read(PATH.read_text())


def document(tables: Mapping[int, tuple[str, Mapping[str, Tile]]]) -> str:
    """The text of ``tuned.json``: by capability, where the tiles come from and which they are."""
    arches = []
    for capability, (source, found) in sorted(tables.items()):
        lines = [f'   "{shape}": {json.dumps(list(astuple(tile)))}' for shape, tile in sorted(found.items())]
        arches.append(
            f' "sm_{capability}": {{"source": {json.dumps(source)}, "tiles": {{\n' + ",\n".join(lines) + "\n }}"
        )
    return "{\n" + ",\n".join(arches) + "\n}\n"


def modelled(capability: int, product: Product, among: Sequence[Tile] = ()) -> Tile:
    """The tile (of all that fit, or ``among`` these) with which the model expects the product to be done first."""
    fitting, length = among or tiles.fitting(capability, product.m, product.n), product.k // product.taps

    def expected(tile: Tile) -> tuple[float, int]:
        """Of equals the larger one, which reads less."""
        return roofline.seconds(product, tiles.narrowed(tile, length), capability), -tile.m * tile.n

    return min(fitting, key=expected)


def candidates(capability: int, product: Product, *, bytes_per_code: int = 1) -> list[Tile]:
    """Tiles worth timing for a product, the default first. bytes_per_code: of an activation, 1 for integer ones."""
    known = _table().get(tiles.family(capability), {}).get(key(product))
    best = known or modelled(capability, product)
    length = product.k // product.taps
    ordered = [best, *(tile for tile in tiles.fitting(capability, product.m, product.n) if tile != best)]
    return list(dict.fromkeys(tiles.narrowed(tile, length, bytes_per_code) for tile in ordered))
