"""Published plans by name, and hostile YAML."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixdq_ao.errors import PlanError
from mixdq_ao.layers import find_layers, group_of, split_points
from mixdq_ao.plan import LayerPlan, Plan
from mixdq_ao.plan_check import check_plan
from tests.published import FOLDER, needs_published, sensitivity


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_weight_plan_alone_leaves_activations(tmp_path: Path) -> None:
    weight = write(tmp_path / "w.yaml", "model.a.b: 2\nc: 8\nmodel.d: 4\n")
    plan = Plan.from_mixdq_yaml(weight)
    assert plan.layers == {
        "a.b": LayerPlan(weight_bits=2, act_bits=16, symmetric=False),
        "c": LayerPlan(weight_bits=8, act_bits=16, symmetric=True),
        "d": LayerPlan(weight_bits=4, act_bits=16, symmetric=False),
    }
    assert plan.metadata["weight_file"] == "w.yaml" and plan.metadata["act_file"] is None
    assert plan.metadata["weight_counts"] == {"2": 1, "4": 1, "8": 1}


def test_missing_activation_and_protected_layers_stay_at_16_bits(tmp_path: Path) -> None:
    weight = write(tmp_path / "w.yaml", "model.a: 4\nmodel.b: 4\nmodel.c: 8\n")
    act = write(tmp_path / "a.yaml", "model.a: 8\nmodel.c: 4\n")
    plan = Plan.from_mixdq_yaml(weight, act, protect=["model.c"])
    bits = {n: (layer.weight_bits, layer.act_bits) for n, layer in plan.layers.items()}
    assert bits == {"a": (4, 8), "b": (4, 16), "c": (16, 16)}
    assert plan.metadata["protected"] == ["c"]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("[1, 2]", "is list"),
        ("just words", "is str"),
        ("model.a: 4\nmodel.a: 8", "'model.a' appears twice"),
        ("model.a: 4\na: 8", "'a' appears twice"),
        ("1: 4", "expected a layer name"),
        ("model.a: 3", "layer 'a': bits is 3, expected one of 2, 4, 8, 16"),
        ("model.a: true", "bits is True"),
        ("model.a: '4'", "bits is '4'"),
        ("model.a: 4.0", "bits is 4.0"),
        ("model.a: [4]", r"bits is \[4\]"),
        ("model.a: 0x" + "f" * 5000, "bits is a huge int"),
        ("model.a: 4: 5", "not valid YAML"),
        ("model.a: 2024-99-99", "not valid YAML"),
        ("model.a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("model.a: &x 4\nmodel.b: *x", "flat map"),
        ("model.a: " + "[" * 100_000, "not valid YAML"),
        ("- " * 100_000 + "1", "flat map"),
        ("? [1, 2]\n: 4", "not valid YAML"),
        ("---\na: 4\n---\nb: 4", "not valid YAML"),
        ("a: 4\n\x00", "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(PlanError, match=message) as error:
        Plan.from_mixdq_yaml(path)
    assert "bad.yaml" in str(error.value) and "\n" not in str(error.value)


def test_unreadable_unknown_and_mismatched_files(tmp_path: Path) -> None:
    weight = write(tmp_path / "w.yaml", "model.a: 4\n")
    with pytest.raises(PlanError, match="none.yaml: cannot be read"):
        Plan.from_mixdq_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"model.\xe9: 4\n")
    with pytest.raises(PlanError, match="latin.yaml: is not UTF-8"):
        Plan.from_mixdq_yaml(tmp_path / "latin.yaml")
    with pytest.raises(PlanError, match="'b' has no weight bits"):
        Plan.from_mixdq_yaml(weight, write(tmp_path / "a.yaml", "model.b: 8\n"))
    with pytest.raises(PlanError, match="layer 'a': bits is 2, expected one of 4, 8, 16"):
        Plan.from_mixdq_yaml(weight, write(tmp_path / "a2.yaml", "model.a: 2\n"))
    with pytest.raises(PlanError, match="protect: layer 'z'"):
        Plan.from_mixdq_yaml(weight, protect=["z"])


def test_split_points_of_sdxl(sdxl: torch.nn.Module) -> None:
    assert list(split_points(sdxl).values()) == [1280, 1280, 1280, 1280, 640, 640, 640, 320, 320]


@needs_published
@pytest.mark.parametrize("weight", ["4.00", "5.02", "8.00"])
@pytest.mark.parametrize("act", ["7.77", "8.00"])
def test_published_plans_cover_sdxl(sdxl: torch.nn.Module, weight: str, act: str) -> None:
    plan = Plan.from_mixdq_yaml(FOLDER / f"plan_weight_{weight}.yaml", FOLDER / f"plan_act_{act}.yaml")
    assert len(plan.layers) == 794 and set(plan.layers) == set(find_layers(sdxl))
    assert sum(layer.act_bits == 16 for layer in plan.layers.values()) == 9
    check_plan(plan, sdxl, need_ranges=False)
    summary = plan.summary(sdxl)
    assert summary.average_weight_bits == pytest.approx(float(weight), abs=0.02)


@needs_published
def test_published_sensitivity_is_of_sdxl(sdxl: torch.nn.Module) -> None:
    layers = find_layers(sdxl)
    for name, layer in sensitivity().layers.items():
        assert layer.weight_size == layers[name].weight.numel()
        assert layer.group == group_of(name)
