"""How a product is computed by default, with which tile and by how many programs a tile: from a table of SDXL's shapes,
else from a model of the machine.

``tuned.json`` says of each architecture where its numbers come from: "modelled" (:func:`roofline.seconds`; nothing was
measured) or the name of the GPU that timed them. ``benchmarks/gpu.sh tiles-512`` measures and replaces a table.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from . import roofline, tiles
from .roofline import Product
from .tiles import Tile

PATH = Path(__file__).with_name("tuned.json")
SHARES = (2, 3, 4, 6, 8)
GAIN = 1.2  # that the model must promise before a reduction is shared


class Way(NamedTuple):
    """A tile, and how many programs share its reduction (1: it is not shared)."""

    tile: Tile
    shares: int = 1

    def __str__(self) -> str:
        name = f"{self.tile.m}x{self.tile.n}x{self.tile.k}"
        return name if self.shares == 1 else f"{name}, {self.shares} shares"


def key(product: Product) -> str:
    """Name of a shape in the table: rows, outputs, inputs, and the taps of a convolution."""
    return f"{product.m}x{product.n}x{product.k}" + (f"/{product.taps}" if product.taps > 1 else "")


def read(text: str) -> dict[int, dict[str, Way]]:
    """Ways by capability and shape. Raises ValueError naming the entry that is not one of the listed tiles."""
    document: dict[str, Any] = json.loads(text)
    found: dict[int, dict[str, Way]] = {}
    for arch, table in document.items():
        capability = int(arch.removeprefix("sm_"))
        for shape, numbers in table["tiles"].items():
            way = _way(numbers)
            if capability not in tiles.TILES or way is None or way.tile not in tiles.TILES[capability]:
                raise ValueError(
                    f"tuned.json: {arch} {shape} is {numbers!r}; expected a tile of tiles.TILES[{capability}] and, "
                    f"where its reduction is shared, one of {SHARES}"
                )
            found.setdefault(capability, {})[shape] = way
    return found


def _way(numbers: Any) -> Way | None:
    if not isinstance(numbers, list) or len(numbers) not in (5, 6) or (numbers[5:] and numbers[5] not in SHARES):
        return None
    return Way(Tile(*numbers[:5]), *numbers[5:])


@functools.cache
def _table() -> dict[int, dict[str, Way]]:
    return read(PATH.read_text())


def document(tables: Mapping[int, tuple[str, Mapping[str, Way]]]) -> str:
    """The text of ``tuned.json``: by capability, where the ways come from and which they are."""
    arches = []
    for capability, (source, found) in sorted(tables.items()):
        lines = [f'   "{shape}": {json.dumps(_numbers(way))}' for shape, way in sorted(found.items())]
        arches.append(
            f' "sm_{capability}": {{"source": {json.dumps(source)}, "tiles": {{\n' + ",\n".join(lines) + "\n }}"
        )
    return "{\n" + ",\n".join(arches) + "\n}\n"


def _numbers(way: Way) -> list[int]:
    return [*astuple(way.tile), *([way.shares] if way.shares > 1 else [])]


def expected(capability: int, product: Product, way: Way) -> float:
    """Seconds that the model expects, with the tile no deeper than the product is long."""
    tile = tiles.narrowed(way.tile, product.k // product.taps, bits=product.bits)
    return roofline.seconds(product, tile, capability, way.shares)


def _by_model(capability: int, product: Product, ways: list[Way]) -> list[Way]:
    """Best first; of equals the larger tile, which reads less."""
    return sorted(ways, key=lambda way: (expected(capability, product, way), -way.tile.m * way.tile.n, way.shares))


def modelled(capability: int, product: Product, among: Sequence[Tile] = (), shares: int = 1) -> Tile:
    """The tile (of all that fit, or ``among`` these) with which the model expects the product to be done first."""
    fitting = among or tiles.fitting(capability, product.m, product.n)
    return _by_model(capability, product, [Way(tile, shares) for tile in fitting])[0].tile


def ranked(capability: int, product: Product) -> list[Way]:
    """Every way, in the order of the model."""
    every = [Way(t, n) for t in tiles.fitting(capability, product.m, product.n) for n in (1, *SHARES)]
    return _by_model(capability, product, every)


def modelled_way(capability: int, product: Product) -> Way:
    """What the model chooses: reductions are shared where it promises clearly more."""
    best, *others = ranked(capability, product)
    whole = next(way for way in (best, *others) if way.shares == 1)
    gain = expected(capability, product, whole) / expected(capability, product, best)
    return best if gain >= GAIN else whole


def way(capability: int, product: Product) -> Way:
    """The default for a product with integer activations."""
    known = _table().get(tiles.family(capability), {}).get(key(product))
    return known or modelled_way(capability, product)


def candidates(capability: int, product: Product, *, shares: int = 1, bytes_per_code: int = 1) -> list[Tile]:
    """Tiles worth timing for a product whose reductions so many programs share, the default first. bytes_per_code: of
    an activation, 1 for integer ones."""
    default, length = way(capability, product), product.k // product.taps
    fitting = tiles.fitting(capability, product.m, product.n, bytes_per_code=bytes_per_code)
    known = shares == default.shares and default.tile in fitting
    best = default.tile if known else modelled(capability, product, fitting, shares)
    ordered = [best, *(tile for tile in fitting if tile != best)]
    return list(dict.fromkeys(tiles.narrowed(tile, length, bytes_per_code, product.bits) for tile in ordered))
