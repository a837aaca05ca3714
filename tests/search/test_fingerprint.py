"""What measurements depend on is told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from mixdq_ao.search.fingerprint import fingerprint


def test_the_fingerprint_sees_weights_and_settings():
    model = nn.Linear(3, 2)
    first = fingerprint(model, {"a": 1})
    assert first == fingerprint(model, {"a": 1}) != fingerprint(model, {"a": 2})
    with torch.no_grad():
        model.weight[0, 0] += 1
    assert fingerprint(model, {"a": 1}) != first


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
