"""Products with weight.t() equal those of the layer; other operators use its dequantized values."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixdq_ao.quantize.quantizer import act_params
from mixdq_ao.quantize.tensor import MixDQTensor
from mixdq_ao.quantize.transposed import TransposedMixDQTensor

BOS = torch.linspace(-3, 3, 12)


@pytest.fixture(params=[(8, None), (4, act_params(-2, 3)), (2, act_params(-2, 3, 4))], ids=["W8", "W4A8", "W2A4"])
def weight(request):
    bits, act = request.param
    return MixDQTensor.from_hp(torch.randn(7, 12), bits, act=act, bos_embedding=None if act is None else BOS)


@pytest.mark.parametrize("inference", [False, True])
def test_products_are_the_layers(weight, inference):
    """Every decomposition of F.linear by torch, with the input quantized: dequantized weights would differ."""
    x, bias = torch.randn(2, 3, 12), torch.randn(7)
    x[:, 0] = BOS
    with torch.inference_mode(inference):
        expected = F.linear(x, weight)
        for input in (x, x.transpose(0, 1)):
            assert torch.equal(input @ weight.t(), F.linear(input, weight))
        assert torch.equal(torch.bmm(x, weight.t().expand(2, 12, 7)), expected)
        assert torch.equal(torch.addmm(bias, x[0], weight.t()), F.linear(x[0], weight, bias))
        values = x @ weight.dequantize().t()
    assert not torch.equal(values, expected)
    assert torch.equal(weight.t().t().integers(), weight.integers()) and weight.t().detach().shape == (12, 7)


def test_other_uses_are_those_of_its_values(weight):
    values, t = weight.dequantize().t(), weight.t()
    assert isinstance(t, TransposedMixDQTensor) and (t.shape, t.stride()) == (values.shape, values.stride())
    assert torch.equal(t + 1, values + 1) and torch.equal(t[2:5], values[2:5]) and torch.equal(t.sum(0), values.sum(0))
    x, bias = torch.randn(5, 12), torch.randn(7)
    assert torch.equal(torch.addmm(bias, x, t, alpha=2), torch.addmm(bias, x, values, alpha=2))
    y = torch.randn(7, 3)
    assert torch.equal(t @ y, values @ y)
    assert repr(t) == f"{weight!r}.t()"


def test_a_compiled_product_is_the_layers(weight):
    x = torch.randn(3, 12)
    compiled = torch.compile(lambda x, w: x @ w.t(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), F.linear(x, weight), rtol=1e-6, atol=1e-6)
