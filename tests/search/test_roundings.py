"""Roundings chosen by the error of the output: measured for every layer and bit width, kept, planned, stored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mixdq_ao import LayerPlan, Plan, Sensitivity, SensitivityError, allocate, analyze, calibrate, mixdq_config
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.search.moments import Moments, input_moments
from mixdq_ao.search.probe_delta import LayerDeltas
from mixdq_ao.search.roundings import PLAIN, ROUNDINGS, best_of, rounded_as
from mixdq_ao.search.sensitivity import LayerSensitivity
from mixdq_ao.search.trial import Trials

PROMPTS = ["one", "two", "three", "four"]
WAYS = (PLAIN, "mse nearest", "output compensated")


class Chain(nn.Module):
    """Two linear layers of correlated inputs, and one convolution in groups, in a row: first order is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.groups = nn.Conv2d(4, 4, 1, groups=2)
        self.mix = torch.randn(3, 16)

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        y = self.second(self.first(sample @ self.mix))
        return (self.groups(y.unflatten(-1, (4, 4)).movedim(1, 2)).movedim(1, 2).flatten(2),)


class Pipe:
    """A pipeline of one call."""

    def __init__(self) -> None:
        self.unet = Chain()

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **kwargs: Any) -> SimpleNamespace:
        x = torch.stack([torch.randn(5, 3, generator=g) for g in generator])
        y = self.unet(x)[0]
        return SimpleNamespace(images=y[:, None].expand(-1, 3, -1, -1).sigmoid())


@pytest.fixture(scope="module")
def chain() -> SimpleNamespace:
    pipe = Pipe()
    calibration = calibrate(pipe, PROMPTS)
    options: dict[str, Any] = {"calibration": calibration, "weight_bits": (2, 4), "act_bits": (8,)}
    options["rule"] = lambda name: "quality"
    return SimpleNamespace(pipe=pipe, moments=input_moments(pipe, PROMPTS, calibration=calibration), options=options)


def analyzed(chain: SimpleNamespace, method: str, roundings: tuple[str, ...] = WAYS, **more: Any) -> Sensitivity:
    options = {"moments": chain.moments, "roundings": roundings, **chain.options, **more}
    options |= {"probes": 64} if method == "probe" and "probes" not in more else {}
    return analyze(chain.pipe, PROMPTS, method=method, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["probe", "one_at_a_time"])
def test_the_best_of_each_layer_and_bit_width_is_kept(chain, method):
    each = {r: analyzed(chain, method, (r,) if r != WAYS[2] else (PLAIN, r)) for r in WAYS}
    best = analyzed(chain, method)
    for name, layer in best.layers.items():
        for bits in (2, 4):
            errors = {r: s.layers[name].weight_errors[bits] for r, s in each.items()}
            assert layer.weight_errors[bits] == min(errors.values())
            assert errors[layer.rounding(bits)] == min(errors.values())
        assert layer.act_errors == each[PLAIN].layers[name].act_errors
    assert best.layers["first"].rounding(2) == "output compensated"
    assert best.layers["first"].weight_errors[2] < 0.5 * each[PLAIN].layers["first"].weight_errors[2]
    assert "output compensated" not in best.layers["groups"].weight_roundings.values()


def test_probes_estimate_what_one_layer_at_a_time_measures(chain):
    estimated, measured = (analyzed(chain, m) for m in ("probe", "one_at_a_time"))
    for name, layer in measured.layers.items():
        for bits in (2, 4):
            assert estimated.layers[name].rounding(bits) == layer.rounding(bits)
            assert estimated.layers[name].weight_errors[bits] == pytest.approx(layer.weight_errors[bits], rel=0.35)


def test_figures_of_all_roundings_are_kept(chain):
    result = analyzed(chain, "probe")
    for name, layer in result.layers.items():
        every = result.metadata["rounding_errors"][name]["weight"]
        ways = WAYS if name != "groups" else WAYS[:2]
        assert set(every) == {f"{bits} {r}" for bits in (2, 4) for r in ways}
        for bits in (2, 4):
            assert every[f"{bits} {layer.rounding(bits)}"] == layer.weight_errors[bits]
            assert set(result.metadata["standard_errors"][name]["weight"]) == {"2", "4"}
    assert "weight|2 output compensated|output" in result.metadata["settled"]
    plain = analyzed(chain, "probe", (PLAIN,))
    assert "rounding_errors" not in plain.metadata and "weight|2|output" in plain.metadata["settled"]


@pytest.mark.parametrize("method", ["probe", "one_at_a_time"])
def test_a_store_knows_its_roundings_and_moments(chain, method, tmp_path):
    whole = analyzed(chain, method, store=tmp_path / "store")
    assert analyzed(chain, method, store=tmp_path / "store").to_json() == whole.to_json()
    for other in ({"roundings": (PLAIN,)}, {"moments": Moments({n: 2 * m for n, m in chain.moments.items()})}):
        with pytest.raises(SensitivityError, match="other settings"):
            analyze(
                chain.pipe,
                PROMPTS,
                method=method,
                store=tmp_path / "store",
                **{"roundings": WAYS, "moments": chain.moments, **chain.options, **other},
            )


