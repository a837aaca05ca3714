"""Folds: the float model computes the same function, plans are checked, and nothing is folded twice."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import quantize_ as torchao_quantize_

from mixdq_ao import (
    Calibration,
    CalibrationError,
    LayerPlan,
    Plan,
    PlanError,
    QuantizationError,
    RayWorkers,
    analyze,
    calibrate,
    input_moments,
    mixdq_config,
    quantize_,
)
from mixdq_ao.models.pipelines import denoiser
from mixdq_ao.quantize.config import MixDQLayerConfig, folded_as_planned
from mixdq_ao.quantize.folds import (
    Fold,
    Folding,
    as_smoothing,
    exponents,
    find_folds,
    fold_,
    folded,
    folded_columns,
    folded_moments,
    folded_rows,
    foldings_of,
    planned_folds,
)
from mixdq_ao.quantize.hadamard import hadamard, rotated
from mixdq_ao.quantize.tensor import MixDQTensor
from mixdq_ao.search.analyze import folding_workers
from tests.quantize import folding
from tests.quantize.folding import BLOCK, PROMPTS, call, toy
from tests.search.zoo import ZOO

calibration, plan = folding.calibration, folding.plan


def some_folding(fold: Fold, width: int) -> Folding:
    powers = torch.randint(-4, 5, (width,), generator=torch.Generator().manual_seed(width)).tolist()
    return Folding(as_smoothing(powers), fold.head if fold.head and hadamard(fold.head) is not None else None)


def all_folds(model: nn.Module) -> dict[Fold, Folding]:
    widths = {f: model.get_submodule(f.readers[0]).in_features for f in find_folds(model)}
    return {fold: some_folding(fold, int(width)) for fold, width in widths.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 64, 80, 128, 160])
def test_hadamard_matrices(order: int):
    matrix = hadamard(order)
    assert matrix is not None and set(matrix.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_orders_without_a_known_matrix():
    assert all(hadamard(order) is None for order in (3, 6, 10, 18, 92))
    with pytest.raises(ValueError, match="order 6"):
        rotated(torch.ones(2, 12), 6)


def test_every_place_of_a_block_is_found():
    folds = find_folds(ZOO["SD 1.5"].build())
    mine = {f.source.removeprefix(BLOCK + "."): f for f in folds if f.source.startswith(BLOCK)}
    assert set(mine) == {"norm1", "norm2", "norm3", "attn1.to_v", "attn2.to_v", "ff.net.0.proj"}
    assert mine["norm1"].readers == tuple(f"{BLOCK}.attn1.to_{x}" for x in "qkv")
    assert mine["ff.net.0.proj"].rows == 4 * 16
    assert {n: f.head for n, f in mine.items() if f.head} == {"attn1.to_v": 4, "attn2.to_v": 4}
    assert not any("add_v_proj" in f.source or f.source.endswith("attn.to_v") for f in find_folds(ZOO["SD3"].build()))


def test_places_that_other_values_or_readers_join_are_left_out():
    model: Any = ZOO["SD 1.5"].build()
    block = model.get_submodule(BLOCK)
    block.attn1.processor.to_v_ip = nn.ModuleList()  # as IP-Adapter's
    block.attn2.fuse_projections()
    block.attn2.is_cross_attention = False
    block.norm3 = nn.LayerNorm(16, elementwise_affine=False)
    mine = {f.source.removeprefix(BLOCK + ".") for f in find_folds(model) if f.source.startswith(BLOCK)}
    assert mine == {"norm1", "ff.net.0.proj"}


@pytest.mark.parametrize("name", ZOO)
def test_the_folded_model_is_the_same_function(name: str):
    model = ZOO[name].build().double().eval()
    before, weights = call(model, name, torch.float64), copy.deepcopy(model.state_dict())
    folds = all_folds(model)
    with folded(model, folds):
        after = call(model, name, torch.float64)
        changed = [n for n, p in model.state_dict().items() if not torch.equal(p, weights[n])]
    error = (after - before).norm() / before.norm()
    assert error < (1e-6 if name == "SANA" else 1e-12)  # SANA's attention computes in float32
    assert bool(changed) == bool(folds)
    assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())
    if name in ("SD 1.5", "PixArt-Sigma", "Wan", "SANA"):
        assert any(f.rotation for f in folds.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_come_back_to_the_bit(dtype: torch.dtype):
    """Also weights that underflow when divided, and after an error."""
    model = ZOO["SD 1.5"].build()
    with torch.no_grad():
        model.get_submodule(BLOCK).norm1.weight[0] = 1e-7  # type: ignore[union-attr,operator]
    model = model.to(dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), folded(model, all_folds(model)):
        assert not torch.equal(
            model.state_dict()[f"{BLOCK}.attn1.to_out.0.weight"], before[f"{BLOCK}.attn1.to_out.0.weight"]
        )
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_moments_follow_the_input():
    x, folding = torch.randn(50, 12, dtype=torch.float64), Folding("0123abc01230", 4)
    rows = folded_rows(x, folding)
    moment = x.T @ x / 50
    got = folded_moments({"a": moment, "b": moment, "c": moment}, {"a": folding, "b": folding, "c": Folding()})
    torch.testing.assert_close(got["a"], rows.T @ rows / 50, rtol=1e-12, atol=1e-12)
    assert got["a"] is got["b"] and got["c"] is moment
    weight = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(rows @ folded_columns(weight, folding).T, x @ weight.T, rtol=1e-12, atol=1e-12)
    assert as_smoothing(exponents("0189hi")) == "0189hi" and exponents("09ai") == [0, 9, -1, -9]


def test_plans_and_calibrations_keep_it(tmp_path: Any, plan: Plan, calibration: Calibration):
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").layers == plan.layers
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json").layers == calibration.layers
    layer = plan.layers[f"{BLOCK}.attn2.to_out.0"]
    assert layer.rotation == 4 and plan.layers[f"{BLOCK}.ff.net.0.proj"].smoothing
    plain = calibrate(toy(), PROMPTS)
    plain.save(tmp_path / "plain.json")
    assert "smoothing" not in (tmp_path / "plain.json").read_text()
    assert plan.with_calibration(plain).layers[f"{BLOCK}.attn2.to_out.0"].rotation is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"smoothing": "01x"}, "smoothing is '01x', expected a character a channel"),
        ({"smoothing": ""}, "smoothing is ''"),
        ({"smoothing": [0, 1]}, "smoothing is"),
        ({"rotation": 1}, "rotation is 1, expected the order"),
        ({"rotation": True}, "rotation is True"),
        ({"rotation": 4.0}, "rotation is 4.0"),
    ],
)
def test_wrong_fields_are_refused(fields: Mapping[str, Any], message: str, calibration: Calibration, tmp_path: Any):
    with pytest.raises(PlanError, match=message.replace("[", r"\[")):
        LayerPlan(weight_bits=8, **fields)
    layer = Plan.from_json({"layers": {"a": {"weight_bits": 8, "smoothing": "01", "rotation": 2}}}).layers["a"]
    assert layer.folds_input
    wrong = Calibration({"a": replace(next(iter(calibration.layers.values())), **fields)})
    wrong.save(tmp_path / "wrong.json")
    with pytest.raises(CalibrationError, match="wrong.json: layer 'a'"):
        Calibration.load(tmp_path / "wrong.json")


def with_layer(plan: Plan, name: str, **fields: Any) -> Plan:
    return plan.with_layers({name: replace(plan.layers[name], **fields)})


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("conv_in", {"rotation": 2}, "'conv_in': rotation 2, but UNet2DConditionModel has nothing before it"),
        (f"{BLOCK}.attn2.to_k", {"smoothing": "0" * 12}, "smoothing, but .* has nothing before it"),
        (f"{BLOCK}.ff.net.2", {"smoothing": "000"}, "smoothing is of 3 channels, its input has 64"),
        (f"{BLOCK}.ff.net.2", {"rotation": 4}, "expected null: its input is no attention's values"),
        (f"{BLOCK}.attn1.to_out.0", {"rotation": 16}, "rotation is 16, expected null or 4"),
        (f"{BLOCK}.attn1.to_k", {"smoothing": None}, "read one tensor, but one has smoothing, the other neither"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan: Plan, name: str, fields: Mapping[str, Any], message: str):
    model = toy().transformer
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=message):
        quantize_(model, mixdq_config(with_layer(plan, name, **fields)))
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_quantizing_is_folding_by_hand_and_quantizing(mode: Any, plan: Plan):
    model, by_hand = toy().transformer, toy().transformer
    quantize_(model, mixdq_config(plan, mode=mode))
    fold_(by_hand, planned_folds(by_hand, foldings_of(plan.layers)))
    plain = Plan({n: replace(v, smoothing=None, rotation=None) for n, v in plan.layers.items()}, {}, plan.bos_embedding)
    quantize_(by_hand, mixdq_config(plain, mode=mode))
    got, wanted = call(model), call(by_hand)
    assert torch.equal(got, wanted)
    original, unfolded = call(toy().transformer), toy().transformer
    quantize_(unfolded, mixdq_config(plain, mode=mode))
    assert (call(unfolded) - original).norm() > 2 * (got - original).norm(), "the folding must matter here"


def test_it_helps_where_channels_stand_out(plan: Plan):
    original, errors = call(toy().transformer), []
    for used in (plan, plan.with_calibration(calibrate(toy(), PROMPTS))):
        model = toy().transformer
        quantize_(model, mixdq_config(used, mode="fake"))
        errors.append(((call(model) - original).norm() / original.norm()).item())
    assert errors[0] < 0.7 * errors[1]


def test_bos_rows_are_those_of_the_rotated_values(plan: Plan):
    name = f"{BLOCK}.attn2.to_v"
    assert plan.layers[name].bos
    model = toy().transformer
    weight: Any = model.get_submodule(name).weight
    row = weight.double() @ torch.tensor(plan.bos_embedding, dtype=torch.float64)
    quantize_(model, mixdq_config(plan))
    quantized: Any = model.get_submodule(name).weight
    assert isinstance(quantized, MixDQTensor) and quantized.bos_output is not None
    torch.testing.assert_close(quantized.bos_output.double(), wanted_row(row, plan), rtol=1e-5, atol=1e-4)


def wanted_row(row: Tensor, plan: Plan) -> Tensor:
    layer = plan.layers[f"{BLOCK}.attn2.to_out.0"]
    smoothed = row / torch.tensor([2.0**p for p in exponents(layer.smoothing or "0" * len(row))], dtype=torch.float64)
    matrix = hadamard(4)
    assert matrix is not None
    return torch.cat([matrix @ head / 2 for head in smoothed.split(4)])


def test_fake_mode_is_not_folded_again_when_it_becomes_real(plan: Plan):
    model, direct = toy().transformer, toy().transformer
    quantize_(model, mixdq_config(plan, mode="fake"))
    quantize_(model, mixdq_config(plan))
    quantize_(direct, mixdq_config(plan))
    assert torch.equal(call(model), call(direct))
    faked = toy().transformer
    quantize_(faked, mixdq_config(plan, mode="fake"))
    plain = Plan.uniform(faked, 8, 8).with_calibration(calibrate(toy(), PROMPTS))
    with pytest.raises(QuantizationError, match="has smoothing.* already, the plan asks for neither"):
        quantize_(faked, mixdq_config(plain))


@pytest.mark.parametrize(
    "first, message",
    [
        ("attn1.to_v", "has neither smoothing nor rotation already, the plan asks for smoothing"),
        ("norm1", "'.*attn1.to_q' is quantized already, but smoothing of '.*attn1.to_q' must change it"),
        ("attn2.to_v", "'.*attn2.to_v' is quantized already, but smoothing and rotation 4 of '.*attn2.to_out.0' must"),
    ],
)
def test_layers_of_a_fold_are_quantized_together(plan: Plan, first: str, message: str):
    """A quantized layer of a fold is an error, before anything is changed."""
    model = toy().transformer
    if first == "norm1":
        quantize_(model.get_submodule(f"{BLOCK}.attn1.to_q"), MixDQLayerConfig(LayerPlan(weight_bits=8)))
    else:
        early = {f"{BLOCK}.{first}": replace(plan.layers[f"{BLOCK}.{first}"], smoothing=None)}
        quantize_(model, mixdq_config(Plan(early, {}, plan.bos_embedding)))
    before = {n: p.clone() for n, p in model.state_dict().items() if type(p) is Tensor}
    rest = {n: v for n, v in plan.layers.items() if n.startswith(BLOCK) and not n.endswith((first, "attn1.to_q"))}
    with pytest.raises(QuantizationError, match=message):
        quantize_(model, mixdq_config(Plan(rest, {}, plan.bos_embedding)))
    assert before and all(torch.equal(model.state_dict()[n], p) for n, p in before.items())


def test_groups_of_layers_one_after_the_other_give_the_same(plan: Plan):
    """Blocks quantized separately, as for large models."""
    whole, parts = toy().transformer, toy().transformer
    quantize_(whole, mixdq_config(plan))
    for first in sorted({n.split(".")[0] for n in plan.layers}):
        layers = {n: v for n, v in plan.layers.items() if n.split(".")[0] == first}
        quantize_(parts, mixdq_config(Plan(layers, {}, plan.bos_embedding)))
    assert torch.equal(call(whole), call(parts))


def test_unquantized_readers_are_folded_too(plan: Plan):
    """A norm's output is smoothed for all its readers, including layers that keep 16 bits."""
    kept = {f"{BLOCK}.attn1.to_q": LayerPlan(), f"{BLOCK}.attn1.to_v": LayerPlan()}
    model = toy().transformer
    quantize_(model, mixdq_config(plan.with_layers(kept)))
    all_eight = toy().transformer
    quantize_(all_eight, mixdq_config(plan))
    original = call(toy().transformer)
    assert (call(model) - original).norm() <= 1.2 * (call(all_eight) - original).norm()


