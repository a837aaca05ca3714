"""Nested weights: the high plane is the 4-bit code, both planes the 8-bit one, and what that costs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inductor_kernels import weights
from inductor_kernels.packing import unpack
from mixdq_ao import LayerPlan, QuantizationError
from mixdq_ao.quantize.quantizer import quantize_weight
from mixdq_ao.temporal.layer import LevelLayer, LevelWeight, Switch
from mixdq_ao.temporal.nested import nest

from ..quantize.reference import assert_close, round_act

SHAPES = [(5, 12), (3, 7), (4, 3, 3, 3), (2, 9, 1, 1)]


def weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Channels that are symmetric, one-sided either way, and all zero."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w[0] = w[0].abs()
    w[1] = -w[1].abs()
    if shape[0] > 2:
        w[2] = 0
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_planes_hold_the_eight_bit_code_and_its_rounded_upper_half(shape):
    w = weight(shape)
    quant = nest(w)
    high, low = (unpack(p, 4, shape[1]).to(torch.int64) for p in quant.planes)
    q = 16 * (high - 8) + low - 8
    assert torch.equal(quant.integers(8).to(torch.int64), q)
    assert q.min() >= -127 and q.max() <= 119
    assert torch.equal(quant.integers(4).to(torch.int64), torch.floor((q.double() + 8) / 16).to(torch.int64))
    assert set(quant.integers(4).unique().tolist()) <= set(range(-8, 8))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_eight_bit_code_is_within_half_a_step(shape):
    w = weight(shape).double()
    quant = nest(w.float())
    stored = quant.integers(8).movedim(-1, 1).double()
    scale = quant.scale[8].double().reshape(-1, *[1] * (len(shape) - 1))
    assert ((stored * scale - w).abs() <= scale.abs() * 0.5 * (1 + 1e-5)).all()
    plain = quantize_weight(w.float(), 8).scale.double()
    assert ((scale.abs().flatten() / plain)[: 2 if shape[0] < 3 else None] <= 127 / 119 * (1 + 1e-6)).all()


def signal_to_noise(w: Tensor, values: Tensor) -> float:
    return (10 * torch.log10(w.square().sum() / (values - w).square().sum())).item()


def test_what_nesting_costs_on_gaussian_channels():
    """Against codes of their own: 8 and 4 bit lose less than 0.4 dB."""
    w = torch.randn(64, 512)
    quant = nest(w)
    for bits, at_least in ((8, -0.4), (4, -0.4)):
        nested = quant.scale[bits][:, None] * quant.integers(bits).float()
        own = quantize_weight(w, bits).dequantize()
        assert signal_to_noise(w, nested) - signal_to_noise(w, own) > at_least


def test_one_sided_channels_are_where_four_bits_of_their_own_win():
    w = torch.rand(16, 256)
    quant = nest(w)
    nested = quant.scale[4][:, None] * quant.integers(4).float()
    assert signal_to_noise(w, quantize_weight(w, 4).dequantize()) - signal_to_noise(w, nested) > 3


def test_unusable_weights_are_refused():
    with pytest.raises(QuantizationError, match="NaN"):
        nest(torch.full((2, 2), float("nan")))
    assert torch.isfinite(nest(torch.full((2, 4), 1e-42)).scale[8]).all()


ACT = {"act_range": (-2.0, 3.0)}
PLANS = {
    "W8A16": LayerPlan(weight_bits=8),
    "W8A8": LayerPlan(weight_bits=8, act_bits=8, **ACT),
    "W4A8": LayerPlan(weight_bits=4, act_bits=8, **ACT),
    "W4A16": LayerPlan(weight_bits=4),
    "W2A8": LayerPlan(weight_bits=2, act_bits=8, **ACT),
    "W8A4": LayerPlan(weight_bits=8, act_bits=4, **ACT),
}


def expected(layer: LevelLayer, level: str, x: Tensor, bias: Tensor | None, call) -> Tensor:
    """The level's product in float64, from its integers and scales."""
    form, held = layer.forms[level], layer.weights[0]
    assert form is not None and isinstance(held, LevelWeight)
    plan = PLANS[level]
    values = x.double() if plan.act_bits == 16 else round_act(x, *ACT["act_range"], plan.act_bits)
    return call(values, held.dequantize(form, torch.float64), None if bias is None else bias.double())


@pytest.mark.parametrize("storage", ["nested", "own"])
@pytest.mark.parametrize("level", PLANS)
def test_linear_at_every_level(storage, level):
    source = nn.Linear(13, 6)
    layer = LevelLayer(source, PLANS, Switch(level), bos_embedding=None, storage=storage)
    x = torch.randn(2, 5, 13)
    for _ in range(2):  # the second call meets prepared weights
        assert_close(layer(x), expected(layer, level, x, source.bias, F.linear), 13)


