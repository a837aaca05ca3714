"""Joint projections: the same results to the bit, the same memory, and undone without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

from mixdq_ao import LayerPlan, MixDQTensor, Plan, PlanError, QuantizationError, mixdq_config, quantize_
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.layers import find_layers, find_products
from mixdq_ao.models.fused_projections import fuse_projections, unfuse_projections
from mixdq_ao.quantize.join import joined
from mixdq_ao.quantize.quantizer import act_params
from tests.conftest import bos_row, unet_inputs

ACT = act_params(-2.0, 3.0)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("bos", [False, True])
def test_a_joint_weight_gives_the_parts_side_by_side(bits, bos):
    embedding = bos_row() if bos else None
    weights = [MixDQTensor.from_hp(torch.randn(n, 24), bits, act=ACT, bos_embedding=embedding) for n in (5, 8, 3)]
    x = torch.randn(2, 7, 24)
    if bos:
        x[:, 0] = bos_row()
    expected = torch.cat([torch.nn.functional.linear(x, w) for w in weights], -1)
    whole = joined(weights)
    assert torch.equal(torch.nn.functional.linear(x, whole), expected)
    assert torch.equal(whole.dequantize(), torch.cat([w.dequantize() for w in weights]))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (MixDQTensor.from_hp(torch.ones(4, 24), 4, act=ACT), "bits"),
        (MixDQTensor.from_hp(torch.ones(4, 16), 8, act=ACT), "length"),
        (MixDQTensor.from_hp(torch.ones(4, 24), 8, act=act_params(-1.0, 1.0)), "shared_key"),
        (MixDQTensor.from_hp(torch.ones(4, 24), 8), "act_levels"),
        (MixDQTensor.from_hp(torch.ones(4, 24, dtype=torch.float16), 8, act=ACT), "dtype"),
    ],
)
def test_weights_that_differ_are_refused(other, what):
    with pytest.raises(QuantizationError, match=f"differ in {what}"):
        joined([MixDQTensor.from_hp(torch.ones(4, 24), 8, act=ACT), other])


@pytest.fixture
def quantized(unet, calibration):
    """Uniform except for one attention whose value has other bits than query and key."""
    plan = Plan.uniform(unet, 4, 8)
    name = next(n for n in plan.layers if n.endswith("attn1.to_v"))
    plan = plan.with_layers({name: LayerPlan(weight_bits=8, act_bits=8)}).with_calibration(calibration)
    quantize_(unet, mixdq_config(plan))
    return unet, name.removesuffix(".to_v")


@torch.no_grad()
def test_the_same_output_and_bytes(quantized):
    unet, mixed = quantized
    attentions = {n.rpartition(".")[0] for n in find_layers(unet) if n.endswith(".to_q")}
    inputs = unet_inputs()
    expected, size = unet(**inputs)[0], held_bytes(unet)
    fused = fuse_projections(unet)
    assert set(fused) == attentions - {mixed}
    assert torch.equal(unet(**inputs)[0], expected)
    assert held_bytes(unet) == size


@torch.no_grad()
def test_undone_without_a_trace(quantized):
    unet, _ = quantized
    before, inputs = copy.deepcopy(unet), unet_inputs()
    fuse_projections(unet)
    unfuse_projections(unet)
    assert unet.state_dict().keys() == before.state_dict().keys()
    assert [type(p) for p in unet.attn_processors.values()] == [type(p) for p in before.attn_processors.values()]
    assert torch.equal(unet(**inputs)[0], before(**inputs)[0])


@torch.no_grad()
def test_one_product_is_called(quantized, monkeypatch):
    unet, mixed = quantized
    fused, inputs = fuse_projections(unet), unet_inputs()
    layers = find_products(unet)
    apart = [n for n in layers if n.rpartition(".")[0] in fused and n.endswith(("to_k", "to_v"))]
    called = []
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.append(name))
    unet(**inputs)
    assert not set(apart) & set(called)
    assert sum(n.endswith(("to_qkv", "to_kv")) for n in called) == len(fused)


def test_a_processor_that_was_set_since_stays(quantized):
    unet, _ = quantized
    fused = fuse_projections(unet)
    unet.get_submodule(fused[0]).set_processor(AttnProcessor())
    unfuse_projections(unet)
    assert type(unet.get_submodule(fused[0]).processor) is AttnProcessor


@torch.no_grad()
def test_what_diffusers_has_fused_is_quantized_after_it_is_apart(unet, calibration, tmp_path):
    """Joint layers are neither saved nor layers of a plan."""
    names = list(find_layers(unet))
    unet.fuse_qkv_projections()
    assert list(find_layers(unet)) == names
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    for undo in (unet.unfuse_qkv_projections, lambda: unfuse_projections(unet)):  # the first leaves layers behind
        with pytest.raises(PlanError, match=r"attention '.*attn1': its projections are fused.*unfuse_qkv_proj"):
            quantize_(unet, mixdq_config(plan))
        undo()
    quantize_(unet, mixdq_config(plan))
    assert fuse_projections(unet)
    plan.validate(unet)
    unet.save_pretrained(tmp_path)
    inputs = unet_inputs()
    assert torch.equal(type(unet).from_pretrained(tmp_path)(**inputs)[0], unet(**inputs)[0])


def test_a_joint_layer_that_is_switched_off_is_no_layer(unet, calibration):
    names = list(find_layers(unet))
    for attention in unet.modules():
        if isinstance(attention, Attention):
            attention.fuse_projections(fuse=False)
    assert list(find_layers(unet)) == names
    quantize_(unet, mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration)))


def test_diffusers_own_way_is_warned_of(unet, calibration):
    quantize_(unet, mixdq_config(Plan.uniform(unet, 4, 8).with_calibration(calibration)))
    with pytest.warns(UserWarning, match=r"copied into a layer of floating point.*mixdq_ao\.fuse_projections"):
        unet.fuse_qkv_projections()
    unet.unfuse_qkv_projections()
    unfuse_projections(unet)
    assert fuse_projections(unet)
