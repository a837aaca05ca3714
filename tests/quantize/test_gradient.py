"""Gradients through quantized layers equal those of the dequantized layer in float64, eager and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixdq_ao import LayerPlan, MixDQTensor, Plan, mixdq_config, quantize_
from mixdq_ao.quantize.quantizer import act_params
from mixdq_ao.quantize.tensor import SplitMixDQTensor

from . import reference
from .reference import assert_close

BITS = [8, 4, 2]
ACTS = {"A16": None, "A8": (-2.0, 3.0, 8)}


def quantized(weight, bits, act, **bos):
    return MixDQTensor.from_hp(weight, bits, act=None if act is None else act_params(*act), **bos)


def values(weight, bits):
    """The dequantized weight, float64."""
    integers, scale = reference.round_weight(weight, bits, bits == 8)
    return integers * scale.reshape(-1, *[1] * (weight.dim() - 1))


def gradients(product, *inputs):
    """The result, its gradient, and the gradients of the inputs."""
    y = product(*inputs)
    g = torch.randn_like(y)
    return y.detach(), g, torch.autograd.grad(y, inputs, g)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(bits, act, shape, dtype):
    weight = torch.randn(9, 7).to(dtype)
    x, bias = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(9).to(dtype).requires_grad_()
    w = quantized(weight, bits, act)
    y, g, (of_x, of_bias) = gradients(lambda x, b: F.linear(x, w, b), x, bias)
    assert torch.equal(y, F.linear(x.detach(), w, bias.detach()))
    assert_close(of_x, g.double() @ values(weight, bits), terms=9, factor=dtype)
    assert_close(of_bias, g.double().reshape(-1, 9).sum(0), terms=6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
@pytest.mark.parametrize(
    "geometry",
    [{"padding": 1}, {"padding": (0, 2), "stride": 2}, {"padding": 2, "dilation": 2}, {"padding": 1, "groups": 2}],
    ids=str,
)
def test_conv2d(bits, act, geometry):
    weight = torch.randn(10, 6 // geometry.get("groups", 1), 3, 3)
    x, bias = torch.randn(3, 6, 8, 9, requires_grad=True), torch.randn(10, requires_grad=True)
    w = quantized(weight, bits, act)
    y, g, (of_x, of_bias) = gradients(lambda x, b: F.conv2d(x, w, b, **geometry), x, bias)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(F.conv2d(exact, values(weight, bits), **geometry), exact, g.double())
    assert torch.equal(y, F.conv2d(x.detach(), w, bias.detach(), **geometry))
    assert_close(of_x, wanted, terms=90)
    assert_close(of_bias, g.double().sum((0, 2, 3)), terms=g[:, 0].numel())


def test_float16_holds_small_gradients():
    """Such a gradient times a scale would be a few units of the smallest float16 number."""
    weight = torch.randn(9, 7).half() * 1e-2
    w, g = quantized(weight, 8, None), torch.full((2, 9), 0.02).half()
    x = torch.randn(2, 7).half().requires_grad_()
    (of_x,) = torch.autograd.grad(F.linear(x, w), x, g)
    assert_close(of_x, g.double() @ values(weight, 8), terms=9, factor=torch.float16)


def test_halves_of_a_split_convolution():
    weight, x = torch.randn(5, 7, 3, 3), torch.randn(2, 7, 6, 6, requires_grad=True)
    halves = weight.tensor_split([4], 1)
    w = SplitMixDQTensor(quantized(halves[0], 8, (-2, 2, 8)), quantized(halves[1], 4, (-1, 1, 8)), torch.float32)
    _, g, (of_x,) = gradients(lambda x: F.conv2d(x, w, padding=1), x)
    whole = torch.cat([values(halves[0], 8), values(halves[1], 4)], 1)
    assert_close(of_x, F.conv_transpose2d(g.double(), whole, padding=1), terms=45)


def test_bos_rows_are_constants():
    """A BOS row gives the input no gradient, but the bias gets one."""
    weight, bos = torch.randn(9, 7), torch.arange(7.0)
    w = quantized(weight, 8, (-2, 2, 8), bos_embedding=bos)
    x, bias = torch.randn(2, 3, 7), torch.randn(9, requires_grad=True)
    x[:, 0] = bos
    x.requires_grad_()
    _, g, (of_x, of_bias) = gradients(lambda x, b: F.linear(x, w, b), x, bias)
    assert not of_x[:, 0].any()
    assert_close(of_x[:, 1:], g[:, 1:].double() @ values(weight, 8), terms=9)
    assert_close(of_bias, g.double().sum((0, 1)), terms=6)


def test_what_inference_mode_knew_of_a_text_is_found_again():
    """A mask made in inference mode cannot be saved for backward."""
    w = quantized(torch.randn(9, 7), 8, (-2, 2, 8), bos_embedding=torch.arange(7.0))
    x = torch.randn(2, 3, 7, requires_grad=True)
    with torch.inference_mode():
        F.linear(x, w)
    F.linear(x, w).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_integers_do_not_become_parameters_to_train():
    model = Block()
    quantize_(model, mixdq_config(PLAN))
    with pytest.warns(UserWarning, match="mixdq_ao: quantized weights get no gradient.* 16 bits in the plan"):
        model.requires_grad_(True)
    learnt_ = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learnt_ == {"norm.weight", "norm.bias", "conv.bias", "proj.bias", "last.weight", "last.bias"}
    model.requires_grad_(False)
    assert not any(p.requires_grad for p in model.parameters())


class Block(nn.Module):
    """Trained layers around quantized ones."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.proj = nn.Linear(8, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x):
        y = x + F.silu(self.conv(self.norm(x)))
        return self.last(F.gelu(self.proj(y.flatten(2).mT)))