def test_deltas_are_those_of_the_plan(chain):
    """What a probe multiplies with is what the planned layer really changes."""
    module, calibration = chain.pipe.unet.first, chain.options["calibration"]
    choices = [Evaluation("first", "weight", bits, r) for bits in (2, 4) for r in ROUNDINGS]
    x = torch.randn(2, 5, 16)
    stack = LayerDeltas(module, choices, calibration, None, chain.moments["first"]).stack(x, 2)
    for choice, delta in zip(choices, stack.unbind(1), strict=True):
        with Trials(chain.pipe, PROMPTS[:1], _sampling())._changed(
            "first", choice.layer(calibration), None, chain.moments["first"]
        ):
            changed = module(x).detach()
        torch.testing.assert_close(delta, (changed - module(x)).flatten(1), rtol=1e-3, atol=1e-4)


def _sampling() -> Any:
    from mixdq_ao import Sampling

    return Sampling()


def test_allocate_plans_what_was_measured(chain):
    sensitivity = analyzed(chain, "probe")
    result = allocate(sensitivity, weight_bits=3, weight_choices=(2, 4), objective="additive", protect=["groups"])
    for name in ("first", "second"):
        layer = result.plan.layers[name]
        assert f"{layer.weight_range} {layer.rounding}" == sensitivity.layers[name].rounding(layer.weight_bits)
    assert any(layer.needs_moment for layer in result.plan.layers.values())
    assert result.plan.layers["groups"] == LayerPlan()
    plan = result.plan.with_calibration(chain.options["calibration"])
    assert [v.rounding for v in plan.layers.values()] == [v.rounding for v in result.plan.layers.values()]
    mixdq_config(plan, moments=chain.moments)
    eight = LayerSensitivity(group="quality", weight_size=4, act_size=4, weight_roundings={8: WAYS[2]})
    kept = allocate(Sensitivity({"a": eight}), weight_bits=16, act_bits=16).plan.layers["a"]
    assert kept == LayerPlan()


def test_layers_without_moments_go_without(chain):
    moments = {"first": chain.moments["first"]}
    result = analyze(chain.pipe, PROMPTS, method="probe", probes=4, roundings=WAYS, moments=moments, **chain.options)
    assert result.layers["second"].rounding(2) in WAYS[:2]
    assert set(result.metadata["rounding_errors"]["first"]["weight"]) == {f"{b} {r}" for b in (2, 4) for r in WAYS}
    for method, more in (("probe", {"probes": 1}), ("one_at_a_time", {})):
        alone = analyzed(chain, method, ("output compensated",), **more)
        assert alone.layers["groups"].weight_roundings == {}
        assert alone.layers["first"].weight_roundings == dict.fromkeys((2, 4), "output compensated")
        with pytest.raises(SensitivityError, match="'output compensated' need second moments; pass moments="):
            analyzed(chain, method, moments=None)


@pytest.mark.parametrize("bad", [(), "minmax nearest", ("nearest",), ("output compensated", 3)])
def test_roundings_that_do_not_exist(chain, bad):
    with pytest.raises(SensitivityError, match="roundings is .*expected one or more of 'minmax nearest'"):
        analyzed(chain, "probe", bad)


def test_names_and_plans():
    assert len(ROUNDINGS) == 6 and ROUNDINGS[0] == PLAIN
    assert rounded_as(LayerPlan(weight_bits=4), PLAIN) == LayerPlan(weight_bits=4)
    assert rounded_as(LayerPlan(weight_bits=4), "mse compensated").weight_range == "mse"
    assert best_of({(2, "a"): 3.0, (2, "b"): 1.0, (4, "a"): 1.0, (4, "b"): 1.0}) == {2: "b", 4: "a"}


def test_files_old_and_new(tmp_path):
    fields: dict[str, Any] = {"group": "quality", "weight_size": 4, "act_size": 4, "weight_errors": {2: 0.1, 4: 0.01}}
    plain, better = LayerSensitivity(**fields), LayerSensitivity(**fields, weight_roundings={2: "output compensated"})
    result = Sensitivity({"a": plain, "b": better})
    result.save(tmp_path / "s.json")
    assert Sensitivity.load(tmp_path / "s.json") == result
    document = json.loads((tmp_path / "s.json").read_text())
    assert "weight_roundings" not in document["layers"]["a"]
    assert document["layers"]["b"]["weight_roundings"] == {"2": "output compensated"}
    for table, says in (
        ({"2": "best"}, "weight_roundings at 2 bits is 'best', expected one of 'minmax nearest'"),
        ({"2": 3}, "weight_roundings at 2 bits is 3"),
        ({"3": PLAIN}, "weight_roundings: bits '3'"),
        (["x"], "weight_roundings is list"),
    ):
        document["layers"]["b"]["weight_roundings"] = table
        (tmp_path / "s.json").write_text(json.dumps(document))
        with pytest.raises(SensitivityError, match=f"layer 'b': {says}"):
            Sensitivity.load(tmp_path / "s.json")


def test_plans_old_and_new(tmp_path):
    old, new = LayerPlan(weight_bits=4), rounded_as(LayerPlan(weight_bits=4), "output compensated")
    assert old.to_json() == {"weight_bits": 4, "act_bits": 16}
    assert new.to_json() == old.to_json() | {"weight_range": "output", "rounding": "compensated"}
    plan = Plan({"a": old, "b": new, "c": LayerPlan()})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
