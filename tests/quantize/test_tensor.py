"""MixDQTensor: products against the float64 reference, copies, moves and slices, torchao's own suites."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.testing.utils import TorchAOBasicTestCase, TorchAOCompileTestCase

from mixdq_ao import MixDQTensor
from mixdq_ao.quantize.fake import straight_through
from mixdq_ao.quantize.quantizer import act_params, fake_quantize_act
from mixdq_ao.quantize.tensor import SplitMixDQTensor

from . import reference
from .reference import assert_close

KINDS = [(8, True), (4, True), (4, False), (2, True), (2, False)]
ACTS = {"A16": None, "A8": (-2.0, 3.0, 8), "A4": (-2.0, 3.0, 4)}
LAYOUTS = {
    "plain": lambda *s: torch.randn(*s),
    "one": lambda *s: torch.randn(1, *s[1:]),
    "sliced": lambda *s: torch.randn(*s[:-1], 2 * s[-1])[..., ::2],
    "transposed": lambda *s: torch.randn(s[1], s[0], *s[2:]).transpose(0, 1),
}


def quantized(weight, bits, symmetric, act):
    params = None if act is None else act_params(*act)
    return MixDQTensor.from_hp(weight, bits, symmetric=symmetric, act=params)


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 33), (4, 6, 16)])
def test_linear(bits, symmetric, act, layout, shape):
    x, weight, bias = layout(*shape), torch.randn(9, shape[-1]), torch.randn(9)
    y = F.linear(x, quantized(weight, bits, symmetric, act), bias)
    assert_close(y, reference.linear(x, weight, bias, bits, symmetric, act), terms=shape[-1] + 2)


GEOMETRIES = [
    {"padding": 1},
    {"padding": (0, 2), "stride": 2},
    {"padding": 2, "dilation": 2},
    {"padding": 1, "groups": 2},
    {},
]


@pytest.mark.parametrize(("bits", "symmetric"), KINDS)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_conv2d(bits, symmetric, act, geometry, memory):
    x = torch.randn(3, 6, 8, 9).contiguous(memory_format=memory)
    weight, bias = torch.randn(10, 6 // geometry.get("groups", 1), 3, 3), torch.randn(10)
    y = F.conv2d(x, quantized(weight, bits, symmetric, act), bias, **geometry)
    assert_close(y, reference.conv2d(x, weight, bias, bits, symmetric, act, **geometry), terms=6 * 9 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act", [None, (-2.0, 3.0, 8)], ids=["A16", "A8"])
def test_half_precision_in_and_out(dtype, act):
    x, weight, bias = torch.randn(4, 20).to(dtype), torch.randn(8, 20).to(dtype), torch.randn(8).to(dtype)
    y = F.linear(x, quantized(weight, 4, False, act), bias)
    assert y.dtype == dtype
    assert_close(y, reference.linear(x, weight, bias, 4, False, act), terms=22)


def test_unbatched_convolution():
    x, weight = torch.randn(3, 8, 8), torch.randn(4, 3, 1, 1)
    w = quantized(weight, 8, True, None)
    assert torch.equal(F.conv2d(x, w), F.conv2d(x[None], w)[0])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_really_saved(bits):
    w = quantized(torch.randn(16, 64), bits, None, (-1, 1, 8))
    assert w.qdata.numel() * w.qdata.element_size() == 16 * 64 * bits // 8
    assert w.shape == (16, 64) and w.integers().shape == (16, 64)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("dim", "start", "end"), [(0, 2, 5), (1, 4, 12), (1, 3, 10), (0, 0, 9), (1, 0, 1)])
def test_slices(bits, dim, start, end):
    for weight in (torch.randn(9, 16), torch.randn(9, 16, 3, 3)):
        w = quantized(weight, bits, None, (-1, 1, 8))
        part = w.narrow(dim, start, end - start)
        assert isinstance(part, MixDQTensor)
        expected = w.dequantize().narrow(dim, start, end - start)
        assert torch.equal(part.dequantize(), expected)
        x = torch.randn(2, part.shape[1], *([4, 4] if weight.dim() == 4 else []))
        product = F.conv2d if weight.dim() == 4 else F.linear
        assert product(x, part).shape[1] == part.shape[0]


def test_split_and_chunk():
    w = quantized(torch.randn(8, 12), 4, False, (-1, 1, 8))
    assert torch.equal(torch.cat([p.dequantize() for p in w.split(3)]), w.dequantize())
    assert [tuple(p.shape) for p in w.chunk(2, 1)] == [(8, 6), (8, 6)]


def test_copies():
    w, other = (quantized(torch.randn(8, 12), 4, False, (-1, 1, 8)) for _ in range(2))
    for copied in (w.clone(), w.detach(), copy.deepcopy(w), w.to("cpu"), nn.Parameter(w, requires_grad=False)):
        assert torch.equal(copied.dequantize(), w.dequantize())
    kept = w.clone()
    w.copy_(other)
    assert torch.equal(w.dequantize(), other.dequantize())
    assert not torch.equal(kept.dequantize(), w.dequantize())
    with pytest.raises(ValueError, match="metadata mismatch"):
        w.copy_(quantized(torch.randn(8, 12), 8, True, (-1, 1, 8)))


def test_a_product_after_copy_uses_the_new_weight():
    x, w = torch.randn(64, 64), quantized(torch.randn(512, 64), 8, True, (-1, 1, 8))
    F.linear(x, w)
    other = quantized(torch.randn(512, 64), 8, True, (-1, 1, 8))
    w.copy_(other)
    assert torch.equal(F.linear(x, w), F.linear(x, other))


def test_dtype_moves_leave_the_integers_alone():
    layer = nn.Linear(12, 8)
    layer.weight = nn.Parameter(quantized(layer.weight.detach(), 4, False, (-1, 1, 8)), requires_grad=False)
    before = layer.weight.qdata.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.bias.dtype == torch.bfloat16
    assert layer.weight.scale.dtype == torch.float32 and torch.equal(layer.weight.qdata, before)
    assert layer(torch.randn(2, 12).bfloat16()).dtype == torch.bfloat16


def test_repr_is_short():
    assert repr(quantized(torch.randn(8, 12), 4, False, (-1, 1, 8))) == (
        "MixDQTensor(W4A8, shape=(8, 12), dtype=torch.float32, device=cpu)"
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_split_convolution_has_scales_and_ranges_of_its_own(bits):
    x = torch.cat([torch.randn(2, 5, 6, 6), 50 * torch.randn(2, 3, 6, 6)], 1)
    weight, bias = torch.cat([torch.randn(4, 5, 3, 3), torch.randn(4, 3, 3, 3) / 50], 1), torch.randn(4)
    acts = [(-3.0, 3.0, 8), (-150.0, 150.0, 8)]
    halves = [quantized(h.contiguous(), bits, None, a) for h, a in zip(weight.split([5, 3], 1), acts, strict=True)]
    split = SplitMixDQTensor(*halves, torch.float32)
    assert split.shape == weight.shape and split.dequantize().shape == weight.shape
    y = F.conv2d(x, split, bias, padding=1)
    expected = reference.conv2d(x[:, :5], weight[:, :5], bias, bits, bits == 8, acts[0], padding=1)
    expected += reference.conv2d(x[:, 5:], weight[:, 5:], None, bits, bits == 8, acts[1], padding=1)
    assert_close(y, expected, terms=80)
    moved = split.to(torch.bfloat16)
    assert moved.dtype == moved.first.dtype == torch.bfloat16


class TestTorchAO(TorchAOBasicTestCase):
    TENSOR_SUBCLASS = MixDQTensor
    FACTORY_FN = staticmethod(MixDQTensor.from_hp)
    kwargs = {"bits": 8}

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's test calls .cuda()")
    def test_device1_to_device2_device1_cpu_device2_cpu(self):
        super().test_device1_to_device2_device1_cpu_device2_cpu()


class TestTorchAOCompiled(TorchAOCompileTestCase):
    TENSOR_SUBCLASS = MixDQTensor
    FACTORY_FN = staticmethod(MixDQTensor.from_hp)
    kwargs = {"bits": 8}


del TorchAOBasicTestCase, TorchAOCompileTestCase  # else they would be collected here, for torchao's own tensor


def test_arguments_by_torchs_names():
    x, weight = torch.randn(2, 16), MixDQTensor.from_hp(torch.randn(8, 16), act=act_params(-3.0, 3.0))
    assert torch.equal(F.linear(input=x, weight=weight), F.linear(x, weight))
    image, kernel = torch.randn(1, 4, 5, 5), MixDQTensor.from_hp(torch.randn(8, 4, 3, 3), act=act_params(-3.0, 3.0))
    assert torch.equal(F.conv2d(input=image, weight=kernel, padding=1), F.conv2d(image, kernel, padding=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_values_are_those_of_the_codes(dtype):
    """Also far outside the range, where x + (rounded - x) differs in 16 bits; the gradient passes through."""
    act = act_params(-10.0, 15.0)
    x = torch.tensor([823.0, -700.0, 3.3, 14.97], dtype=dtype, requires_grad=True)
    rounded = straight_through(x, fake_quantize_act(x, act))
    assert torch.equal(rounded, fake_quantize_act(x.detach(), act))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("split", [False, True])
def test_copied_into_a_plain_tensor_it_is_dequantized(split):
    """As when models are built from others, and in ``load_state_dict`` of a full-precision one."""
    weight = MixDQTensor.from_hp(torch.randn(8, 4, 3, 3), act=act_params(-3.0, 3.0))
    if split:
        other = MixDQTensor.from_hp(torch.randn(8, 2, 3, 3), 4, act=act_params(-1.0, 3.0))
        weight = SplitMixDQTensor(weight, other, torch.float32)
    layer = nn.Conv2d(weight.shape[1], 8, 3, bias=False).to(torch.bfloat16)
    layer.load_state_dict({"weight": weight})
    assert type(layer.weight) is nn.Parameter and torch.equal(layer.weight, weight.dequantize(torch.bfloat16))
    held = torch.empty_like(weight)
    held.copy_(weight)
    assert type(held) is type(weight) and torch.equal(held.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match=r"copy_ into a W8A8.* weight \[8, .*a plain tensor of torch.float32"):
        held.copy_(torch.zeros(weight.shape))


@torch.inference_mode()
def test_values_loaded_into_inference_tensors_are_used():
    """Inference tensors have no version counter, and forms of the old values are prepared."""
    first, second = (MixDQTensor.from_hp(torch.randn(64, 32), 4, act=act_params(-3.0, 3.0)) for _ in range(2))
    x = torch.randn(600, 32)
    F.linear(x, first)
    first.copy_(second)
    assert torch.equal(F.linear(x, first), F.linear(x, second))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_moves_and_views_in_inference_mode(split, inside):
    """Of inference tensors and of ordinary ones."""
    with torch.inference_mode(inside):
        weight = MixDQTensor.from_hp(torch.randn(8, 4, 3, 3), act=act_params(-3.0, 3.0))
        weight = SplitMixDQTensor(weight, weight.clone(), torch.float32) if split else weight
    with torch.inference_mode():
        for same in (
            weight.to("cpu"),
            weight.to(torch.float32),
            weight.to("cpu", torch.float32),
            weight.to(torch.zeros(1)),
        ):
            assert same is weight
        half = (weight.to(torch.bfloat16), weight.to("cpu", torch.bfloat16), weight.to(torch.zeros(1).bfloat16()))
        assert [type(w) for w in half] == 3 * [type(weight)] and {w.dtype for w in half} == {torch.bfloat16}
        assert weight.to("meta").is_meta and weight.to(torch.float32, copy=True) is not weight
        layer = nn.Conv2d(weight.shape[1], 8, 3, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.to("cpu").to(torch.bfloat16)
        assert torch.equal(layer.state_dict()["weight"].dequantize(), weight.dequantize(torch.bfloat16))