PLAN = Plan(
    {
        "conv": LayerPlan(weight_bits=4, act_bits=8, act_range=(-4.0, 4.0)),
        "proj": LayerPlan(weight_bits=8, act_bits=8, act_range=(-6.0, 6.0)),
    }
)


def learnt(model, x):
    """The model's gradients by name, of one loss."""
    model.zero_grad()
    model(x).square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_real_mode_has_the_gradients_of_fake_mode():
    real, x = Block(), torch.randn(4, 8, 5, 5)
    fake = copy.deepcopy(real)
    quantize_(real, mixdq_config(PLAN))
    quantize_(fake, mixdq_config(PLAN, mode="fake"))
    got, wanted = learnt(real, x), learnt(fake, x)
    assert set(wanted) - set(got) == {"conv.weight", "proj.weight"}  # fake mode trains these too
    assert set(got) == {"norm.weight", "norm.bias", "conv.bias", "proj.bias", "last.weight", "last.bias"}
    for name, gradient in got.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_compiled_gradients_are_the_same():
    model, x = Block(), torch.randn(4, 8, 5, 5)
    quantize_(model, mixdq_config(PLAN))
    wanted = learnt(model, x)
    got = learnt(torch.compile(model, fullgraph=True), x)
    assert len(got) == len(wanted) == 6
    for name, gradient in got.items():
        assert (gradient - wanted[name.removeprefix("_orig_mod.")]).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_has_the_gradients_of_a_cpu(compiled):
    """Codes at ties may differ, and cuDNN multiplies float32 in lower precision."""
    model, x = Block(), torch.randn(4, 8, 5, 5)
    quantize_(model, mixdq_config(PLAN))
    wanted, moved = learnt(model, x), model.cuda()
    got = learnt(torch.compile(moved, fullgraph=True) if compiled else moved, x.cuda())
    assert len(got) == len(wanted) == 6
    for name, gradient in got.items():
        expected = wanted[name.removeprefix("_orig_mod.")]
        assert (gradient.cpu() - expected).norm() <= 2e-2 * expected.norm(), name


def test_checkpointed_activations():
    model, x = Block(), torch.randn(4, 8, 5, 5)
    quantize_(model, mixdq_config(PLAN))
    wanted = learnt(model, x)
    got = learnt(_Checkpointed(model), x)
    assert all(torch.equal(got[f"model.{name}"], gradient) for name, gradient in wanted.items())


class _Checkpointed(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.model, x, use_reentrant=False)


@pytest.mark.parametrize("asked", [False, True])
def test_nothing_is_recorded_unless_asked(asked):
    w = quantized(torch.randn(9, 7), 8, (-2, 2, 8))
    x = torch.randn(2, 7, requires_grad=asked)
    assert F.linear(x, w).requires_grad == asked
    with torch.no_grad():
        assert not F.linear(x, w).requires_grad


def test_backward_keeps_nothing_but_the_weight():
    """Adapters train in the memory of the packed weights: no activation is saved for the base layer."""
    w, x = quantized(torch.randn(9, 7), 8, (-2, 2, 8)), torch.randn(2, 7, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(x, w)
    assert not saved
