"""Times the tiles of SDXL's products on this GPU and puts the fastest into ``inductor_kernels/tuned.json``."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

import inductor_kernels.ops  # noqa: F401
from inductor_kernels import compat, tiles, tuned
from inductor_kernels.roofline import Product
from inductor_kernels.tuned import Way

from . import kernels
from .results import failure
from .timing import captured, interleaved

OPS = torch.ops.inductor_kernels
TRIED = 4  # tiles of each shape, as the model ranks them
SHARED = 2  # and ways to share its reductions


def _call(product: Product, way: Way, device: str):
    """The product of 4-bit weights (the slower ones to unpack) done this way."""
    n, length = product.n, product.k // product.taps
    if product.taps > 1:
        size, kernel = kernels.square(product)
        x = torch.randint(-128, 128, (1, size, size, length), dtype=torch.int8, device=device)
        p = kernels.weights((n, kernel, kernel, length), 4, device)
        rest = (4, [1, 1], [kernel // 2] * 2, [1, 1], 1, torch.float16)
        fn = functools.partial(lambda *a: OPS.conv2d(*a), x, *p, *rest)
    else:
        x = torch.randint(-128, 128, (product.m, length), dtype=torch.int8, device=device)
        fn = functools.partial(
            lambda *a: OPS.linear(*a), x, *kernels.weights((n, length), 4, device), None, 4, torch.float16
        )
    torch._dynamo.reset()
    compiled = torch.compile(fn.func, fullgraph=True)
    only = mock.patch.object(tuned, "candidates", lambda *a, **k: [tiles.narrowed(way.tile, length)])
    shared = mock.patch.object(tuned, "way", lambda *a: way)
    with only, shared, compat.config.patch(force_disable_caches=True):  # caches know the graph, not the tile
        return captured(functools.partial(compiled, *fn.args))


def ranked(capability: int, product: Product) -> list[Way]:
    """The ways worth timing, in the order of the model."""
    every = tuned.ranked(capability, product)
    kept = [way for way in every if way.shares == 1][:TRIED] + [way for way in every if way.shares > 1][:SHARED]
    return [way for way in every if way in kept]


def sweep(pixels: int, out: Path, *, first: int = 0, dry: bool) -> Iterator[dict]:
    """One row for each shape: milliseconds by tile, the fastest, and what the model had chosen. A sweep that is cut off
    has put into the table what it has timed; the next goes on from its ``first`` shape, counted from 0."""
    device = "cpu" if dry else "cuda"
    number = 90 if dry else 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    path = out / "tuned.json" if dry else tuned.PATH
    source = "dry run, not measured" if dry else torch.cuda.get_device_name()
    shapes, found = kernels.weighed(pixels), {}
    for product in [kernels.small(p) for p in shapes[:2]] if dry else shapes[first:]:
        calls = {}
        row: dict = {"what": tuned.key(product)}
        for way in ranked(number, product):
            name = f"{way} ({way.tile.stages} stages, {way.tile.warps} warps)"
            try:
                calls[name] = way, _call(product, way, device)
            except Exception as error:
                row[f"{name} error"] = failure(error)["error"]
        if calls:
            times = interleaved({name: call for name, (_, call) in calls.items()}, 2 if dry else 15)
            fastest = min(times, key=lambda name: times[name])
            found[tuned.key(product)] = calls[fastest][0]
            _write(path, tiles.family(number), source, found)
            if not dry:
                shutil.copy(path, out / "tuned.json")
            row |= {
                "fastest": fastest,
                "modelled": next(iter(times)),
                "gain": next(iter(times.values())) / times[fastest],
            }
            row |= {f"{name} ms": value for name, value in times.items()}
        yield row


def _write(path: Path, capability: int, source: str, found: dict[str, Way]) -> None:
    """What was timed here replaces what was known of those shapes, and the source says so once anything was."""
    text = (path if path.exists() else tuned.PATH).read_text()
    sources = {int(arch[3:]): table["source"] for arch, table in json.loads(text).items()}
    tables = {c: (sources[c], known) for c, known in tuned.read(text).items()}
    before, known = tables.get(capability, ("", {}))
    before = before.removeprefix(f"{source}; other shapes ")
    here = f"{source}; other shapes {before}" if "not measured" in before and set(known) - set(found) else source
    tables[capability] = here, known | found
    path.write_text(tuned.document(tables))
