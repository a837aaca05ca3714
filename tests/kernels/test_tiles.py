"""Tiles compile for real architectures: they fit, spill nothing and use the integer tensor cores."""

import json
import re
from dataclasses import astuple

import pytest

from inductor_kernels import roofline, testing, tiles, tuned
from inductor_kernels.roofline import Product

from . import cases
from .kernels import KINDS, compiled, uses_tensor_cores

pytest.importorskip("triton")


def check(kind, info):
    assert info.fits, f"{info.shared_bytes} bytes of shared memory"
    assert info.spill_bytes == 0, f"{info.spill_bytes} bytes spilled"
    assert uses_tensor_cores(kind, info), info.instructions


EVERY = [(c, t, b, f) for c in tiles.TILES for t in tiles.TILES[c] for b in cases.BITS for f in KINDS]


@pytest.mark.slow
@pytest.mark.parametrize("capability, tile, bits, kind", EVERY, ids=str)
def test_every_tile(capability, tile, bits, kind):
    check(kind, compiled(kind, bits, capability, tile))


@pytest.mark.parametrize(
    "capability, index, bits, kind",
    [
        (80, -1, 8, "gemm"),
        (80, -1, 4, "convolution"),
        (89, -1, 8, "gemm_with_quantize"),
        (100, -1, 2, "convolution"),
        (90, -1, 4, "gemm"),
        (90, -1, 8, "convolution"),
        (89, -1, 8, "gemm"),
        (90, 0, 4, "weight_only"),
        (90, -1, 4, "gemm_shared"),
        (80, -1, 8, "convolution_shared"),
    ],
)
def test_largest_tiles(capability, index, bits, kind):
    info = compiled(kind, bits, capability, tiles.TILES[capability][index])
    check(kind, info)
    if kind not in ("gemm_with_quantize", "weight_only") and info.loop and capability < 100:
        # the instructions of a step (copies, unpacking, addresses) are issued while its products run
        busy = info.loop.operations / info.loop.instructions / (tiles.INT8_PER_CYCLE[capability] / 4)
        assert busy > (1 if bits == 8 else 0.9), info.loop


@pytest.mark.parametrize("capability", tiles.TILES)
def test_float32_tiles_have_registers_for_their_results(capability):
    """float32 runs without tensor cores, and large tiles would spill kilobytes."""
    listed = tuned.candidates(capability, Product(4096, 640, 640), bytes_per_code=4)
    info = compiled("weight_only_float32", 4, capability, max(listed, key=lambda tile: tile.m * tile.n))
    assert info.fits and info.spill_bytes == 0


def test_info_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="arch='h100'"):
        testing.compile_for("", "h100")


@pytest.mark.parametrize(
    "capability, expected", [(80, 80), (86, 86), (87, 86), (89, 89), (90, 90), (103, 100), (121, 120)]
)
def test_unknown_architectures_use_the_tiles_of_an_older_one(capability, expected):
    assert tiles.family(capability) == expected


def test_old_architectures_are_refused_by_name():
    with pytest.raises(ValueError, match="compute capability 75"):
        tiles.family(75)


@pytest.mark.parametrize(
    "m, n, k", [(1, 1280, 1280), (77, 640, 2048), (256, 1280, 1280), (4096, 640, 640), (16384, 320, 320), (7, 4, 3)]
)
@pytest.mark.parametrize("capability", tiles.TILES)
def test_candidates_suit_the_shape(capability, m, n, k):
    chosen = tuned.candidates(capability, Product(m, n, k))
    assert len(set(chosen)) == len(chosen) >= 1
    assert all(t.m < 2 * max(m, 16) and t.k <= max(2 * k, 32) for t in chosen)
    assert all(roofline.shared_bytes(t) <= tiles.SHARED_BYTES[capability] for t in chosen)


@pytest.mark.parametrize("capability", tiles.TILES)
def test_model_of_a_product(capability):
    """The model is never faster than the machine. Large products get large tiles, small products small ones, so that no
    processor is idle."""
    limits = roofline.MACHINES[capability]
    for m, n, k in ((1, 1280, 1280), (77, 166400, 2048), (256, 1280, 5120), (16384, 8192, 4096)):
        for tile in tiles.fitting(capability, m, n):
            product = Product(m, n, k)
            assert roofline.seconds(product, tile, capability) > roofline.least(product, limits)
    large, small = (tuned.modelled(capability, Product(*s)) for s in ((16384, 8192, 4096), (256, 1280, 1280)))
    assert large.m * large.n >= 64 * 64 and large.m * large.n >= small.m * small.n
    assert small.m <= 64


