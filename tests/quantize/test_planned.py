"""Plans with searched ranges or compensated rounding: real and fake mode give the same codes; a missing moment is an
early error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixdq_ao import LayerPlan, MixDQTensor, Plan, PlanError, mixdq_config, quantize_
from mixdq_ao.layers import find_layers
from mixdq_ao.quantize.fake import FakeQuantConv2d, FakeQuantLinear
from mixdq_ao.quantize.quantizer import quantize_weight
from mixdq_ao.quantize.tensor import SplitMixDQTensor, is_quantized

from .test_rounding import moment_of

BETTER = [("mse", "nearest"), ("output", "nearest"), ("minmax", "compensated"), ("output", "compensated")]


def planned(bits: int, how: tuple[str, str], **fields: Any) -> LayerPlan:
    names: dict[str, Any] = {"weight_range": how[0], "rounding": how[1]}
    return LayerPlan(weight_bits=bits, **names, **fields)


def one_layer(module: nn.Module) -> nn.Sequential:
    return nn.Sequential(module)


def quantized(model: nn.Module, layer: LayerPlan, moment: Tensor | None, mode: Any = "real") -> Any:
    model = copy.deepcopy(model)
    quantize_(model, mixdq_config(Plan({"0": layer}), mode=mode, moments=None if moment is None else {"0": moment}))
    return model[0]  # type: ignore[index]


@pytest.mark.parametrize("how", BETTER)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("module", "split"),
    [
        (nn.Linear(7, 5), None),
        (nn.Linear(130, 3, bias=False), None),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1), None),
        (nn.Conv2d(5, 4, (1, 3), dilation=2), None),
        (nn.Conv2d(7, 6, 1), 3),
        (nn.Conv2d(5, 6, 3, padding=1), 2),
    ],
    ids=["linear", "long", "conv", "dilated", "shortcut", "split"],
)
def test_real_codes_are_fake_codes(module, split, bits, how):
    moment = moment_of(module.weight[0].numel())
    layer = planned(bits, how, split=split)
    real = quantized(one_layer(module), layer, moment)
    fake = quantized(one_layer(module), layer, moment, "fake")
    assert isinstance(fake, FakeQuantLinear | FakeQuantConv2d)
    assert isinstance(real.weight, SplitMixDQTensor if split else MixDQTensor)
    for _ in range(2):  # as it rounds at every call, and kept; straight-through adds a rounding in the last place
        torch.testing.assert_close(fake.quantizer.weight(fake.weight).detach(), real.weight.dequantize())
        fake.quantizer.keep(fake.weight)


def test_each_half_is_rounded_by_its_own_block():
    module = nn.Conv2d(5, 6, 3, padding=1)
    moment = moment_of(45)
    weight: Any = quantized(one_layer(module), planned(2, ("output", "compensated"), split=2), moment).weight
    how: Any = {"weight_range": "output", "rounding": "compensated"}
    first = quantize_weight(module.weight[:, :2], 2, moment=moment[:18, :18], **how)
    second = quantize_weight(module.weight[:, 2:], 2, moment=moment[18:, 18:], **how)
    assert torch.equal(weight.first.dequantize(), first.dequantize())
    assert torch.equal(weight.second.dequantize(), second.dequantize())


def test_the_output_changes_less():
    module, x = nn.Linear(40, 12), torch.randn(300, 40) @ torch.randn(40, 40) + 1
    moment = x.T @ x / len(x)
    change = {
        how: (quantized(one_layer(module), planned(2, how), moment)(x) - module(x)).square().mean().item()
        for how in [("minmax", "nearest"), *BETTER]
    }
    assert change["minmax", "compensated"] < 0.75 * change["minmax", "nearest"]
    assert change["output", "nearest"] < change["minmax", "nearest"]
    assert change["output", "compensated"] <= min(change.values()) * 1.0001


def test_missing_moments_are_named_before_anything_changes(unet, calibration):
    plan = Plan.uniform(unet, 4, 8).with_calibration(calibration)
    better = plan.with_layers({"conv_in": planned(4, ("minmax", "compensated"))})
    moment = moment_of(unet.conv_in.weight[0].numel())
    for moments in (None, {}, {"conv_out": moment}):
        with pytest.raises(PlanError, match="'conv_in': .*compensated.*input_moments"):
            mixdq_config(better, moments=moments)
    for wrong, says in (
        (moment[:5, :5], "has 5 rows, expected 36"),
        (moment[0], "expected a square matrix"),
        (moment.int(), "expected a square matrix of floating-point numbers"),
        (moment.clone().fill_diagonal_(float("nan")), "not finite"),
        (moment + torch.triu(torch.ones_like(moment) * moment.max()), "not symmetric"),
        (-moment, "negative diagonal"),
    ):
        with pytest.raises(PlanError, match=f"'conv_in': .*{says}"):
            quantize_(unet, mixdq_config(better, moments={"conv_in": wrong}))
        assert not any(is_quantized(m.weight) for m in find_layers(unet).values())
    quantize_(unet, mixdq_config(better, moments={"conv_in": moment, "unknown": moment[:2, :2]}))
    assert is_quantized(unet.conv_in.weight)


def test_an_override_needs_no_moment(unet):
    plan = Plan({"conv_in": planned(4, ("output", "nearest"))})
    quantize_(unet, mixdq_config(plan, overrides={"conv_in": None}))
    assert not is_quantized(unet.conv_in.weight)


def test_convolutions_in_groups():
    model = one_layer(nn.Conv2d(4, 8, 3, groups=2))
    for how in BETTER[1:]:
        with pytest.raises(PlanError, match="'0': .*2 groups, expected 'minmax' or 'mse'"):
            quantized(model, planned(4, how), moment_of(18))
    with pytest.raises(PlanError, match="2 groups"):
        Plan({"0": planned(4, BETTER[-1])}).validate(model)
    assert is_quantized(quantized(model, planned(4, BETTER[0]), None).weight)


def test_fake_mode_learns_and_compiles():
    model = one_layer(nn.Linear(12, 5))
    layer = quantized(model, planned(2, ("output", "compensated")), moment_of(12), "fake")
    x = torch.randn(3, 12)
    layer(x).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    before = layer(x).detach()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, before)
        layer.weight.mul_(-1.5)
        assert not torch.allclose(layer(x), before)


def test_the_moment_goes_where_the_weight_is():
    layer = quantized(one_layer(nn.Linear(6, 3)), planned(2, BETTER[-1]), moment_of(6), "fake")
    assert layer.quantizer.moment is not None and "moment" not in layer.state_dict()
    assert layer.to("meta").quantizer.moment.is_meta
