"""diffusion_step_policy, version 1: the published form goes through unchanged, everything else is refused by name."""

from __future__ import annotations

import copy
import json

import pytest

from mixdq_ao import LayerPlan, Plan, ScheduleError, TemporalPlan
from mixdq_ao.temporal.policy import StepPolicy, export_policy, import_policy, read_config

PUBLISHED = {
    "schema_version": 1,
    "type": "first_last_n",
    "index_space": "denoising_loop_iteration",
    "scope": ["transformer"],
    "default_mode": "native",
    "first_steps": {"count": 3, "mode": "a16"},
    "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16",
    "reasoner": "a16",
}
NATIVE = Plan({"a": LayerPlan(weight_bits=8, act_bits=8, act_range=(-1.0, 1.0)), "b": LayerPlan(weight_bits=4)})
COARSE = Plan({"a": LayerPlan(weight_bits=4, act_bits=8, act_range=(-1.0, 1.0))})
LEVELS = {"16": None, "w8a16": Plan({"a": LayerPlan(weight_bits=8), "b": LayerPlan(weight_bits=4)}), "n": NATIVE}


def plan(steps: str) -> TemporalPlan:
    names = {"x": "16", "y": "w8a16", "n": "n", "c": "c"}
    return TemporalPlan({**LEVELS, "c": COARSE}, tuple(names[s] for s in steps))


def test_the_published_policy_goes_through_unchanged():
    policy = StepPolicy.from_json(PUBLISHED)
    assert policy.to_json() == PUBLISHED and list(policy.to_json()) == list(PUBLISHED)
    assert "".join(m[0] for m in policy.modes(8)) == "aaannaaa"
    assert set(policy.modes(5)) == {"a16"} and policy.modes(1) == ("native",)


@pytest.mark.parametrize("field", PUBLISHED)
def test_every_field_is_required(field):
    with pytest.raises(ScheduleError, match=f"field {field} is missing"):
        StepPolicy.from_json({k: v for k, v in PUBLISHED.items() if k != field})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"more": 1}, "unknown field more"),
        ({"schema_version": 2}, "schema_version is 2, expected 1"),
        ({"schema_version": True}, "schema_version is True"),
        ({"schema_version": 1.0}, "schema_version is 1.0"),
        ({"type": "list"}, "type is 'list', expected 'first_last_n'"),
        ({"index_space": "timestep"}, "index_space is 'timestep'"),
        ({"default_mode": "a16"}, "default_mode is 'a16'"),
        ({"overlap": "native"}, "overlap is 'native'"),
        ({"reasoner": "fp8"}, "reasoner is 'fp8'"),
        ({"reasoner": ["a16"]}, "reasoner is"),
        ({"scope": "transformer"}, "scope is 'transformer'"),
        ({"scope": []}, "scope is"),
        ({"scope": [1]}, "scope is"),
        ({"first_steps": 3}, "first_steps is 3, expected an object"),
        ({"first_steps": {"count": 3}}, "first_steps.mode is missing"),
        ({"first_steps": {"count": 3, "mode": "a16", "x": 1}}, "unknown field first_steps.x"),
        ({"last_steps": {"count": -1, "mode": "a16"}}, "last_steps.count is -1"),
        ({"last_steps": {"count": True, "mode": "a16"}}, "last_steps.count is True"),
        ({"last_steps": {"count": 1, "mode": "a8"}}, "last_steps.mode is 'a8'"),
    ],
)
def test_what_the_form_does_not_know_is_refused(change, words):
    with pytest.raises(ScheduleError, match=words):
        StepPolicy.from_json({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("steps", "counts"),
    [("xxnnnx", (2, 1)), ("nnnn", (0, 0)), ("nnnx", (0, 1)), ("yynn", (2, 0)), ("xnxx", (1, 2))],
)
def test_a_schedule_the_form_can_say(steps, counts):
    policy = export_policy(plan(steps))
    assert (policy.first, policy.last) == counts
    again = import_policy(StepPolicy.from_json(policy.to_json()), len(steps), NATIVE)
    assert [s == "native" for s in again.steps] == [s == "n" for s in steps]
    assert all(layer.act_bits == 16 for layer in again.levels["a16"].layers.values())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("nxnn", "step 1 is '16' .a16., which the policy cannot say: only the first and last"),
        ("xnnxnx", "step 3"),
        ("xncx", "uses 16, n, c; the policy knows two levels"),
        ("xnyn", "uses 16, w8a16, n"),
        ("nncc", "uses n, c"),
        ("yycc", "'w8a16' has other weights than 'c'"),
        ("xxxx", "none with quantized activations"),
    ],
)
def test_export_refuses_what_the_form_cannot_say(steps, words):
    with pytest.raises(ScheduleError, match=words):
        export_policy(plan(steps))


def test_into_a_config_and_back(tmp_path):
    config = {"_class_name": "T", "quantization_config": {"quant_algo": "INT8", "runtime": {"other": 1}}}
    before = copy.deepcopy(config)
    written = StepPolicy(first=1, last=2).into_config(config)
    assert config == before and written["quantization_config"]["runtime"]["other"] == 1
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert StepPolicy.from_config(tmp_path / "config.json") == StepPolicy(first=1, last=2)
    assert StepPolicy.from_config({"quantization_config": {"quant_algo": "INT8"}}) is None
    with pytest.raises(ScheduleError, match="no quantization_config"):
        StepPolicy(first=1, last=2).into_config({})
    with pytest.raises(ScheduleError, match="config: quantization_config.runtime is 3"):
        StepPolicy.from_config({"quantization_config": {"runtime": 3}})
    for text, words in (
        ("{", "not valid JSON"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ("[]", "is a list, expected an object"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ScheduleError, match=f"bad.json: .*{words}"):
            read_config(tmp_path / "bad.json")
    with pytest.raises(ScheduleError, match="none.json: cannot be read"):
        read_config(tmp_path / "none.json")
