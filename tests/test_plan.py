"""Plan files: round trip, and one clear error for everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdq_ao import LayerPlan, Plan, PlanError

EXAMPLE = Plan(
    {
        "a": LayerPlan(weight_bits=8, act_bits=8, act_range=(-1.0, 2.5)),
        "b.c": LayerPlan(weight_bits=4, act_bits=8, act_range=(0.0, 1.0), split=3, split_act_range=(-3.0, 3.0)),
        "d": LayerPlan(weight_bits=2, symmetric=True, bos=True),
        "e": LayerPlan(),
    },
    {"source": "test"},
    (1.0, -2.0),
)


def document() -> dict:
    return json.loads(json.dumps(EXAMPLE.to_json()))


def load(tmp_path: Path, content: object) -> Plan:
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return Plan.load(path)


def test_round_trip(tmp_path):
    EXAMPLE.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == EXAMPLE


def test_symmetry_defaults():
    assert LayerPlan(weight_bits=8).symmetric is True
    assert LayerPlan(weight_bits=4).symmetric is False
    assert LayerPlan(weight_bits=2).symmetric is False


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format is 'other'"),
        ({"version": 2}, "version is 2"),
        ({"version": True}, "version is True"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"metadata": []}, "metadata is list"),
        ({"layers": []}, "layers is list"),
        ({"layers": {"a": 3}}, "layer 'a': is int"),
        ({"layers": {"a": {"bits": 3}}}, "layer 'a': unknown field 'bits'"),
        ({"layers": {"a": {"weight_bits": 3}}}, "layer 'a': weight_bits is 3, expected one of 2, 4, 8, 16"),
        ({"layers": {"a": {"weight_bits": 8.0}}}, "weight_bits is 8.0"),
        ({"layers": {"a": {"act_bits": 2}}}, "act_bits is 2"),
        ({"layers": {"a": {"weight_bits": 8, "symmetric": False}}}, "symmetric is False"),
        ({"layers": {"a": {"act_range": [1, 0]}}}, r"act_range is \[1, 0\], expected lo <= hi"),
        ({"layers": {"a": {"act_range": [1]}}}, "expected .lo, hi."),
        ({"layers": {"a": {"act_range": "x"}}}, "act_range is 'x'"),
        ({"layers": {"a": {"act_range": [True, 2]}}}, "act_range"),
        ({"layers": {"a": {"split": 0}}}, "split is 0"),
        ({"layers": {"a": {"split_act_range": [0, 1]}}}, "split_act_range"),
        ({"layers": {"a": {"bos": 1}}}, "bos is 1"),
        ({"layers": {"a": {"bos": True}}, "bos_embedding": None}, "has no bos_embedding"),
        ({"bos_embedding": []}, "bos_embedding"),
        ({"bos_embedding": [1, "x"]}, "bos_embedding"),
    ],
)
def test_every_mistake_is_named(tmp_path, change, says):
    with pytest.raises(PlanError, match=says) as error:
        load(tmp_path, document() | change)
    assert "plan.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON"),
        ("[]", "is a list, expected an object"),
        ('{"format": "mixdq-plan", "version": 1, "layers": {"a": {"act_range": [NaN, 1]}}}', "NaN"),
        ('{"format": "mixdq-plan", "format": "mixdq-plan"}', "twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_hostile_text(tmp_path, text, says):
    with pytest.raises(PlanError, match=says):
        load(tmp_path, text)


@pytest.mark.parametrize("number", ["1e999", "1e308", "1" + "0" * 400])
def test_huge_numbers_are_not_ranges(tmp_path, number):
    """Also those that are numbers but whose spans are none of float32."""
    changed = document() | {"layers": {"a": {"act_range": [0, 0]}}}
    with pytest.raises(PlanError, match="expected numbers from -1e|is beyond float64"):
        load(tmp_path, json.dumps(changed).replace("[0, 0]", f"[0, {number}]"))
    with pytest.raises(PlanError, match="bos_embedding|is beyond float64"):
        load(tmp_path, json.dumps(changed | {"bos_embedding": [7]}).replace("[7]", f"[{number}]"))


def test_no_file(tmp_path):
    with pytest.raises(PlanError, match="none.json"):
        Plan.load(tmp_path / "none.json")


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_is_refused(tmp_path_factory, cut):
    text = json.dumps(EXAMPLE.to_json())
    cut %= len(text)
    with pytest.raises(PlanError):
        load(tmp_path_factory.mktemp("plan"), text[:cut])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(key=st.sampled_from(["format", "version", "metadata", "bos_embedding", "layers"]), value=JSON)
def test_any_field_replaced_is_a_plan_or_a_plan_error(tmp_path_factory, key, value):
    try:
        plan = load(tmp_path_factory.mktemp("plan"), document() | {key: value})
    except PlanError:
        return
    assert isinstance(plan, Plan)


@settings(max_examples=100, deadline=None)
@given(
    field=st.sampled_from(["weight_bits", "act_bits", "symmetric", "act_range", "split", "split_act_range", "bos"]),
    value=JSON,
)
def test_any_layer_field_replaced_is_a_plan_or_a_plan_error(tmp_path_factory, field, value):
    changed = document()
    changed["layers"]["b.c"][field] = value
    try:
        load(tmp_path_factory.mktemp("plan"), changed)
    except PlanError as e:
        assert "b.c" in str(e)


def test_saving_is_atomic(tmp_path, monkeypatch):
    EXAMPLE.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_text()

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(PlanError, match="plan.json: cannot be written: No space"):
        EXAMPLE.with_layers({"a": LayerPlan()}).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (({}, None), "metadata is None, expected a mapping"),
        (([],), r"layers is \[\], expected a mapping"),
        (({}, {}, "abc"), "bos_embedding is not a non-empty list"),
        (({}, {}, (1e39,)), "bos_embedding is not a non-empty list"),
        (({}, {}, ()), "bos_embedding is not a non-empty list"),
    ],
)
def test_what_no_file_could_give_back_is_refused(fields, says):
    with pytest.raises(PlanError, match=says):
        Plan(*fields)


def test_notes_nested_deeply_are_named(tmp_path):
    notes: list = []
    for _ in range(2000):
        notes = [notes]
    with pytest.raises(PlanError, match="nested too deeply"):
        Plan({}, {"notes": notes}).save(tmp_path / "plan.json")


@pytest.mark.parametrize("depth", [100, 400, 600, 800, 900])
def test_nested_notes_that_load_are_saved_or_named(tmp_path, depth):
    nested = '"metadata": {"a": ' + "[" * depth + "]" * depth + "}"
    text = json.dumps(Plan({}).to_json()).replace('"metadata": {}', nested)
    try:
        load(tmp_path, text).save(tmp_path / "again.json")
    except PlanError as e:
        assert depth > 100 and "nested too deeply" in str(e)


@pytest.mark.parametrize(("path", "says"), [("", "it is a folder"), ("a\0b", "NUL"), ("a\0b/c", "NUL")])
def test_names_that_no_file_can_have(tmp_path, monkeypatch, path, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlanError, match=f"cannot be written: .*{says}"):
        EXAMPLE.save(path)
    assert not any(tmp_path.iterdir())
