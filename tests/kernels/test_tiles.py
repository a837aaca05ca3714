"""Tiles compile for real architectures: they fit, spill nothing and use the integer tensor cores."""

import re

import pytest
import torch
from torch.nn import functional as F

from inductor_kernels import testing, tiles

from . import cases
from .layers import OPS, conv2d, image, linear, parameters, product, tokens

pytest.importorskip("triton")
ARCHES = (80, 89, 90)
INTEGER = re.compile(r"IMMA\S*S8|IGMMA\S*S8|wgmma\S*s32\.s8\.s8|mma\S*s32\.s8\.s8\.s32|tcgen05")


def gemm(bits):
    p = parameters(1280, 640, bits)
    return lambda x, r, *p: F.gelu(product(x, p, bits)) + r, [
        tokens(4096, 640, dtype=torch.int8),
        tokens(4096, 1280),
        *p,
    ]


def gemm_with_quantize(bits):
    p = parameters(128, 640, bits)
    return lambda x, r, *p: F.gelu(linear(x, p, bits)) + r, [tokens(4096, 640), tokens(4096, 128), *p]


def convolution(bits):
    p = parameters(320, 320, bits, (3, 3))
    return lambda x, r, *p: conv2d(x, p, bits) + r, [image(2, 320, 64, 64), image(2, 320, 64, 64), *p]


def weight_only(bits):
    p = parameters(1280, 640, bits)
    return lambda x, *p: OPS.linear_weight_only(x, *p[:2], p[3], p[5], bits), [tokens(4096, 640), *p]


BUILDERS = {f.__name__: f for f in (gemm, gemm_with_quantize, convolution, weight_only)}


def compiled(builder, bits, capability, tile, monkeypatch):
    """What the assembler says of the one template kernel that ``tile`` gives."""
    narrowed = {"weight_only": 2}.get(builder, 1)
    monkeypatch.setattr(tiles, "candidates", lambda *a, **k: [tiles._narrowed(tile, 640, narrowed)])
    fn, inputs = BUILDERS[builder](bits)
    code = testing.cuda_code(fn, *inputs, arch=f"sm_{capability}")
    (source,) = (source for name, source in testing.kernels(code).items() if "_tem_" in name)
    return testing.compile_for(source, f"sm_{capability}")


def check(builder, info, tile):
    assert info.fits, f"{info.shared_bytes} bytes of shared memory"
    assert info.spill_bytes == 0, f"{info.spill_bytes} bytes spilled"
    if builder == "weight_only":
        assert any("HMMA" in i or "HGMMA" in i for i in info.instructions), info.instructions
    else:
        assert any(INTEGER.search(i) for i in info.instructions), info.instructions


EVERY = [(c, t, b, f) for c in ARCHES for t in tiles.TILES[c] for b in cases.BITS for f in BUILDERS]


@pytest.mark.slow
@pytest.mark.parametrize("capability, tile, bits, builder", EVERY, ids=str)
def test_every_tile(capability, tile, bits, builder, monkeypatch):
    check(builder, compiled(builder, bits, capability, tile, monkeypatch), tile)


@pytest.mark.parametrize(
    "capability, index, bits, builder",
    [
        (80, -1, 8, "gemm"),
        (80, -1, 4, "convolution"),
        (89, -1, 8, "gemm_with_quantize"),
        (89, -1, 2, "gemm"),
        (90, -1, 4, "gemm"),
        (90, -1, 8, "convolution"),
        (90, 0, 4, "weight_only"),
    ],
)
def test_largest_tiles(capability, index, bits, builder, monkeypatch):
    tile = tiles.TILES[capability][index]
    check(builder, compiled(builder, bits, capability, tile, monkeypatch), tile)


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
    chosen = tiles.candidates(capability, m, n, k)
    assert len(set(chosen)) == len(chosen) >= 1
    assert all(t.m < 2 * max(m, 16) and t.k <= max(2 * k, 32) for t in chosen)
    if m * n >= 128 * 128 * tiles.SMS[capability]:
        assert chosen[0].m * chosen[0].n >= 128 * 128
