"""A whole UNet call: the bundled pipeline's, eager and compiled, and a mid-size UNet of SDXL's layout.

Contenders share one process and take turns. torchao's dynamic int8 reaches linear layers only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mixdq_ao import Plan, calibrate, mixdq_config, quantize_
from mixdq_ao.app.latency import unet_inputs
from mixdq_ao.app.subject import bundled
from mixdq_ao.search.metrics import psnr

from .layouts import MID
from .turns import in_turn


def torchao_dynamic(unet: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    unet = copy.deepcopy(unet)
    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return unet


def ours(unet: nn.Module, plan: Plan, dtype: torch.dtype = torch.float32) -> nn.Module:
    unet = copy.deepcopy(unet).to(dtype)
    quantize_(unet, mixdq_config(plan))
    return unet


class InBfloat16(nn.Module):
    """Converts float32 inputs and outputs around a bfloat16 model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        inputs = tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
        return (self.model(**inputs)[0].float(),)


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    """Full precision, uniform BOS-aware plans and torchao, by name."""
    shapes = bundled()
    pipe = shapes.load_pipeline()
    texts = [p.text for p in shapes.prompts(32, seed=55)]
    calibration = calibrate(pipe, texts, steps=(1, 4))
    models = {"float32": pipe.unet}
    for bits in (8, 4):
        models[f"W{bits}A8"] = ours(pipe.unet, Plan.uniform(pipe.unet, bits, 8).with_calibration(calibration))
    models["torchao int8 dynamic"] = torchao_dynamic(pipe.unet)
    return SimpleNamespace(pipe=pipe, texts=texts, models=models)


def run_all(benchmark: Any, models: dict[str, Callable[..., Any]], inputs: dict[str, Any], rounds: int) -> None:
    """Times all contenders, after checking each one's output against full precision."""
    with torch.no_grad():
        expected = models["float32"](**inputs)[0]
        span = expected.max() - expected.min()
        for name, model in models.items():
            if name != "float32":
                signal = psnr((model(**inputs)[0] - expected.min()) / span, (expected - expected.min()) / span)
                assert signal.min() > 20, f"{name}: {signal.min():.1f} dB"
        in_turn(benchmark, {n: lambda m=m: m(**inputs) for n, m in models.items()}, rounds=rounds)


@pytest.mark.parametrize("batch", [pytest.param(8, marks=pytest.mark.quick), 32])
def test_bundled_eager(benchmark: Any, subject: SimpleNamespace, batch: int) -> None:
    run_all(benchmark, subject.models, unet_inputs(subject.pipe, subject.texts[:batch]), rounds=15)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [32])
def test_bundled_compiled(benchmark: Any, subject: SimpleNamespace, batch: int) -> None:
    """Four compilations of one to two minutes each on two cores."""
    models = {}
    for name, model in subject.models.items():
        torch._dynamo.reset()
        models[name] = torch.compile(model, fullgraph=True)
    run_all(benchmark, models, unet_inputs(subject.pipe, subject.texts[:batch]), rounds=25)


@pytest.fixture(scope="module")
def mid() -> SimpleNamespace:
    """SDXL's channels with fewer blocks: random weights, 64x64 latent, batch 1; calibrated on what is timed."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**MID).eval().requires_grad_(False)
    inputs = {
        "sample": torch.randn(1, 4, 64, 64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 1280), "time_ids": torch.randn(1, 6)},
        "return_dict": False,
    }
    with torch.no_grad():
        calibration = replace(calibrate(unet, run=lambda: unet(**inputs)), bos_embedding=None)
    models: dict[str, Callable[..., Any]] = {"float32": unet}
    for bits in (8, 4):
        plan = Plan.uniform(unet, bits, 8).with_calibration(calibration, bos=False)
        models[f"W{bits}A8"] = ours(unet, plan)
        models[f"W{bits}A8 bfloat16"] = InBfloat16(ours(unet, plan, torch.bfloat16))
    return SimpleNamespace(inputs=inputs, models=models)


@pytest.mark.slow
def test_mid_size_eager(benchmark: Any, mid: SimpleNamespace) -> None:
    dynamic = torchao_dynamic(mid.models["float32"])
    run_all(benchmark, mid.models | {"torchao int8 dynamic": dynamic}, mid.inputs, rounds=5)


@pytest.mark.slow
def test_mid_size_compiled(benchmark: Any, mid: SimpleNamespace) -> None:
    """Seven compilations of a minute or more each on two cores."""
    unet, models = mid.models["float32"], {}
    others = {"bfloat16": InBfloat16(copy.deepcopy(unet).bfloat16()), "torchao int8 dynamic": torchao_dynamic(unet)}
    for name, model in (mid.models | others).items():
        torch._dynamo.reset()
        models[name] = torch.compile(model, fullgraph=True)
    run_all(benchmark, models, mid.inputs, rounds=7)


@pytest.mark.slow
def test_mid_size_training(benchmark: Any, mid: SimpleNamespace) -> None:
    """Forward and backward of an adapter's training, eager; no optimizer, which is the same for all."""
    pytest.importorskip("peft", reason="adapters are an extra")
    from peft import LoraConfig

    goal = torch.randn(1, 4, 64, 64)
    full = copy.deepcopy(mid.models["float32"])
    models = {"float32": full, "bfloat16": InBfloat16(copy.deepcopy(full).bfloat16())}
    models |= {name: copy.deepcopy(model) for name, model in mid.models.items() if name != "float32"}
    for model in models.values():
        unet = model.model if isinstance(model, InBfloat16) else model
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False), "mine")

    def step(model: nn.Module) -> None:
        model.zero_grad()
        (model(**mid.inputs)[0] - goal).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    in_turn(benchmark, {n: lambda m=m: step(m) for n, m in models.items()}, rounds=5, warmup=1)
