"""Tiles of the kernels: which is the default for SDXL's shapes, and what the assembler says of every one.

    python -m benchmarks.tiles table                          the modelled part of inductor_kernels/tuned.json
    python -m benchmarks.tiles compile [--arch 80 90 ...] [--limit SECONDS]
                                                              benchmarks/results/tiles.json and .md, resumable
    python -m benchmarks.tiles roofline                       benchmarks/results/roofline.md

None of it needs a GPU; ``benchmarks/gpu.sh tiles-512 tiles-1024`` times tiles on one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from inductor_kernels import roofline, tiles, tuned
from inductor_kernels.roofline import MACHINES, Product
from mixdq_ao.jsonfile import write_document

from .shapes import products

RESULTS = Path(__file__).parent / "results"
MODELLED = "modelled (roofline.seconds), not measured"
SIZES = (512, 1024)
BATCHES = (1, 2, 4)


def modelled_tables() -> dict[int, tuple[str, dict[str, tuned.Way]]]:
    """The model's choice for every shape of SDXL's UNet on every architecture."""
    shapes = {replace(p, m=p.m * batch) for size in SIZES for p in products(size) for batch in BATCHES}
    return {c: (MODELLED, {tuned.key(p): tuned.modelled_way(c, p) for p in shapes}) for c in tiles.TILES}


def write_table() -> None:
    """Measured tables stay as they are."""
    tables: dict[int, tuple[str, Any]] = dict(modelled_tables())
    if tuned.PATH.exists():
        known = json.loads(tuned.PATH.read_text())
        measured = {arch: table for arch, table in known.items() if table["source"] != MODELLED}
        found = tuned.read(json.dumps(measured))
        tables |= {c: (measured[f"sm_{c}"]["source"], found[c]) for c in found}
    tuned.PATH.write_text(tuned.document(tables))


def compile_all(arches: list[int], limit: float) -> None:
    """Every tile, bit width and kind of kernel, largest tiles first; what is known already is not compiled again."""
    from tests.kernels import kernels

    path, start = RESULTS / "tiles.json", time.monotonic()
    every = [(c, t, b, f) for c in tiles.TILES for t in tiles.TILES[c] for b in (8, 4, 2) for f in kernels.KINDS]
    cases = {_name(*case): case for case in sorted(every, key=lambda case: -case[1].m * case[1].n * case[1].k)}
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["case"] in cases]
    known = {row["case"] for row in rows}
    for name, (capability, tile, bits, kind) in cases.items():
        if capability not in arches or name in known or time.monotonic() - start > limit:
            continue
        info = kernels.compiled(kind, bits, capability, tile)
        found = {"shared": info.shared_bytes, "registers": info.registers, "spilled": info.spill_bytes}
        found["loop"] = info.loop and [info.loop.instructions, info.loop.operations]
        good = info.fits and not info.spill_bytes and kernels.uses_tensor_cores(kind, info)
        rows.append({"case": name, **found, "good": good, "instructions": list(info.instructions)})
        write_document(path, {"of": len(cases), "rows": rows})
        print(name, found, "" if good else "BAD", flush=True)
    write_document(path, {"of": len(cases), "rows": rows})
    (RESULTS / "tiles.md").write_text(_tiles_page(rows, len(cases)))


def _name(capability: int, tile: tiles.Tile, bits: int, kind: str) -> str:
    return f"sm_{capability} {kind} W{bits} {tile.m}x{tile.n}x{tile.k}, {tile.stages} stages, {tile.warps} warps"


def _tiles_page(rows: list[dict[str, Any]], total: int) -> str:
    bad = [row["case"] for row in rows if not row["good"]]
    lines = [
        "# Tiles compiled ahead of time",
        "",
        f"`python -m benchmarks.tiles compile`: {len(rows)} of {total} cases, ",
    ]
    lines[-1] += "Triton's own assembler. Good: fits shared memory, spills nothing, uses the tensor cores. "
    lines[-1] += f"Not good: {', '.join(bad) or 'none'}. Operations per instruction: of the tensor cores, in the loop; "
    lines[-1] += "they are kept busy by more than a quarter of what a processor can do in a cycle ("
    lines[-1] += ", ".join(f"sm_{c} {per_cycle // 4}" for c, per_cycle in tiles.INT8_PER_CYCLE.items())
    lines[-1] += " with 8 bits, half of it with 16). -: no loop is left, or (sm_100) products do not say their size."
    lines += ["", "| case | shared memory | registers | spilled | operations per instruction | good |"]
    lines += ["|" + "---|" * 6]
    for row in sorted(rows, key=lambda row: row["case"]):
        ratio = f"{row['loop'][1] / row['loop'][0]:.0f}" if row["loop"] else "-"
        cells = row["case"], row["shared"], row["registers"], row["spilled"], ratio, "yes" if row["good"] else "no"
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def roofline_page(capability: int = 90) -> str:
    """Markdown: least and expected microseconds of every shape."""
    limits = MACHINES[capability]
    lines = [
        f"# What an {limits.name} allows",
        "",
        "`python -m benchmarks.tiles roofline`: modelled, not measured. Least: ",
    ]
    lines[-1] += (
        f"{limits.int8 / 1e12:.0f} TOPS (8 bit, dense) or {limits.bandwidth / 1e12:.1f} TB/s, whichever is slower; "
    )
    lines[-1] += (
        "activations, weights and float16 results once through memory. Expected: the default tile in waves over "
    )
    lines[-1] += (
        "the processors, with one launch (`inductor_kernels.roofline`). 16 bit: least of the same product in float16."
    )
    for size in SIZES:
        lines += ["", f"## {size} pixels, batch 1", ""]
        lines += [
            "| product | layers | GOP | W8A8 MB | W4A8 MB | bound by | least W8A8 us | least W4A8 us | 16 bit us |"
        ]
        lines[-1] += " tile | expected us |"
        lines += ["|" + "---|" * 11]
        found = products(size)
        rows = sorted(found.items(), key=lambda item: -item[1] * roofline.least(item[0], limits))
        lines += [_row(product, count, capability) for product, count in rows]
        lines.append(_total(found, capability))
    return "\n".join(lines) + "\n"


def _halves(product: Product) -> Product:
    return Product(product.m, product.n, product.k, 4, product.out, product.taps)


def _half(product: Product, limits: roofline.Machine) -> float:
    read = 2 * (product.m * product.k / product.taps + product.n * product.k + product.m * product.n)
    return max(product.operations / limits.half, read / limits.bandwidth)


def _row(product: Product, count: int, capability: int) -> str:
    limits, four = MACHINES[capability], _halves(product)
    way = tuned.way(capability, product)
    bound = "operations" if product.operations / limits.int8 > product.bytes / limits.bandwidth else "bytes"
    cells = [tuned.key(product), count, f"{product.operations / 1e9:.2f}", f"{product.bytes / 1e6:.2f}"]
    cells += [f"{four.bytes / 1e6:.2f}", bound]
    cells += [f"{1e6 * t:.2f}" for t in (roofline.least(product, limits), roofline.least(four, limits))]
    cells += [f"{1e6 * _half(product, limits):.2f}", str(way)]
    cells.append(f"{1e6 * tuned.expected(capability, product, way):.2f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def _total(found: Counter[Product], capability: int) -> str:
    limits = MACHINES[capability]

    def total(each: Callable[[Product], float]) -> float:
        return sum(count * each(product) for product, count in found.items())

    sums = [f"{total(lambda p: p.operations) / 1e9:.0f}", f"{total(lambda p: p.bytes) / 1e6:.0f}"]
    sums += [f"{total(lambda p: _halves(p).bytes) / 1e6:.0f}", ""]
    sums += [f"{1e6 * total(lambda p: roofline.least(p, limits)):.0f}"]
    sums += [f"{1e6 * total(lambda p: roofline.least(_halves(p), limits)):.0f}"]
    sums += [f"{1e6 * total(lambda p: _half(p, limits)):.0f}", ""]
    best = total(lambda p: tuned.expected(capability, p, tuned.way(capability, p)))
    return "| " + " | ".join(["all", str(found.total()), *sums, f"{1e6 * best:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("table", "compile", "roofline"))
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=tuple(tiles.TILES), help="default: all; 90 of the roofline"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds after which nothing more is compiled")
    options = parser.parse_args()
    if options.what == "table":
        write_table()
    elif options.what == "compile":
        compile_all(options.arch or list(tiles.TILES), options.limit)
    else:
        (RESULTS / "roofline.md").write_text(roofline_page((options.arch or [90])[0]))


if __name__ == "__main__":
    main()
