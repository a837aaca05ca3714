"""Plans with smoothing and rotation in the features built on ``quantize_``: levels, files, adapters, predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from mixdq_ao import (
    Calibration,
    Plan,
    QuantizationError,
    ScheduleError,
    TemporalPlan,
    calibrate,
    layer_latencies,
    load_quantized,
    mixdq_config,
    prepare,
    probe_steps,
    quantize_,
    save_quantized,
)
from mixdq_ao.quantize.folds import fold_, foldings_of, planned_folds
from mixdq_ao.search.prediction import measured_errors
from tests.quantize import folding
from tests.quantize.folding import BLOCK, PROMPTS, call, toy

calibration, plan = folding.calibration, folding.plan


def test_a_saved_model_loads_and_its_plan_makes_it_again(plan: Plan, tmp_path: Any):
    model: Any = toy().transformer
    quantize_(model, mixdq_config(plan))
    save_quantized(model, tmp_path / "unet")
    loaded: Any = load_quantized(tmp_path / "unet")
    assert torch.equal(call(loaded), call(model))
    kept = loaded.hf_quantizer.quantization_config.plan
    again = toy().transformer
    quantize_(again, mixdq_config(kept))
    assert torch.equal(call(again), call(model))


@pytest.mark.parametrize("target", ["attn1.to_q", "attn2.to_v", "ff.net.0.proj"])
def test_adapters_are_refused(plan: Plan, target: str):
    """Adapters of a reader, of the source of values, and of a layer that keeps 16 bits."""
    model: Any = toy().transformer
    name = f"{BLOCK}.{target}"
    kept = plan.with_layers({f"{BLOCK}.attn1.to_q": replace(plan.layers["conv_in"], weight_bits=16, act_bits=16)})
    quantize_(model, mixdq_config(kept))
    with pytest.raises(QuantizationError, match="smoothing or rotation is folded into its weight"):
        model.add_adapter(LoraConfig(r=2, target_modules=[name]))
    other: Any = toy().transformer
    quantize_(other, mixdq_config(plan))
    other.add_adapter(LoraConfig(r=2, target_modules=[f"{BLOCK}.attn2.to_k"]))


def test_levels_share_what_is_folded(plan: Plan, calibration: Calibration):
    model, by_hand = toy().transformer, toy().transformer
    four = plan.with_layers({n: replace(v, weight_bits=4) for n, v in plan.layers.items()})
    runtime = prepare(model, TemporalPlan({"w8": plan, "w4": four}, ("w8", "w4")), storage="own")
    fold_(by_hand, planned_folds(by_hand, foldings_of(plan.layers)))
    bare = {n: replace(v, smoothing=None, rotation=None) for n, v in plan.layers.items()}
    quantize_(by_hand, mixdq_config(Plan(bare, {}, plan.bos_embedding)))
    runtime.level = "w8"
    torch.testing.assert_close(call(model), call(by_hand), rtol=1e-4, atol=1e-4)
    plain = four.with_calibration(calibrate(toy(), PROMPTS))
    with pytest.raises(ScheduleError, match="level 'w4' has another smoothing"):
        prepare(toy().transformer, TemporalPlan({"w8": plan, "w4": plain}, ("w8", "w4")))


def test_measuring_plans_scoring_steps_and_timing_layers(plan: Plan, calibration: Calibration):
    pipe = toy()
    before = {n: p.clone() for n, p in pipe.transformer.state_dict().items()}
    plain = plan.with_calibration(calibrate(pipe, PROMPTS))
    errors = measured_errors(pipe, [plan, plain], PROMPTS)
    assert 0 < errors[0] < 0.7 * errors[1]
    scores = probe_steps(pipe, PROMPTS, steps=1, calibration=calibration, weight_bits=(8,), act_bits=(8,), probes=1)
    assert set(scores[0].layers) == set(calibration.layers)
    times = layer_latencies(pipe.transformer, calibration, lambda: call(pipe.transformer), weight_bits=(8,), rounds=1)
    assert times[f"{BLOCK}.ff.net.2", 8, 8] > 0
    assert all(torch.equal(p, before[n]) for n, p in pipe.transformer.state_dict().items())
