"""The default tile of a product, and how many programs share its reduction: from a table of SDXL's shapes, for other
shapes from a model of the machine.

``tuned.json`` names the source of each architecture's table: "modelled" (:func:`roofline.seconds`; nothing was
measured) or the GPU that timed it. ``benchmarks/gpu.sh tiles-512`` measures a table and replaces it.
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
SHARES = (2, 3, 4, 6, 8)  # numbers of programs that may share a reduction
GAIN = 1.2  # modelled speedup from which a reduction is shared: a margin, chosen by hand, for the errors of the model


class Way(NamedTuple):
    """A tile, and how many programs share its reduction (1: it is not shared)."""

    tile: Tile
    shares: int = 1

    def __str__(self) -> str:
        name = f"{self.tile.m}x{self.tile.n}x{self.tile.k}"
        return name if self.shares == 1 else f"{name}, {self.shares} shares"


def key(product: Product) -> str:
    """A shape's key in the table: rows x outputs x inputs, with the taps of a convolution."""
    return f"{product.m}x{product.n}x{product.k}" + (f"/{product.taps}" if product.taps > 1 else "")


def read(text: str) -> dict[int, dict[str, Way]]:
    """The ways in the text of ``tuned.json``, by capability and shape. Raises ValueError naming an entry whose tile is
    not listed."""
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
    """The text of ``tuned.json``. ``tables``: (source, ways by shape) by capability."""
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
    """Seconds by the model, with the tile no deeper than the product is long."""
    tile = tiles.narrowed(way.tile, product.k // product.taps, bits=product.bits)
    return roofline.seconds(product, tile, capability, way.shares)


def _by_model(capability: int, product: Product, ways: list[Way]) -> list[Way]:
    """``ways``, the fastest first; of equally fast ones the larger tile first, which reads less."""
    return sorted(ways, key=lambda way: (expected(capability, product, way), -way.tile.m * way.tile.n, way.shares))


def modelled(capability: int, product: Product, among: Sequence[Tile] = (), shares: int = 1) -> Tile:
    """The tile (of all that fit, or of ``among``) that is fastest by the model."""
    fitting = among or tiles.fitting(capability, product.m, product.n)
    return _by_model(capability, product, [Way(tile, shares) for tile in fitting])[0].tile


def ranked(capability: int, product: Product) -> list[Way]:
    """Every way, the fastest by the model first."""
    every = [Way(t, n) for t in tiles.fitting(capability, product.m, product.n) for n in (1, *SHARES)]
    return _by_model(capability, product, every)


def modelled_way(capability: int, product: Product) -> Way:
    """The fastest way by the model; a reduction is shared only for a speedup of at least ``GAIN``."""
    best, *others = ranked(capability, product)
    whole = next(way for way in (best, *others) if way.shares == 1)
    gain = expected(capability, product, whole) / expected(capability, product, best)
    return best if gain >= GAIN else whole


def way(capability: int, product: Product) -> Way:
    """The default way for a product with integer activations."""
    known = _table().get(tiles.family(capability), {}).get(key(product))
    return known or modelled_way(capability, product)


def candidates(capability: int, product: Product, *, shares: int = 1, bytes_per_code: int = 1) -> list[Tile]:
    """Tiles to time for a product, the default first. shares: how many programs share a reduction; bytes_per_code: size
    of an activation, 1 for integer ones."""
    default, length = way(capability, product), product.k // product.taps
    fitting = tiles.fitting(capability, product.m, product.n, bytes_per_code=bytes_per_code)
    known = shares == default.shares and default.tile in fitting
    best = default.tile if known else modelled(capability, product, fitting, shares)
    ordered = [best, *(tile for tile in fitting if tile != best)]
    return list(dict.fromkeys(tiles.narrowed(tile, length, bytes_per_code, product.bits) for tile in ordered))