@pytest.mark.parametrize("level", PLANS)
def test_convolution_at_every_level(level):
    source = nn.Conv2d(6, 4, 3, stride=2, padding=1)
    layer = LevelLayer(source, PLANS, Switch(level), bos_embedding=None, storage="nested")
    x = torch.randn(2, 6, 7, 9).to(memory_format=torch.channels_last)
    call = partial(F.conv2d, stride=2, padding=1)
    assert_close(layer(x), expected(layer, level, x, source.bias, call), 54)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


@pytest.mark.parametrize("level", ["W8A8", "W4A8", "W8A16"])
def test_a_split_convolution_has_ranges_and_scales_for_each_half(level):
    source = nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        source.weight[:, 5:] *= 30
    split = {
        "W8A16": LayerPlan(weight_bits=8, split=5),
        "W8A8": LayerPlan(weight_bits=8, act_bits=8, act_range=(-4.0, 4.0), split=5, split_act_range=(-0.1, 0.1)),
        "W4A8": LayerPlan(weight_bits=4, act_bits=8, act_range=(-4.0, 4.0), split=5, split_act_range=(-0.1, 0.1)),
    }
    layer = LevelLayer(source, split, Switch(level), bos_embedding=None, storage="nested")
    x = torch.randn(1, 8, 5, 5)
    x[:, 5:] *= 0.03
    y, form = source(x), layer.forms[level]
    assert form is not None and layer.weight.shape == source.weight.shape
    assert signal_to_noise(y, layer(x)) > {"W8A8": 33, "W4A8": 14, "W8A16": 38}[level]


@pytest.mark.parametrize("level", ["W4A8", "W8A16"])
def test_bos_rows_are_exact_where_the_level_keeps_them_apart(level):
    source, embedding = nn.Linear(16, 6), torch.linspace(-200, 300, 16)
    plans = {
        "W4A8": LayerPlan(weight_bits=4, act_bits=8, bos=True, act_range=(-3.0, 3.0)),
        "W8A16": LayerPlan(weight_bits=8),
    }
    layer = LevelLayer(source, plans, Switch(level), bos_embedding=embedding, storage="nested")
    x = torch.randn(2, 4, 16)
    x[:, 0] = embedding
    exact = torch.allclose(layer(x)[:, 0], source(x)[:, 0], rtol=1e-6)
    assert exact == (level == "W4A8")


def test_a_change_of_type_leaves_scales_alone_and_memory_mode_keeps_nothing():
    layer = LevelLayer(nn.Linear(32, 8), PLANS, Switch("W8A8"), bos_embedding=None, storage="nested")
    held = layer.weights[0]
    assert isinstance(held, LevelWeight)
    scale = held.get_buffer("scale").clone()
    layer.half()
    assert torch.equal(held.get_buffer("scale"), scale) and layer.bias is not None
    assert layer.bias.dtype == layer(torch.randn(2, 32).half()).dtype == torch.float16
    before = weights.count()
    try:
        weights.weight_cache("memory")
        layer(torch.randn(2, 32).half())
        assert weights.count() == 0 <= before
    finally:
        weights.weight_cache("speed")


def test_planes_of_every_level_are_the_bytes_of_eight_bits():
    layer = LevelLayer(nn.Linear(64, 32), PLANS, Switch("W8A8"), bos_embedding=None, storage="nested")
    held = layer.weights[0]
    assert isinstance(held, LevelWeight)
    assert held.get_buffer("planes").nbytes == 64 * 32
    vectors = sum(b.nbytes for n, b in held.named_buffers() if n != "planes")
    distinct = len(PLANS) - 1  # W2A8 runs as W4A8
    assert vectors == distinct * (4 * 32 + 4 + 4) + 32  # a scale and an activation range each; zero points


def test_two_bits_run_at_four_where_they_would_read_the_same_plane():
    x, source = torch.randn(3, 32), nn.Linear(32, 8)
    nested, own = (LevelLayer(source, PLANS, Switch("W2A8"), bos_embedding=None, storage=s) for s in ("nested", "own"))
    coarse = nested(x)
    nested.switch.level = "W4A8"
    assert torch.equal(nested(x), coarse) and nested.forms["W2A8"] == nested.forms["W4A8"]
    assert own.forms["W2A8"].bits == 2 and "W2A8: W4A8" in repr(nested)  # type: ignore[union-attr]
