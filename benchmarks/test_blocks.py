"""Blocks of transformers, compiled: FLUX's (attention over picture and text), SANA's (linear attention, convolutions).

The blocks of diffusers at a third and a half of their width, random weights, batch 1, ranges of what is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel
from torch import nn

from mixdq_ao import Plan, calibrate, mixdq_config, quantize_

from .turns import in_turn

TEXT = 64
"""Tokens of text."""
NEAR = {"W8A8": 0.05, "W4A8": 0.3}
"""Relative error of the output against float32, of random weights rounded to nearest; a wrong kernel gives 1."""


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """One double and one single block, width 1024 (FLUX.1: 3072), 256 picture tokens."""
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=8, joint_attention_dim=1024, pooled_projection_dim=256
    )
    inputs = {
        "hidden_states": torch.randn(1, 256, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "pooled_projections": torch.randn(1, 256),
        "timestep": torch.full((1,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, inputs


def sana() -> tuple[nn.Module, dict[str, Any]]:
    """Two blocks, width 1120 (SANA 1.6B: 2240), 256 picture tokens."""
    model = SanaTransformer2DModel(
        num_layers=2, num_attention_heads=35, num_cross_attention_heads=10, cross_attention_dim=1120,
        caption_channels=1024, sample_size=16,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 32, 16, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 1024),
        "timestep": torch.full((1,), 500.0),
    }
    return model, inputs


@pytest.mark.slow
@pytest.mark.parametrize("build", [flux, sana])
def test_blocks(benchmark: Any, build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    """Two compilations of half a minute for each."""
    torch.manual_seed(0)
    model, inputs = build()
    model = model.eval().requires_grad_(False)

    def call(m):
        return m(**inputs, return_dict=False)[0]

    with torch.no_grad():
        expected = call(model)
        calibration = replace(calibrate(model, run=lambda: call(model)), bos_embedding=None)
        models: dict[str, nn.Module] = {"float32": model}
        for bits in (8, 4):
            quantized = copy.deepcopy(model)
            quantize_(quantized, mixdq_config(Plan.uniform(model, bits, 8).with_calibration(calibration, bos=False)))
            models[f"W{bits}A8"] = quantized
        compiled = {}
        for name, m in models.items():
            torch._dynamo.reset()
            compiled[name] = torch.compile(m, fullgraph=True)
            error = ((call(compiled[name]) - expected).norm() / expected.norm()).item()
            print(f"\n  {name}: relative error {error:.2g}", end="")
            assert error < NEAR.get(name, 1e-4), f"{name}: relative error {error:.2g}"
        in_turn(benchmark, {n: lambda m=m: call(m) for n, m in compiled.items()}, rounds=25)
