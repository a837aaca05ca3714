"""Errors of whole plans: measured as quantizing measures them, predicted as the additive program counts them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from mixdq_ao import LayerPlan, Plan, PlanError, Sampling, SensitivityError, allocate, mixdq_config, quantize_
from mixdq_ao.layers import find_layers
from mixdq_ao.search import prediction as module_under_test
from mixdq_ao.search.metrics import error_power
from mixdq_ao.search.prediction import (
    Agreement,
    check_prediction,
    faked,
    measured_errors,
    predicted_error,
    random_plans,
    with_measured,
)
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity
from mixdq_ao.search.trial import Trials, run

from .test_distributed import PROMPTS, Pipe


def sensitivity() -> Sensitivity:
    layer = LayerSensitivity(
        group="quality",
        weight_size=10,
        act_size=10,
        weight_errors={2: 1e-1, 4: 1e-2, 8: 1e-4},
        act_errors={8: 1e-5},
    )
    return Sensitivity({"a": layer, "b": layer})


def test_measured_is_what_real_mode_gives_and_the_model_stays(bundled):
    pipe, prompts = bundled.pipe, bundled.prompts[:3]
    sampling = Sampling(steps=2, batch_size=2)
    plans = [Plan.uniform(pipe.unet, bits, 8).with_calibration(bundled.calibration) for bits in (4, 8)]
    before = {n: p.clone() for n, p in pipe.unet.named_parameters()}
    errors = measured_errors(pipe, plans, prompts, sampling=sampling)
    assert all(torch.equal(before[n], p) for n, p in pipe.unet.named_parameters())
    assert not any(type(m).__name__.startswith("Fake") for m in pipe.unet.modules())
    for plan, error in zip(plans, errors, strict=True):
        for mode, tolerance in (("fake", 1e-6), ("real", 0.1)):  # codes flip at ties, and those behind them
            clone = copy.copy(pipe)
            object.__setattr__(clone, "unet", copy.deepcopy(pipe.unet))
            quantize_(clone.unet, mixdq_config(plan, mode=mode))
            outputs = [
                [run(p, prompts[i : i + 2], Sampling(steps=2, seed=i), images=False).denoised for i in (0, 2)]
                for p in (pipe, clone)
            ]
            joined = [torch.cat(o, 1) for o in outputs]
            assert error == pytest.approx(error_power(*joined), rel=tolerance)


def test_a_plan_that_does_not_fit_changes_nothing(unet):
    with pytest.raises(PlanError, match="nowhere"), faked(unet, Plan({"nowhere": LayerPlan(weight_bits=8)})):
        pass
    with pytest.raises(ZeroDivisionError), faked(unet, Plan.uniform(unet, 4, 16)):
        raise ZeroDivisionError
    assert not any(type(m).__name__.startswith("Fake") for m in unet.modules())


class Own(nn.Linear):
    """A linear layer of somebody's own class."""


def test_layers_stay_of_their_class_and_in_fake_mode():
    pipe = Pipe()
    pipe.unet.other = Own(12, 12)
    pipe.unet.add_module("plain", nn.Linear(3, 3))
    quantize_(pipe.unet, mixdq_config(Plan({"linear": LayerPlan(weight_bits=2)}), mode="fake"))
    before = {n: (type(m), m._modules.get("quantizer")) for n, m in pipe.unet.named_modules()}
    assert before["linear"][1] is not None
    with faked(pipe.unet, Plan.uniform(pipe.unet, 4, 16)):
        assert all(type(m).__name__.startswith("FakeQuant") for m in find_layers(pipe.unet).values())
        assert isinstance(pipe.unet.other, Own)
        assert pipe.unet.linear.quantizer.layer.weight_bits == 4
    assert {n: (type(m), m._modules.get("quantizer")) for n, m in pipe.unet.named_modules()} == before
    Trials(pipe, PROMPTS, Sampling()).measure("linear", LayerPlan(weight_bits=8), None, images=False)
    assert {n: (type(m), m._modules.get("quantizer")) for n, m in pipe.unet.named_modules()} == before


def test_predicted_is_what_the_program_says():
    s = sensitivity()
    found = allocate(s, weight_bits=6, act_bits=8, objective="additive")
    assert found.predicted_error == pytest.approx(predicted_error(s, found.plan))
    assert predicted_error(s, Plan({"a": LayerPlan(weight_bits=4)})) == pytest.approx(1e-2)
    with pytest.raises(SensitivityError, match="layer 'a': no act_errors at 4 bits"):
        predicted_error(s, Plan({"a": LayerPlan(weight_bits=4, act_bits=4)}))


def test_random_plans_repeat_and_differ():
    s = Sensitivity({f"layer{i}": sensitivity().layers["a"] for i in range(50)})
    plans = random_plans(s, 20, seed=3)
    assert plans == random_plans(s, 20, seed=3) != random_plans(s, 20, seed=4)
    means = [np.mean([layer.weight_bits for layer in p.layers.values()]) for p in plans]
    assert min(means) < 4 < max(means)


