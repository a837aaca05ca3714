"""Quantized models to save: the small UNet at mixed bits, and a smaller one whose files are damaged many times."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel

from mixdq_ao import LayerPlan, Plan, mixdq_config, quantize_


def mixed_plan(model, calibration) -> Plan:
    """W8, W4, W2 and 16 bits in turn, activations of 8, 16 and 4 bits, symmetric and asymmetric, BOS, splits."""
    plan = Plan.uniform(model, 8, 8).with_calibration(calibration)
    layers = {}
    for i, (name, layer) in enumerate(plan.layers.items()):
        bits = (8, 4, 2)[i % 3]
        symmetric = True if bits == 8 or i % 2 else False
        layers[name] = replace(layer, weight_bits=bits, symmetric=symmetric, act_bits=(8, 8, 16, 8, 4)[i % 5])
        if layer.bos:  # all of them keep their quantized activations, which is what BOS rows are for
            layers[name] = replace(layers[name], act_bits=8)
    return Plan({**layers, "conv_in": LayerPlan()}, {"source": "a test"}, plan.bos_embedding)


@pytest.fixture(scope="session")
def plan(_unet, calibration) -> Plan:
    return mixed_plan(_unet, calibration)


@pytest.fixture(scope="session")
def _quantized(_unet, plan):
    return {dtype: _in_type(_unet, plan, dtype) for dtype in (torch.float32, torch.bfloat16)}


def _in_type(unet, plan, dtype):
    model = copy.deepcopy(unet).to(dtype)
    quantize_(model, mixdq_config(plan))
    return model


@pytest.fixture
def quantized(_quantized):
    """The small UNet, float32, quantized by ``plan``."""
    return _quantized[torch.float32]


@pytest.fixture
def quantized_bf16(_quantized):
    return _quantized[torch.bfloat16]


@pytest.fixture(scope="session")
def tiny():
    """A few layers of each kind, with a split shortcut; no BOS."""
    torch.manual_seed(3)
    model = UNet2DModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4,),
        norm_num_groups=2,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
    ).eval()
    plan = Plan.uniform(model, 4, 8)
    ranges = {n: replace(v, act_range=(-1.0, 2.0)) for n, v in plan.layers.items()}
    split = "up_blocks.0.resnets.0.conv_shortcut"
    ranges[split] = replace(ranges[split], split=4, split_act_range=(-2.0, 2.0))
    quantize_(model, mixdq_config(Plan(ranges)))
    return model
