"""Tiles compile for real architectures: they fit, spill nothing and use the integer tensor cores."""

import json

import pytest

from inductor_kernels import roofline, testing, tiles, tuned
from inductor_kernels.roofline import Product

from . import cases
from .kernels import BUILDERS, compiled, uses_tensor_cores

pytest.importorskip("triton")


def check(builder, info):
    assert info.fits, f"{info.shared_bytes} bytes of shared memory"
    assert info.spill_bytes == 0, f"{info.spill_bytes} bytes spilled"
    assert uses_tensor_cores(builder, info), info.instructions


EVERY = [(c, t, b, f) for c in tiles.TILES for t in tiles.TILES[c] for b in cases.BITS for f in BUILDERS]


@pytest.mark.slow
@pytest.mark.parametrize("capability, tile, bits, builder", EVERY, ids=str)
def test_every_tile(capability, tile, bits, builder):
    check(builder, compiled(builder, bits, capability, tile))


@pytest.mark.parametrize(
    "capability, index, bits, builder",
    [
        (80, -1, 8, "gemm"),
        (80, -1, 4, "convolution"),
        (89, -1, 8, "gemm_with_quantize"),
        (100, -1, 2, "convolution"),
        (90, -1, 4, "gemm"),
        (90, -1, 8, "convolution"),
        (89, -1, 8, "gemm"),
        (90, 0, 4, "weight_only"),
    ],
)
def test_largest_tiles(capability, index, bits, builder):
    info = compiled(builder, bits, capability, tiles.TILES[capability][index])
    check(builder, info)
    if builder in ("gemm", "convolution") and info.loop and capability < 100:
        # the instructions of a step (copies, unpacking, addresses) are issued while its products run
        busy = info.loop.operations / info.loop.instructions / (tiles.INT8_PER_CYCLE[capability] / 4)
        assert busy > (1 if bits == 8 else 0.9), info.loop


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
    """Never faster than the machine; large products get large tiles, small ones leave no processor idle."""
    limits = roofline.MACHINES[capability]
    for m, n, k in ((1, 1280, 1280), (77, 166400, 2048), (256, 1280, 5120), (16384, 8192, 4096)):
        for tile in tiles.fitting(capability, m, n):
            product = Product(m, n, k)
            assert roofline.seconds(product, tile, capability) > roofline.least(product, limits)
    large, small = (tuned.modelled(capability, Product(*s)) for s in ((16384, 8192, 4096), (256, 1280, 1280)))
    assert large.m * large.n >= 64 * 64 and large.m * large.n >= small.m * small.n
    assert small.m <= 64


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
        fits = roofline.prologue_fits(tile, capability, read=read)
        return fits and roofline.prologue_pays(Product(m, n, k), tile, capability, work=work, read=read, instead=tile)

    assert pays(1, 1280, 1280) and pays(4096, 64, 640)
    assert not pays(77, 166400, 2048)  # text projections of a whole model as one product
    assert not pays(4096, 5120, 640)
    assert not pays(1, 1280, 1280, capability=89, read=8)  # 196 KB where there are 99


def test_a_prologue_counts_what_its_tile_is_slower():
    product, small, large = Product(16384, 64, 640), tiles.Tile(16, 64, 128, 4, 4), tiles.Tile(128, 64, 128, 4, 4)
    assert roofline.seconds(product, small, 90) > roofline.seconds(product, large, 90)
    assert roofline.prologue_pays(product, small, 90, work=10, read=2, instead=small)
    assert not roofline.prologue_pays(product, small, 90, work=10, read=2, instead=large)


def test_table_holds_listed_tiles_and_says_where_they_come_from():
    text = tuned.PATH.read_text()
    table = tuned.read(text)
    assert set(table) == set(tiles.TILES)
    for product in (Product(1024, 640, 640), Product(4096, 320, 2880, taps=9), Product(77, 1280, 2048)):
        for capability, known in table.items():
            assert tuned.candidates(capability, product)[0].m == known[tuned.key(product)].m
    sources = {table["source"] for table in json.loads(text).values()}
    assert all("not measured" in source or "NVIDIA" in source for source in sources)


def test_a_table_with_another_tile_is_refused():
    with pytest.raises(ValueError, match=r"sm_90 1x2x3 is \[48, 64, 64, 3, 4\]; expected a tile"):
        tuned.read('{"sm_90": {"source": "x", "tiles": {"1x2x3": [48, 64, 64, 3, 4]}}}')


def test_written_tables_are_read_again():
    found = {"77x1280x2048": tiles.TILES[90][0], "4096x320x2880/9": tiles.TILES[90][-1]}
    assert tuned.read(tuned.document({90: ("x", found)})) == {90: found}