@pytest.mark.parametrize("capability", tiles.TILES)
def test_reductions_are_shared_where_tiles_are_few_and_long(capability):
    long, short = Product(256, 1280, 23040, taps=9), Product(4096, 1280, 640)
    assert tuned.modelled_way(capability, long).shares > 1 and tuned.modelled_way(capability, short).shares == 1
    for product in (long, short, Product(1, 4, 3)):
        ways = tuned.ranked(capability, product)
        assert len(set(ways)) == len(ways)
        chosen, whole = tuned.modelled_way(capability, product), tuned.Way(tuned.modelled(capability, product))
        gain = tuned.expected(capability, product, whole) / tuned.expected(capability, product, chosen)
        assert chosen == whole or gain >= tuned.GAIN
        for shares in (1, 4):
            listed = tuned.candidates(capability, product, shares=shares)
            best = min(roofline.seconds(product, tile, capability, shares) for tile in listed)
            assert roofline.seconds(product, listed[0], capability, shares) == pytest.approx(best)


def test_more_bytes_or_operations_take_longer():
    limits, base = roofline.MACHINES[90], Product(4096, 640, 640)
    for more in (
        Product(8192, 640, 640),
        Product(4096, 1280, 640),
        Product(4096, 640, 1280),
        Product(4096, 640, 640, out=4),
    ):
        assert roofline.least(more, limits) > roofline.least(base, limits)
    assert roofline.least(Product(77, 1280, 2048, 4), limits) < roofline.least(Product(77, 1280, 2048), limits)


def test_a_prologue_pays_for_few_columns_and_where_it_fits():
    tile = tiles.Tile(64, 64, 128, 3, 4)

    def pays(m, n, k, capability=90, work=10, read=2):
        product, fits = Product(m, n, k), roofline.prologue_fits(tile, capability, read=read)
        otherwise = roofline.seconds(product, tile, capability)
        return fits and roofline.prologue_pays(product, tile, capability, work=work, read=read, otherwise=otherwise)

    assert pays(1, 1280, 1280) and pays(4096, 64, 640)
    assert not pays(77, 166400, 2048)  # text projections of a whole model as one product
    assert not pays(4096, 5120, 640)
    assert not pays(1, 1280, 1280, capability=89, read=8)  # 196 KB where there are 99


def test_a_prologue_counts_what_its_tile_is_slower():
    product, small, large = Product(16384, 64, 640), tiles.Tile(16, 64, 128, 4, 4), tiles.Tile(128, 64, 128, 4, 4)
    slow, fast = (roofline.seconds(product, tile, 90) for tile in (small, large))
    assert slow > fast
    assert roofline.prologue_pays(product, small, 90, work=10, read=2, otherwise=slow)
    assert not roofline.prologue_pays(product, small, 90, work=10, read=2, otherwise=fast)


def test_table_holds_listed_tiles_and_says_where_they_come_from():
    text = tuned.PATH.read_text()
    table = tuned.read(text)
    assert set(table) == set(tiles.TILES)
    for product in (Product(1024, 640, 640), Product(4096, 320, 2880, taps=9), Product(77, 1280, 2048)):
        for capability, known in table.items():
            assert tuned.way(capability, product) == known[tuned.key(product)]
    sources = {table["source"] for table in json.loads(text).values()}
    assert all("not measured" in source or "NVIDIA" in source for source in sources)


def test_a_table_with_another_tile_is_refused():
    listed = list(astuple(tiles.TILES[90][0]))
    for numbers in ([48, 64, 64, 3, 4], [*listed, 5], [*listed, 2, 2], listed[:4], 7):
        with pytest.raises(ValueError, match=rf"sm_90 1x2x3 is {re.escape(repr(numbers))}; expected a tile"):
            tuned.read(json.dumps({"sm_90": {"source": "x", "tiles": {"1x2x3": numbers}}}))


def test_written_tables_are_read_again():
    found = {"77x1280x2048": tuned.Way(tiles.TILES[90][0]), "256x320x2880/9": tuned.Way(tiles.TILES[90][-1], 4)}
    assert tuned.read(tuned.document({90: ("x", found)})) == {90: found}
