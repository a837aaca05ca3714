"""What measurements depend on is told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from mixdq_ao import LayerPlan, Plan, mixdq_config, quantize_
from mixdq_ao.models.components import quantize_text_encoders
from mixdq_ao.search.fingerprint import fingerprint


def test_the_fingerprint_sees_weights_and_settings():
    model = nn.Linear(3, 2)
    first = fingerprint(model, {"a": 1})
    assert first == fingerprint(model, {"a": 1}) != fingerprint(model, {"a": 2})
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model, {"a": 1}) != first


def test_a_plain_model_has_the_fingerprint_of_stores_on_disk():
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.arange(p.numel()).reshape(p.shape) + i)
    assert fingerprint(model, {"a": 1}) == "6429ab16656163d1f0eea5e47c010752"
    assert fingerprint(torch.compile(model), {"a": 1}) == fingerprint(model, {"a": 1})


def quantized(**changed) -> nn.Module:
    """A convolution of two halves and a linear layer, quantized."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Linear(8, 4))
    fields = {"weight_bits": 4, "act_bits": 8, "act_range": (-1.0, 1.0)} | changed
    split = LayerPlan(split=3, split_act_range=(-2.0, 2.0), **fields)
    quantize_(model, mixdq_config(Plan({"0": split, "1": LayerPlan(**fields)})))
    return model


def test_quantized_weights_count_by_what_they_hold():
    changes = [{"weight_bits": 8}, {"weight_bits": 2}, {"act_bits": 4}, {"act_bits": 16}, {"act_range": (-1.0, 2.0)}]
    found = [fingerprint(quantized(**changed), {}) for changed in ({}, *changes)]
    assert fingerprint(quantized(), {}) == found[0] and len(set(found)) == len(found)
    model = quantized()
    with torch.no_grad():
        model[0].weight.second.qdata[0] ^= 1
    assert fingerprint(model, {}) not in found


def test_a_pipeline_whose_text_encoders_are_quantized(bundled):
    plain = fingerprint(bundled.pipe, {})
    quantize_text_encoders(bundled.pipe)
    assert fingerprint(bundled.pipe, {}) != plain


def pipeline(seed: int = 0, **changed) -> SimpleNamespace:
    torch.manual_seed(seed)
    parts = {name: nn.Linear(3, 2) for name in ("unet", "vae", "text_encoder")}
    parts |= {"scheduler": DDIMScheduler(), "tokenizer": object(), "safety_checker": None} | changed
    return SimpleNamespace(components=parts, **parts)


@pytest.mark.parametrize(
    "changed",
    [
        {"vae": nn.Linear(3, 2)},
        {"text_encoder": nn.Linear(3, 2)},
        {"vae": None},
        {"scheduler": DDIMScheduler(num_train_timesteps=999)},
        {"scheduler": EulerDiscreteScheduler()},
    ],
    ids=lambda changed: "".join(changed),
)
def test_every_part_of_a_pipeline_counts(changed):
    known = fingerprint(pipeline(), {})
    assert fingerprint(pipeline(), {}) == known != fingerprint(pipeline(**changed), {})


def test_where_a_part_came_from_does_not():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(_name_or_path="elsewhere")
    assert fingerprint(pipeline(), {}) == fingerprint(pipeline(scheduler=scheduler), {})
