"""BOS rows: recognised by value in any batch, chunk and type."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixdq_ao import MixDQTensor
from mixdq_ao.quantize.bos import bos_mask
from mixdq_ao.quantize.quantizer import act_params

from ..conftest import bos_row, text_rows


def layer(bits: int = 8) -> tuple[torch.Tensor, MixDQTensor]:
    weight = torch.randn(10, 24)
    return weight, MixDQTensor.from_hp(weight, bits, act=act_params(-4, 4), bos_embedding=bos_row())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bos_rows_are_full_precision_and_the_others_as_without(bits):
    weight, quantized = layer(bits)
    plain = MixDQTensor.from_hp(weight, bits, act=act_params(-4, 4))
    x = text_rows(3)
    y = F.linear(x, quantized)
    full = (x.double() @ weight.double().t()).float()
    assert torch.allclose(y[:, 0], full[:, 0], rtol=1e-6, atol=1e-4)
    assert torch.equal(y[:, 1:], F.linear(x[:, 1:], plain))


def test_wherever_they_stand():
    weight, quantized = layer()
    x = torch.randn(4, 14, 24)
    places = [(0, 0), (0, 7), (2, 0), (3, 5)]  # a batch, two chunks of one prompt, an odd place
    for b, t in places:
        x[b, t] = bos_row()
    assert bos_mask(x, bos_row()).nonzero()[:, :2].tolist() == [list(p) for p in places]
    y = F.linear(x, quantized)
    for b, t in places:
        assert torch.allclose(y[b, t], weight @ bos_row(), rtol=1e-5, atol=1e-3)


def test_zero_negatives_are_ordinary_rows():
    _, quantized = layer()
    x = torch.cat([torch.zeros(1, 7, 24), text_rows(1)])
    y = F.linear(x, quantized)
    assert torch.equal(y[0], torch.zeros(7, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recognised_in_16_bits(dtype):
    x = text_rows(2).to(dtype)
    assert bos_mask(x, bos_row())[:, 0].all() and not bos_mask(x, bos_row())[:, 1:].any()


def test_a_bias_is_added_once():
    weight, quantized = layer()
    bias = torch.randn(10)
    y = F.linear(text_rows(1), quantized, bias)
    assert torch.allclose(y[0, 0], weight @ bos_row() + bias, rtol=1e-5, atol=1e-3)