def test_elsewhere_a_folding_plan_is_refused_not_ignored(plan: Plan):
    model = toy().transformer
    with pytest.raises(QuantizationError, match="mixdq_ao.quantize_"):
        torchao_quantize_(model, mixdq_config(plan), filter_fn=None)
    with torch.device("meta"):
        empty = ZOO["SD 1.5"].build()
    with pytest.raises(PlanError, match="load the whole model first"):
        quantize_(empty, mixdq_config(plan))


def test_compensated_rounding_takes_the_moments_of_the_original_model(plan: Plan, calibration: Calibration):
    pipe = toy()
    moments = input_moments(pipe, PROMPTS, calibration=calibration)
    ways: dict[str, Any] = {"weight_bits": 2, "symmetric": False, "weight_range": "output", "rounding": "compensated"}
    layers = {n: replace(v, **ways) for n, v in plan.layers.items() if n.startswith(BLOCK)}
    two = Plan(layers, {}, plan.bos_embedding)
    by_hand = toy().transformer
    fold_(by_hand, planned_folds(by_hand, foldings_of(two.layers)))
    bare = Plan({n: replace(v, smoothing=None, rotation=None) for n, v in two.layers.items()}, {}, plan.bos_embedding)
    quantize_(by_hand, mixdq_config(bare, moments=folded_moments(moments, foldings_of(two.layers))))
    model = toy().transformer
    quantize_(model, mixdq_config(two, moments=moments))
    assert torch.equal(call(model), call(by_hand))


