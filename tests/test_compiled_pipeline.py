"""The bundled pipeline, quantized and compiled once for all tests here: one graph, no recompilation, same pictures."""

from __future__ import annotations

import copy

import pytest
import torch

from mixdq_ao import LayerPlan, Plan, Sampling, mixdq_config, quantize_
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.metrics import psnr


@pytest.fixture(scope="module")
def pipes(_bundled):
    """The quantized pipeline, eager and compiled: 4-bit weights with some of 8 and 2, BOS rows, split shortcuts."""
    plan = Plan.uniform(_bundled.pipe.unet, 4, 8)
    others = {n: LayerPlan(weight_bits=8 if i % 2 else 2, act_bits=8) for i, n in enumerate(plan.layers) if i % 5 == 0}
    plan = plan.with_layers(others).with_calibration(_bundled.calibration)
    eager, compiled = (copy.copy(_bundled.pipe) for _ in range(2))
    unet = copy.deepcopy(_bundled.pipe.unet)
    quantize_(unet, mixdq_config(plan))
    torch._dynamo.reset()
    object.__setattr__(eager, "unet", unet)
    object.__setattr__(compiled, "unet", torch.compile(unet, fullgraph=True))
    return eager, compiled


def test_three_prompts_one_graph_same_pictures(pipes, _bundled):
    eager, compiled = pipes
    sampling = Sampling(steps=2, batch_size=2)
    generate_all(compiled, _bundled.prompts[:2], sampling)
    with torch.compiler.set_stance("fail_on_recompile"):
        for start in (0, 2, 4):
            prompts = _bundled.prompts[start : start + 2]
            pictures = [generate_all(p, prompts, sampling) for p in (eager, compiled)]
            # Fused code keeps float32 where eager code rounds, so codes at a rounding border may differ by one.
            assert psnr(pictures[1], pictures[0]).min() > 45