def analyzed(**fields: Any) -> Sensitivity:
    layer = replace(sensitivity().layers["a"], **fields)
    return Sensitivity({f"layer{i}": layer for i in range(9)})


def test_random_plans_are_rounded_as_they_were_analyzed():
    s = analyzed(weight_roundings={2: "output compensated", 4: "mse nearest"})
    known = {2: ("output", "compensated"), 4: ("mse", "nearest"), 8: ("minmax", "nearest")}
    layers = [layer for plan in random_plans(s, 9) for layer in plan.layers.values()]
    assert {layer.weight_bits for layer in layers} == set(known)
    assert all((layer.weight_range, layer.rounding) == known[layer.weight_bits] for layer in layers)


def test_a_check_measures_what_it_can_predict(monkeypatch):
    """Widths that were analyzed, and nothing measured where something is missing."""
    measured: list[Plan] = []

    def measure(pipe: Any, plans: list[Plan], *args: Any, **kwargs: Any) -> list[float]:
        measured.extend(plans)
        return [float(i + 1) for i in range(len(plans))]

    monkeypatch.setattr(module_under_test, "measured_errors", measure)
    s, kept = analyzed(weight_errors={4: 1e-2, 8: 1e-4}), LayerPlan()
    plan = allocate(s, weight_bits=6, act_bits=8, objective="additive", weight_choices=(4, 8)).plan
    plan = plan.with_layers({"layer0": kept})
    check = lambda s, plan=plan, **more: check_prediction(None, s, plan, PROMPTS, ranges=lambda p: p, count=5, **more)  # noqa: E731
    assert check(s).metadata["prediction_agreement"]["plans"] == 5
    assert len(measured) == 6 and all(p.layers["layer0"] == kept for p in measured)
    assert {layer.weight_bits for p in measured for layer in p.layers.values()} == {4, 8, 16}
    measured.clear()
    with pytest.raises(SensitivityError, match=r"weight_errors at \[4\] bits, expected 2 widths at least"):
        check(analyzed(weight_errors={4: 1e-2}))
    with pytest.raises(SensitivityError, match="layer 'layer1': no act_errors at 4 bits"):
        check(s, plan.with_layers({"layer1": LayerPlan(weight_bits=4, act_bits=4)}))
    with pytest.raises(SensitivityError, match="as it was analyzed, 'output' and 'compensated', which needs"):
        check(analyzed(weight_roundings=dict.fromkeys((2, 4, 8), "output compensated")))
    assert not measured
    check_prediction(None, analyzed(weight_errors={}), plan, PROMPTS, ranges=lambda p: p)
    assert measured == [plan]


def test_a_model_that_gives_zero_has_no_relative_error():
    pipe = Pipe()
    for parameter in pipe.unet.linear.parameters():
        parameter.data.zero_()
    with pytest.raises(SensitivityError, match="output has power 0.0, expected finite and above 0"):
        measured_errors(pipe, [Plan({"conv": LayerPlan(weight_bits=4)})], PROMPTS)


def test_agreement():
    predicted = np.exp(np.random.default_rng(0).normal(size=40))
    measured = 1.5 * predicted * np.exp(np.random.default_rng(1).normal(scale=0.1, size=40))
    found = Agreement.of(predicted.tolist(), measured.tolist())
    assert found.plans == 40 and found.rank == pytest.approx(spearmanr(predicted, measured)[0])
    assert found.ratio == pytest.approx(1.5, rel=0.05) and found.spread == pytest.approx(0.1, rel=0.3)
    assert found.log_correlation is not None and found.log_correlation > 0.98
    negative = Agreement.of((-predicted).tolist(), measured.tolist())
    assert negative.rank == -found.rank and negative.ratio is None
    equal = Agreement.of([1.0, 1.0], [2.0, 3.0])
    assert equal.log_correlation is None and equal.ratio == pytest.approx(6**0.5)
    with pytest.raises(SensitivityError, match="1 predictions and 2 errors"):
        Agreement.of([1.0], [1.0, 2.0])


def test_what_was_measured_is_written_beside_the_plan(tmp_path):
    plan = allocate(sensitivity(), weight_bits=4, act_bits=8, objective="additive").plan
    checked = with_measured(plan, 0.03, agreement=Agreement.of([1.0, 2.0], [1.0, 3.0]))
    checked.save(tmp_path / "plan.json")
    metadata = Plan.load(tmp_path / "plan.json").metadata
    assert metadata["measured_error"] == 0.03 and metadata["prediction_agreement"]["rank"] == pytest.approx(1)
    assert metadata["measured_over_predicted"] == pytest.approx(0.03 / metadata["predicted_error"])
    assert "measured_over_predicted" not in with_measured(Plan({}), 0.03).metadata
