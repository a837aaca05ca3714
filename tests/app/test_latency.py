"""Which variants are timed, and against what; compilation itself is tested with the pipeline."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mixdq_ao import Plan
from mixdq_ao.app import latency
from mixdq_ao.app.measure import speedup
from tests.conftest import unet_inputs


@pytest.fixture
def compiled(monkeypatch):
    """The models given to torch.compile, in order, left as they are; compiling each seems to take 10 s."""
    models, seconds = [], iter(range(0, 10_000, 10))
    monkeypatch.setattr(latency, "unet_inputs", lambda pipe, prompts: unet_inputs(len(prompts)))
    monkeypatch.setattr(torch, "compile", lambda model, **options: models.append(model) or model)
    monkeypatch.setattr(latency, "time", SimpleNamespace(monotonic=lambda: float(next(seconds))))
    return models


@pytest.fixture
def plans(unet, calibration):
    return {f"w{bits}": Plan.uniform(unet, bits, 8).with_calibration(calibration) for bits in (8, 4, 2)}


def test_every_variant_without_a_deadline(unet, plans, compiled):
    found = latency.latencies(SimpleNamespace(unet=unet), plans, ["a", "b"])
    assert list(found) == ["fp32", "w8", "w4", "w2"]
    assert found["fp32"]["speedup"] == 1.0 and all(f["latency_ms"] > 0 for f in found.values())
    assert len(compiled) == 4 and unet not in compiled  # the pipeline's own model stays what it is


@pytest.mark.parametrize(("deadline", "timed"), [(0, ["fp32", "w8"]), (49, ["fp32", "w8"]), (50, ["fp32", "w8", "w4"])])
def test_a_deadline_leaves_out_what_would_end_later(unet, plans, compiled, deadline, timed):
    """Each model takes two looks at the clock, 10 s apart: the third begins at 40 and ends at 50."""
    pipe = SimpleNamespace(unet=unet)
    assert list(latency.latencies(pipe, plans, ["a"], least=1, deadline=deadline)) == timed


def test_speedup_is_the_median_of_the_rounds():
    assert speedup([2.0, 4.0, 90.0], [1.0, 1.0, 30.0]) == 3.0
