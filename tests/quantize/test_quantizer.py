"""Codes and scales against the plain formula, including unusual weights and ranges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixdq_ao import QuantizationError
from mixdq_ao.quantize.quantizer import SMALLEST_SCALE, act_params, fake_quantize_act, quantize_act, quantize_weight

from . import reference

KINDS = [(8, True), (4, True), (4, False), (2, True), (2, False)]
WEIGHTS = {
    "odd": lambda: torch.randn(5, 7),
    "one": lambda: torch.randn(1, 1),
    "conv": lambda: torch.randn(6, 3, 3, 3),
    "positive": lambda: torch.rand(4, 9) + 1,
    "negative": lambda: -torch.rand(4, 9) - 1,
    "dead": lambda: torch.cat([torch.zeros(1, 9), torch.randn(3, 9)]),
    "constant": lambda: torch.full((3, 8), 0.37),
    "half": lambda: torch.randn(5, 7).half(),
    "bfloat16": lambda: torch.randn(5, 7).bfloat16(),
    "large": lambda: torch.randn(3, 5) * 1e30,
    "transposed": lambda: torch.randn(7, 5).t(),
}


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_codes_and_scales_are_the_formula(weight, bits, symmetric):
    w = weight()
    quant = quantize_weight(w, bits, symmetric=symmetric)
    integers, scale = reference.round_weight(w, bits, symmetric)
    assert torch.equal(quant.integers().double(), integers)
    assert torch.equal(quant.scale.double(), scale)
    assert torch.equal(
        quant.dequantize().double(), (integers * scale.reshape(-1, *[1] * (w.dim() - 1))).float().double()
    )
    assert (quant.zero_point is None) == (bits == 8)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_the_error_is_at_most_half_a_step(bits, symmetric):
    w = torch.randn(16, 33)
    quant = quantize_weight(w, bits, symmetric=symmetric)
    # An asymmetric zero point is rounded, which moves the ends of the range by up to half a step more.
    steps = 0.5 if symmetric else 1.0
    assert ((quant.dequantize() - w).abs() <= quant.scale[:, None] * steps * 1.0001).all()


def test_one_dead_channel_does_not_hurt_the_others():
    w = torch.randn(4, 64)
    w[2] = 0
    alone = quantize_weight(w[:2], 8).dequantize()
    assert torch.equal(quantize_weight(w, 8).dequantize()[:2], alone)
    assert torch.equal(quantize_weight(w, 8).dequantize()[2], torch.zeros(64))


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
def test_subnormal_weights(bits, symmetric):
    quant = quantize_weight(torch.full((2, 4), 1e-44), bits, symmetric=symmetric)
    assert (quant.scale >= SMALLEST_SCALE).all() and torch.isfinite(1 / quant.scale).all()
    assert torch.isfinite(quant.dequantize()).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    w = torch.randn(4, 4)
    w[2, 1] = bad
    with pytest.raises(QuantizationError, match="first in output channel 2"):
        quantize_weight(w, 8)


@pytest.mark.parametrize(("bits", "symmetric"), [(3, None), (8, False), (16, None), (1, None)])
def test_bits_that_are_not_offered(bits, symmetric):
    with pytest.raises(QuantizationError, match=f"weight_bits={bits}"):
        quantize_weight(torch.randn(2, 2), bits, symmetric=symmetric)


def test_an_empty_weight():
    with pytest.raises(QuantizationError, match="at least one element"):
        quantize_weight(torch.randn(0, 4), 8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("range_", [(-1, 3), (0.5, 2), (-3, -1), (0, 0), (-1e-45, 1e-45), (-1e30, 1e30), (-723, 13)])
def test_activation_codes(range_, bits):
    x = torch.cat([torch.linspace(*range_, 101), torch.randn(50) * max(map(abs, range_))])
    params = act_params(*range_, bits=bits)
    expected = reference.round_act(x, *range_, bits)
    given = torch.tensor(params.inv_scale), torch.tensor(params.zero_point, dtype=torch.int32), params.levels
    codes = quantize_act(x, *given)
    assert codes.dtype == torch.uint8 and codes.max() <= 2**bits - 1
    fake = fake_quantize_act(x, params)
    assert torch.equal(fake, ((codes.float() - params.zero_point) * params.scale))
    # the guard against subnormal scales changes the value, not the fact that it is tiny
    if params.scale > SMALLEST_SCALE:
        assert torch.equal(fake.double(), expected.float().double())


@given(lo=st.floats(-1e6, 0), hi=st.floats(0, 1e6))
def test_zero_is_exact(lo, hi):
    params = act_params(lo, hi)
    assert fake_quantize_act(torch.zeros(1), params).item() == 0.0