def test_the_context_folds_and_unfolds(plan: Plan):
    model = toy().transformer
    before = copy.deepcopy(model.state_dict())
    with folded_as_planned(model, mixdq_config(plan)) as config:
        assert not torch.equal(model.state_dict()[f"{BLOCK}.norm1.weight"], before[f"{BLOCK}.norm1.weight"])
        torchao_quantize_(copy.deepcopy(model), config, filter_fn=None)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_sensitivity_is_of_the_folded_model(calibration: Calibration):
    """The result is that of a model folded by hand, and the model is restored."""
    pipe, by_hand = toy(), toy()
    before = copy.deepcopy(pipe.transformer.state_dict())
    fold_(by_hand.transformer, planned_folds(by_hand.transformer, foldings_of(calibration.layers)))
    options: dict[str, Any] = {"method": "probe", "weight_bits": (2,), "act_bits": (8,), "probes": 2}
    got = analyze(pipe, PROMPTS, calibration=calibration, **options)
    wanted = analyze(by_hand, PROMPTS, calibration=calibration.of_folded_model(), **options)
    assert {n: v.weight_errors for n, v in got.layers.items()} == {n: v.weight_errors for n, v in wanted.layers.items()}
    assert {n: v.act_errors for n, v in got.layers.items()} == {n: v.act_errors for n, v in wanted.layers.items()}
    assert all(torch.equal(p, before[n]) for n, p in denoiser(pipe).state_dict().items())


def test_workers_fold_what_they_load(calibration: Calibration):
    """A worker's pipeline, without Ray."""
    workers = folding_workers(RayWorkers(count=1, load=toy), foldings_of(calibration.layers))
    assert workers is not None and workers.load is not None
    loaded, by_hand = workers.load(), toy()
    fold_(by_hand.transformer, planned_folds(by_hand.transformer, foldings_of(calibration.layers)))
    wanted = by_hand.transformer.state_dict()
    assert all(torch.equal(p, wanted[n]) for n, p in loaded.transformer.state_dict().items())
    plain = RayWorkers(count=1, load=toy)
    assert folding_workers(plain, foldings_of(calibration.of_folded_model().layers)) is plain
