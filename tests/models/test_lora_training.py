"""Training of adapters on a quantized model, whose integers do not change."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers.trainer_utils import validate_quantization_for_training

from mixdq_ao import Plan, mixdq_config, quantize_
from mixdq_ao.models import MixDQConfig

from ..conftest import unet_inputs
from .same import assert_same
from .test_lora import TARGETS, load, output
from .test_whole_pipeline import IDS, tiny_clip


@pytest.fixture
def plan(unet, calibration):
    return Plan.uniform(unet, 4, 8).with_calibration(calibration)


def learner(unet, plan, seed=9, **how):
    """A quantized copy of ``unet`` with an adapter that has weights already."""
    model = copy.deepcopy(unet)
    quantize_(model, mixdq_config(plan, **how))
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False), "mine")
    return model


def gradient(model, inputs, goal):
    """The gradients of all parts of an adapter, in one vector; checks that each part has one."""
    model.zero_grad()
    (model(**inputs)[0] - goal).square().mean().backward()
    learnt = [p for p in model.parameters() if p.requires_grad]
    assert len(learnt) > 100 and all(p.grad is not None and p.grad.any() for p in learnt)
    return torch.cat([p.grad.flatten() for p in learnt])


def test_gradients_reach_every_adapter_and_are_those_of_fake_mode(unet, plan):
    """Also behind quantized layers. Codes at ties may differ between the modes, so not to the last digits."""
    inputs, goal = unet_inputs(), torch.randn(2, 4, 8, 8)
    real = gradient(learner(unet, plan), inputs, goal)
    fake = gradient(learner(unet, plan, mode="fake"), inputs, goal)
    assert (real - fake).norm() < 1e-3 * fake.norm()


def test_compiled(unet, plan):
    inputs, goal = unet_inputs(), torch.randn(2, 4, 8, 8)
    model = learner(unet, plan)
    eager = gradient(model, inputs, goal)
    model.mid_block.compile(fullgraph=True)
    assert (gradient(model, inputs, goal) - eager).norm() < 1e-3 * eager.norm()


def test_scales_may_change_before_backward(unet, plan):
    """diffusers resets the scale of a call when it ends; a teacher runs without the adapter in between."""
    model, inputs, goal = learner(unet, plan), unet_inputs(), torch.randn(2, 4, 8, 8)
    model.set_adapters("mine", 0.5)
    wanted = gradient(model, inputs, goal)
    model.set_adapters("mine", 1.0)
    assert torch.equal(gradient(model, inputs | {"cross_attention_kwargs": {"scale": 0.5}}, goal), wanted)
    model.set_adapters("mine", 0.5)
    model.zero_grad()
    y = model(**inputs)[0]
    model.set_adapters("mine", 0.0)
    output(model)
    model.set_adapters("mine", 1.0)
    (y - goal).square().mean().backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), wanted)


def test_text_encoders_train_adapters(tmp_path):
    """As transformers' Trainer requires: a quantizer with is_trainable, and adapters with gradients."""
    encoder = tiny_clip()
    encoder.save_pretrained(tmp_path)
    config = MixDQConfig(Plan.uniform(encoder, 4, 16))
    loaded = type(encoder).from_pretrained(tmp_path, quantization_config=config)
    loaded.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    validate_quantization_for_training(loaded)
    loaded(IDS).last_hidden_state.square().mean().backward()
    learnt = [p for p in loaded.parameters() if p.requires_grad]
    assert len(learnt) == 8 and all(p.grad is not None and p.grad.any() for p in learnt)


def test_an_adapter_learns_and_is_saved_without_touching_the_model(unet, plan):
    """Learns another adapter's effect from its outputs; the saved file has the same effect in a fresh model."""
    teacher, model, inputs = learner(unet, plan, seed=3), learner(unet, plan), unet_inputs()
    quantized = copy.deepcopy(unet)
    quantize_(quantized, mixdq_config(plan))
    with torch.no_grad():
        goal = teacher(**inputs)[0]
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(learnt, lr=1e-2), []
    for _ in range(25):
        loss = (model(**inputs)[0] - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < 0.2 * losses[0]
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="mine").items()}
    again = load(copy.deepcopy(quantized), state)
    assert torch.equal(output(again), output(model))
    model.unload_lora()
    assert_same(model, quantized)
