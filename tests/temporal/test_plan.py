"""Temporal plans: what they accept, what a file must hold, and stretching to another number of steps."""

from __future__ import annotations

import json

import pytest

from mixdq_ao import LayerPlan, Plan, PlanError, ScheduleError, TemporalPlan

W8 = Plan({"conv_in": LayerPlan(weight_bits=8, act_bits=8, act_range=(-1.0, 2.0))})
LEVELS = {"16": None, "W8A8": W8, "W4A8": Plan({"conv_in": LayerPlan(weight_bits=4)})}
COSTS = {"16": 1.0, "W8A8": 0.5, "W4A8": 0.25}


def plan(steps: str = "abbc", costs=COSTS) -> TemporalPlan:
    names = dict(zip("abc", LEVELS, strict=True))
    return TemporalPlan(LEVELS, tuple(names[s] for s in steps), costs, {"error": 0.1})


@pytest.mark.parametrize("costs", [COSTS, None])
def test_a_file_gives_the_same_plan(tmp_path, costs):
    plan(costs=costs).save(tmp_path / "p.json")
    assert TemporalPlan.load(tmp_path / "p.json") == plan(costs=costs)


def test_cost_and_counts():
    assert plan().cost == pytest.approx((1 + 0.5 + 0.5 + 0.25) / 4)
    assert plan("aacc").counts == {"16": 2, "W8A8": 0, "W4A8": 2}
    assert plan(costs=None).cost is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.update(version=2), "this release reads version 1"),
        (lambda d: d.update(levels={}), "levels is no list"),
        (lambda d: d.update(levels=[]), "levels is empty"),
        (lambda d: d.update(steps=[]), "steps is"),
        (lambda d: d.update(steps=["16", 3]), "steps is"),
        (lambda d: d.update(steps=["16", "W9"]), "step 1: level is 'W9', expected one of 16, W8A8, W4A8"),
        (lambda d: d.update(metadata=None), "metadata is NoneType"),
        (lambda d: d["levels"][1].update(name="16"), "levels name '16' twice"),
        (lambda d: d["levels"][1].update(cost=None), "level 'W8A8': cost is null"),
        (lambda d: d["levels"][1].update(cost="1"), "level 'W8A8': cost is '1'"),
        (lambda d: d["levels"][1].update(cost=1.5), "levels go from precise to cheap"),
        (lambda d: d["levels"][1].update(bits=8), "level 1: has keys"),
        (lambda d: d["levels"][1].pop("plan"), "level 1: has keys"),
        (lambda d: d["levels"][1].update(plan={"layers": {}}), "level 'W8A8': plan is no mixdq-plan"),
        (lambda d: d["levels"][1]["plan"]["layers"]["conv_in"].update(weight_bits=3), "weight_bits is 3"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(tmp_path, change, words):
    document = plan().to_json()
    change(document)
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(ScheduleError, match="p.json") as e:
        TemporalPlan.load(tmp_path / "p.json")
    assert words in str(e.value)


def test_another_number_of_steps_or_another_model_is_refused(unet):
    plan().validate(4)
    with pytest.raises(ScheduleError, match="for 4 steps, the scheduler runs 8.*resampled"):
        plan().validate(8)
    plan().validate(4, unet)
    foreign = TemporalPlan({"a": Plan({"nope": LayerPlan(weight_bits=8)})}, ("a",))
    with pytest.raises(PlanError, match="level 'a': layer 'nope'"):
        foreign.validate(1, unet)


@pytest.mark.parametrize(
    ("steps", "count", "expected"),
    [("abbc", 8, "aabbbbcc"), ("aabbbbcc", 4, "abbc"), ("abcabcab", 3, "abb"), ("abbc", 1, "c"), ("ab", 5, "aabbb")],
)
def test_resampling_keeps_shares_and_both_ends(steps, count, expected):
    with pytest.warns(UserWarning, match=f"found for {len(steps)} steps and is resampled to {count}"):
        new = plan(steps).resampled(count)
    assert new.steps == plan(expected).steps
    assert new.metadata["resampled_from"] == list(plan(steps).steps)


def test_resampling_to_the_same_number_changes_nothing():
    assert plan().resampled(4) == plan()
    with pytest.raises(ScheduleError, match="steps is 0"):
        plan().resampled(0)
