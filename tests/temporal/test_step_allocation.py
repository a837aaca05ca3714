"""Bits per layer and step: the best of all, budgets over the run, levels that the runtime can run."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from mixdq_ao import (
    AllocationError,
    LayerPlan,
    LayerSensitivity,
    Sensitivity,
    TemporalPlan,
    allocate_steps,
    orthogonality,
    prepare,
)
from mixdq_ao.search.orthogonality_allocate import worth

from ..conftest import unet_inputs
from ..search.test_orthogonality_allocate import measured


def layers_at(plan: TemporalPlan, step: int) -> Mapping[str, LayerPlan]:
    level = plan.levels[plan.steps[step]]
    assert level is not None
    return level.layers


@pytest.mark.parametrize("form", ["integer", "error"])
def test_the_best_of_all_plans(form):
    given = measured(layers=4, sampled=(0, 2), steps=3)
    found = allocate_steps(given, weight_bits=4, form=form, beta=0.5, decay=2.0, storage="own")
    names, sizes = list(given.layers), np.array([v.weight_size for v in given.layers.values()])
    counts = np.array([2, 1])  # step 1 is as near to 0 as to 2: the earlier one
    weights = np.exp(2.0 * np.array([0, 0.5, 1]))
    theta = given.step_importance(0.5) * (np.array([weights[0] + weights[1], weights[2]]) / weights.sum())[:, None]

    def score(bits: np.ndarray) -> float:
        return float((theta * np.vectorize(lambda b: worth(form, b))(bits)).sum())

    every = (np.array(b).reshape(2, 4) for b in itertools.product((2, 4, 8), repeat=8))
    best = min(score(b) for b in every if (b @ sizes) @ counts <= 4 * 3 * sizes.sum())
    bits = np.array([[layers_at(found, t)[n].weight_bits for n in names] for t in (0, 2)])
    assert found.steps[0] == found.steps[1] and score(bits) == pytest.approx(best, rel=1e-9)
    assert found.metadata["average_weight_bits"] == pytest.approx((bits @ sizes) @ counts / 3 / sizes.sum())
    assert found.metadata["average_weight_bits"] <= 4


def test_weights_per_layer_and_activations_per_step():
    given = measured(layers=8, sampled=(0, 1, 2), steps=3)
    found = allocate_steps(given, weight_bits=4, act_bits=6, weights="per layer", storage="own", decay=3.0)
    plans = [layers_at(found, t) for t in range(3)]
    assert len({tuple(v.weight_bits for v in p.values()) for p in plans}) == 1
    acts = [np.mean([v.act_bits for v in p.values()]) for p in plans]
    assert acts[0] < acts[-1] and found.metadata["average_act_bits"] <= 6
    assert found.costs is None  # the levels' weights cost the same


def test_measured_errors_instead_of_importances():
    def errors(scale: float) -> Sensitivity:
        weight, act = {b: scale * 4.0**-b for b in (4, 8)}, {4: scale, 8: scale / 9}
        sizes: dict[str, Any] = {"group": "quality", "weight_size": 9, "act_size": 9}
        return Sensitivity({n: LayerSensitivity(**sizes, weight_errors=weight, act_errors=act) for n in "ab"})

    found = allocate_steps({0: errors(1.0), 1: errors(9.0)}, steps=2, weight_bits=6, act_bits=6)
    assert [{v.weight_bits for v in layers_at(found, t).values()} for t in (0, 1)] == [{4}, {8}]
    assert [{v.act_bits for v in layers_at(found, t).values()} for t in (0, 1)] == [{4}, {8}]
    assert found.costs == {"1": 0.5, "0": 0.25} and found.cost == 0.375


def test_the_runtime_runs_it(unet, calibration, tmp_path):
    inputs = [unet_inputs(4) | {"timestep": torch.tensor(t)} for t in (900, 500, 100)]
    with torch.no_grad():
        full = [unet(**x)[0] for x in inputs]
        given = orthogonality(unet, run=lambda: [unet(**x) for x in inputs], calibration=calibration)
        assert given.steps == 3 and given.layers["conv_in"].weight_bytes[8] > given.layers["conv_in"].weight_bytes[4]
        plan = allocate_steps(given, weight_bits=6, act_bits=7, decay=4.0).with_calibration(calibration)
        plan.save(tmp_path / "t.json")
        assert TemporalPlan.load(tmp_path / "t.json").steps == plan.steps
        assert len(set(plan.steps)) == 3
        runtime = prepare(unet, plan)
        for step, (x, reference) in enumerate(zip(inputs, full, strict=True)):
            runtime.level = plan.steps[step]
            error = (unet(**x)[0] - reference).square().sum() / reference.square().sum()
            assert 0 < error < 0.5


@pytest.mark.parametrize(
    ("act", "bits"),
    [
        ({"act_bits": 16}, {16}),
        ({"act_bits": 12}, {8}),
        ({"act_bits": 12, "act_choices": (8, 16)}, {8, 16}),
        ({"act_bits": 8, "act_choices": (4,)}, {4}),
        ({}, {8}),
    ],
)
def test_activations_are_what_allocate_makes_of_them(act, bits):
    found = allocate_steps(measured(), weight_bits=6, **act)
    assert {v.act_bits for t in (0, 1) for v in layers_at(found, t).values()} == bits
    assert found.metadata["average_act_bits"] <= act.get("act_bits", 8)


def test_a_kept_weight_keeps_its_activation():
    given = measured(sampled=(0, 2), steps=3)
    act = {n: v.act_size for n, v in given.layers.items()}
    found = allocate_steps(given, weight_bits=10, weight_choices=(4, 8, 16), act_bits=6, decay=2.0, storage="own")
    steps = [layers_at(found, t) for t in range(3)]
    pairs = {(v.weight_bits, v.act_bits) for plan in steps for v in plan.values()}
    assert {a for w, a in pairs if w == 16} == {16} and {a for w, a in pairs if w < 16} == {4, 8}
    counted = [(act[n], v.act_bits) for plan in steps for n, v in plan.items() if v.weight_bits < 16]
    average = sum(s * b for s, b in counted) / sum(s for s, _ in counted)
    assert found.metadata["average_act_bits"] == pytest.approx(average) and average <= 6
    kept = allocate_steps(given, weight_bits=16, weight_choices=(16,), act_bits=6)
    assert set(layers_at(kept, 0).values()) == {LayerPlan()} and kept.metadata["average_act_bits"] == 16


@pytest.mark.parametrize("options", [{"weight_bits": 10, "weight_choices": (4, 8, 16)}, {"act_bits": 16}])
def test_the_runtime_runs_what_is_kept(unet, calibration, options):
    inputs = [unet_inputs(4) | {"timestep": torch.tensor(t)} for t in (900, 100)]
    with torch.no_grad():
        given = orthogonality(unet, run=lambda: [unet(**x) for x in inputs], calibration=calibration)
        plan = allocate_steps(given, **{"weight_bits": 6, **options}, decay=4.0, storage="own")
        full = [unet(**x)[0] for x in inputs]
        runtime = prepare(unet, plan.with_calibration(calibration), storage="own", keep_full=True)
        for step, (x, reference) in enumerate(zip(inputs, full, strict=True)):
            runtime.level = plan.steps[step]
            assert 0 < (unet(**x)[0] - reference).square().sum() / reference.square().sum() < 0.5


def test_protected_layers_and_equal_steps():
    given = measured(layers=3, sampled=(0, 3), steps=4)
    found = allocate_steps(given, weight_bits=8, protect=["l1"])
    assert set(found.steps) == {"0-3"} and found.costs == {"0-3": 0.5}
    assert layers_at(found, 0)["l1"].weight_bits == 16 and layers_at(found, 0)["l0"].weight_bits == 8


def test_bad_input():
    given = measured()
    bare = Sensitivity({"a": LayerSensitivity(group="quality", weight_size=1, act_size=1)})
    other = Sensitivity({"b": LayerSensitivity(group="quality", weight_size=1, act_size=1)})
    for subject, options, says in [
        (given, {"weight_bits": 3}, "weight_bits: no plan within"),
        (given, {"weight_bits": 4, "weight_choices": (2, 4)}, "nested storage runs those layers at 4 bits"),
        (given, {"weight_bits": 4, "weights": "x"}, "weights is 'x'"),
        (given, {"weight_bits": 4, "storage": "x"}, "storage is 'x'"),
        (given, {"weight_bits": 4, "steps": 5}, "measured over 2"),
        (given, {"weight_bits": 4, "protect": list(given.layers)}, "nothing is left"),
        (given, {"weight_bits": 0}, "weight_bits is 0"),
        (given, {"weight_bits": None}, "weight_bits is None"),
        (given, {"weight_bits": 4, "act_bits": {"content": 8, "quality": 8}}, "act_bits is {'content': 8"),
        (given, {"weight_bits": 4, "time_limit": 0}, "time_limit is 0"),
        (given, {"weight_bits": 4, "act_choices": (3,), "act_bits": 4}, "act_choices is"),
        ({}, {"weight_bits": 4}, "sensitivities of one or more"),
        ({0: bare}, {"weight_bits": 4, "steps": 1}, "layer 'a': no weight_errors at 4 bits at step 0"),
        ({0: bare, 1: other}, {"weight_bits": 4, "steps": 2}, "layer 'a' is in the sensitivity of step 0 or 1"),
    ]:
        with pytest.raises(AllocationError, match=says):
            allocate_steps(subject, **options)
