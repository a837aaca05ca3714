"""Text projections as one product for each precision: same results to the bit, same memory, once per call, undone."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks.layouts import TINY
from mixdq_ao import (
    LayerPlan,
    MixDQError,
    Plan,
    forget_text_projections,
    mixdq_config,
    quantize_,
    reuse_text_projections,
)
from mixdq_ao.app.measure import held_bytes
from mixdq_ao.layers import find_layers, reads_text
from mixdq_ao.models.fused_projections import fuse_projections
from mixdq_ao.models.fused_text import fuse_text_projections, unfuse_text_projections
from tests.conftest import text_rows, unet_inputs


@pytest.fixture
def quantized(unet, calibration):
    """A 4-bit plan in which the values of two cross attentions have 8 bits."""
    plan = Plan.uniform(unet, 4, 8)
    values = [n for n in plan.layers if n.endswith("attn2.to_v")][:2]
    plan = plan.with_layers({n: LayerPlan(weight_bits=8, act_bits=8) for n in values})
    quantize_(unet, mixdq_config(plan.with_calibration(calibration)))
    return unet


def count_products(unet: nn.Module) -> list[int]:
    """A list of the output sizes of linear products, which grows as the UNet runs."""
    seen: list[int] = []
    for layer in unet.modules():
        if isinstance(layer, nn.Linear) and layer.weight.shape[1] == 24:
            layer.register_forward_hook(lambda _, args, y: seen.append(y.shape[-1]))
    return seen


@torch.no_grad()
def test_the_same_bits_and_bytes_in_one_product_per_precision(quantized):
    inputs, names = unet_inputs(), [n for n in find_layers(quantized) if reads_text(n)]
    assert any(quantized.get_submodule(n).weight.bos_output is not None for n in names)
    expected, size = quantized(**inputs)[0], held_bytes(quantized)
    sizes = fuse_text_projections(quantized)
    assert sizes == (len(names) - 2, 2)
    calls = count_products(quantized)
    assert torch.equal(quantized(**inputs)[0], expected)
    assert len(calls) == 2 and held_bytes(quantized) == size
    quantized(**unet_inputs(3))
    assert len(calls) == 4


@torch.no_grad()
def test_positional_text_and_undone_without_a_trace(quantized):
    before, inputs = copy.deepcopy(quantized), unet_inputs()
    fuse_text_projections(quantized)
    rest = {k: v for k, v in inputs.items() if k not in ("sample", "timestep", "encoder_hidden_states")}
    y = quantized(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], **rest)[0]
    assert torch.equal(y, before(**inputs)[0])
    unfuse_text_projections(quantized)
    assert quantized.state_dict().keys() == before.state_dict().keys()
    assert torch.equal(quantized(**inputs)[0], before(**inputs)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "order", ["reuse fuse", "fuse reuse", "pairs reuse fuse", "pairs fuse reuse", "fuse pairs reuse"]
)
def test_with_the_other_two_in_any_order(quantized, order):
    """``pairs``: whether fuse_projections is used too."""
    inputs, other = unet_inputs(), unet_inputs() | {"encoder_hidden_states": text_rows(2)}
    expected, size = [quantized(**i)[0] for i in (inputs, other)], held_bytes(quantized)
    pipe = SimpleNamespace(unet=quantized)
    for step in order.split():
        if step == "pairs":
            fuse_projections(quantized)
        elif step == "fuse":
            fuse_text_projections(pipe.unet)
        else:
            reuse_text_projections(pipe)
        assert torch.equal(pipe.unet(**inputs)[0], expected[0])
    calls = count_products(quantized)
    pipe.unet(**inputs)
    calls.clear()
    for _ in range(2):
        assert torch.equal(pipe.unet(**inputs)[0], expected[0])
    assert calls == [] and held_bytes(quantized) == size
    assert torch.equal(pipe.unet(**other)[0], expected[1]) and len(calls) == 2
    forget_text_projections(pipe)
    assert torch.equal(quantized(**inputs)[0], expected[0])
    unfuse_text_projections(quantized)
    assert torch.equal(quantized(**inputs)[0], expected[0])


@torch.no_grad()
def test_what_a_broken_call_leaves_behind_is_not_used(quantized):
    inputs, other = unet_inputs(), unet_inputs() | {"encoder_hidden_states": text_rows(2)}
    expected = quantized(**other)[0]
    fuse_text_projections(quantized)
    broken = quantized.mid_block.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quantized(**inputs)
    broken.remove()
    assert torch.equal(quantized(**other)[0], expected)


@torch.no_grad()
def test_in_one_compiled_graph():
    torch._dynamo.reset()
    config = TINY | {
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "attention_head_dim": 1,
    }
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    shapes = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60, "mid_block_type": None}
    unet = UNet2DConditionModel(**config | blocks | shapes | {"transformer_layers_per_block": 1}).eval()
    plan = Plan.uniform(unet, 4, 8)
    ranged = {n: replace(layer, act_range=(-4.0, 4.0)) for n, layer in plan.layers.items()}
    quantize_(unet, mixdq_config(plan.with_layers(ranged)))
    inputs, graphs = unet_inputs(), []
    expected = unet(**inputs)[0]
    products = sum(type(m) is nn.Linear for m in unet.modules())
    (joined,) = fuse_text_projections(unet)

    def backend(graph, _):
        graphs.append(sum(n.op == "call_function" and "linear" in str(n.target) for n in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(**inputs)[0], expected, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        again = compiled(**(inputs | {"encoder_hidden_states": text_rows(2)}))[0]
    assert not torch.allclose(again, expected, atol=1e-4)
    assert joined == 6 and graphs == [products - joined + 1]


def test_what_cannot_be_joined(unet):
    assert fuse_text_projections(unet) == ()  # floating point: left as it is
    assert not any("layer" in n.split(".") for n, _ in unet.named_modules())
    with pytest.raises(MixDQError, match="Linear, expected a UNet2DConditionModel"):
        fuse_text_projections(nn.Linear(2, 2))
