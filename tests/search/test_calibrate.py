"""Calibration: exact ranges, ties, splits, BOS, and files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn

from mixdq_ao import (
    Calibration,
    CalibrationError,
    LayerPlan,
    MixDQError,
    Plan,
    PlanError,
    calibrate,
    input_moments,
    mixdq_config,
    quantize_,
    unfuse_projections,
)
from mixdq_ao.quantize.config import MixDQLayerConfig
from mixdq_ao.quantize.quantizer import act_params, fake_quantize_act
from mixdq_ao.search.observe import EXACT, RangeObserver

from ..conftest import bos_row, text_rows, unet_inputs


def test_ranges_are_the_inputs_extremes(unet):
    seen: dict[str, list[float]] = {}

    def hook(name):
        def record(module, args):
            seen.setdefault(name, []).extend([args[0].min().item(), args[0].max().item()])

        return record

    names = ["conv_in", "conv_out", "time_embedding.linear_1"]
    for name in names:
        unet.get_submodule(name).register_forward_pre_hook(hook(name))
    calibration = calibrate(unet, run=lambda: [unet(**unet_inputs()) for _ in range(2)])
    for name in names:
        assert calibration.layers[name].act_range == (min(seen[name]), max(seen[name]))


def test_mse_looks_for_the_range_of_as_many_bits():
    """Few levels want a narrower range: its error at 4 bits is the smaller one there, and the larger one at 8."""
    torch.manual_seed(0)
    x, layer = torch.cat([torch.randn(4000), torch.tensor([12.0, -12.0])]).reshape(-1, 1), nn.Linear(1, 1)
    run = lambda: layer(x)  # noqa: E731
    found = {bits: calibrate(nn.Sequential(layer), run=run, method="mse", act_bits=bits) for bits in (8, 4)}
    assert found[4].metadata["act_bits"] == 4

    def error(range_bits: int, bits: int) -> float:
        act = act_params(*found[range_bits].layers["0"].act_range, bits=bits)
        return (fake_quantize_act(x, act) - x).square().mean().item()

    assert error(4, 4) < 0.5 * error(8, 4) and error(8, 8) < 0.5 * error(4, 8)
    with pytest.raises(CalibrationError, match="act_bits is 6, expected 8 or 4"):
        calibrate(layer, run=run, act_bits=6)
    for use in (lambda: calibrate(layer, run=run, method="min-max"), lambda: RangeObserver("min-max")):
        with pytest.raises(CalibrationError, match="method is 'min-max', expected one of minmax, percentile, mse"):
            use()


def test_layers_that_read_one_tensor_share_a_range(calibration):
    qkv = [n for n in calibration.layers if n.startswith("mid_block") and "attn1.to_" in n and "out" not in n]
    assert len(qkv) == 3
    assert any(set(qkv) == set(tie) for tie in calibration.ties)
    assert len({calibration.layers[n].act_range for n in qkv}) == 1
    text = [n for n in calibration.layers if n.endswith(("attn2.to_k", "attn2.to_v"))]
    assert len({calibration.layers[n].prompt_range for n in text}) == 1


def test_bos_is_found_and_kept_out(calibration):
    assert calibration.bos_embedding == tuple(bos_row().tolist())
    layer = next(v for n, v in calibration.layers.items() if n.endswith("attn2.to_v"))
    assert layer.act_range[1] == 300.0 and layer.prompt_range[1] < 6


def test_no_outlier_no_bos(unet):
    inputs = unet_inputs() | {"encoder_hidden_states": torch.randn(2, 7, 24)}
    assert calibrate(unet, run=lambda: unet(**inputs)).bos_embedding is None
    differs = unet_inputs()
    differs["encoder_hidden_states"][1, 0] *= 1.5
    rivalled = unet_inputs()
    rivalled["encoder_hidden_states"][0, 3] = 0.5 * bos_row()
    later = unet_inputs()
    later["encoder_hidden_states"] = later["encoder_hidden_states"].flip(1)
    for given, says in (
        (inputs, "no row set apart: the highest peak"),
        (differs, "row 0 is an outlier, .* differs between prompts"),
        (
            rivalled,
            "row 0 is an outlier, .* the same for every prompt, but less than 4 times the largest of all others",
        ),
        (later, "row 6 is an outlier, .* is not the first"),
    ):
        found = calibrate(unet, run=lambda given=given: unet(**given))
        assert found.bos_embedding is None and re.search(says, found.metadata["text_rows"])
    with pytest.raises(CalibrationError, match="differs between prompts"):
        calibrate(unet, run=lambda: unet(**inputs), bos=True)
    with_bos = unet_inputs()
    assert calibrate(unet, run=lambda: unet(**with_bos), bos=False).bos_embedding is None


def test_zero_negatives_do_not_hide_bos(unet):
    inputs = unet_inputs() | {"encoder_hidden_states": torch.cat([torch.zeros(1, 7, 24), text_rows(1)])}
    assert calibrate(unet, run=lambda: unet(**inputs)).bos_embedding is not None


def test_hooks_are_gone_and_no_input_is_kept(unet):
    calibrate(unet, run=lambda: unet(**unet_inputs()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_hooks_are_gone_after_an_error(unet):
    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        calibrate(unet, run=fail)
    assert not any(m._forward_hooks for m in unet.modules())


def test_split_halves_have_ranges_of_their_own(calibration):
    split = {n: v for n, v in calibration.layers.items() if v.split is not None}
    assert split and all(n.endswith("conv_shortcut") for n in split)
    for layer in split.values():
        lows, highs = zip(layer.first_range, layer.second_range, strict=True)
        assert (min(lows), max(highs)) == layer.act_range
        for bits in (4, 16):
            plan = layer.plan(LayerPlan(weight_bits=bits, act_bits=8), bos=True, split=True)
            assert (plan.act_range, plan.split_act_range) == (layer.first_range, layer.second_range)
        with pytest.raises(PlanError, match="16-bit weights with 8-bit activations have no integer product"):
            MixDQLayerConfig(plan)


def test_files(calibration, tmp_path):
    calibration.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == calibration
    document = json.loads((tmp_path / "c.json").read_text())
    name = next(iter(document["layers"]))
    for change, says in [
        ({"act_range": None}, "act_range"),
        ({"act_range": [1, 0]}, "lo <= hi"),
        ({"macs": "x"}, "macs is 'x', expected a whole number from 0"),
        ({"macs": False}, "macs is False"),
        ({"act_size": -5}, "act_size is -5, expected a whole number from 1"),
        ({"act_size": None}, "act_size is None"),
        ({"act_size": 2**60}, "act_size is 1152921504606846976"),
        ({"split": 0}, "split is 0"),
        ({"split": 3}, "come together"),
        ({"extra": 1}, "and no more"),
    ]:
        broken = json.loads(json.dumps(document))
        broken["layers"][name] |= change
        (tmp_path / "b.json").write_text(json.dumps(broken))
        with pytest.raises(CalibrationError, match=says):
            Calibration.load(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps(document | {"layer": {}}))
    with pytest.raises(CalibrationError, match="b.json: unknown key 'layer'; expected format"):
        Calibration.load(tmp_path / "b.json")
    (tmp_path / "b.json").write_text(json.dumps(document)[:1000])
    with pytest.raises(CalibrationError, match="not valid JSON"):
        Calibration.load(tmp_path / "b.json")


def test_sizes_in_a_plan_that_are_none_are_named(unet, calibration):
    """A plan counts its average bits by what the calibration left in its metadata; a file may hold anything."""
    plan = Plan.uniform(unet, 8, 8).with_calibration(calibration)
    sizes = plan.metadata["act_sizes"]
    for wrong in ("many", {**sizes, "conv_in": "many"}, {**sizes, "conv_in": -1}):
        with pytest.raises(PlanError, match="metadata: act_sizes is .*expected {layer: elements}"):
            replace(plan, metadata={"act_sizes": wrong}).summary(unet)


def test_bad_input(bundled, unet):
    with pytest.raises(MixDQError, match="prompts is empty"):
        calibrate(bundled.pipe, [])
    with pytest.raises(MixDQError, match="prompt 1 is ' '"):
        calibrate(bundled.pipe, ["a", " "])
    with pytest.raises(MixDQError, match="prompts is the text"):
        calibrate(bundled.pipe, "a red circle")
    options = {"calibration": bundled.calibration}
    for use in (
        lambda steps: calibrate(bundled.pipe, ["a"], steps=steps),
        lambda steps: input_moments(bundled.pipe, ["a"], steps=steps, **options),
    ):
        for steps in ("1,4", 1.5, (1, 2.5), (), 0, True):
            with pytest.raises(CalibrationError, match=f"steps is {re.escape(repr(steps))}, expected a whole number"):
                use(steps)
    for both in (calibrate, partial(input_moments, **options)):
        with pytest.raises(CalibrationError, match="prompts and run= are both given"):
            both(bundled.pipe, ["a"], run=lambda: None)
    with pytest.raises(CalibrationError, match="nothing|no linear"):
        calibrate(unet, run=lambda: None)
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(unet, run=lambda: unet(**(unet_inputs() | {"sample": torch.full((2, 4, 8, 8), float("nan"))})))


def test_a_layer_that_never_ran():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    calibration = calibrate(model, run=lambda: model["used"](torch.ones(1, 2)))
    with pytest.raises(CalibrationError, match="'unused' was never called"):
        Plan.uniform(model, 8, 8).with_calibration(calibration)


def test_percentile_and_mse_clip_an_outlier():
    torch.manual_seed(0)
    for method in ("percentile", "mse"):
        observer = RangeObserver(method)
        for scale in (0.5, 1, 2):
            observer.update(torch.randn(20_000) * scale)
        observer.update(torch.tensor([400.0]))
        lo, hi = observer.range(8)
        assert -12 < lo < -3 and 3 < hi < (12 if method == "percentile" else 401), method
    exact = RangeObserver("minmax")
    exact.update(torch.tensor([-1.5, 400.0]))
    assert exact.range() == (-1.5, 400.0)


def test_a_large_call_is_counted_exactly():
    """``torch.histc`` counts in float32, which stops at 2^24."""
    observer = RangeObserver("percentile")
    observer.update(torch.full((EXACT + 1001,), 0.5))
    observer.update(torch.tensor([-3.0, 0.0]))
    assert observer.counts.sum() == EXACT + 1002 and observer.counts.max() == EXACT + 1001 and observer.zeros == 1


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_zeros_that_come_first_change_no_range(method):
    ranges = []
    for zeros in ([torch.zeros(1)], []):
        observer = RangeObserver(method)
        for x in (*zeros, torch.randn(205_000, generator=torch.Generator().manual_seed(0)) * 1e-4):
            observer.update(x)
        ranges.append(observer.range())
    assert ranges[0] == pytest.approx(ranges[1], rel=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [0.5, 0.99])
def test_zeros_have_no_part_in_the_rounding_error(bits, zeros):
    """They round exactly in every range."""
    x = torch.randn(400_000) * (torch.rand(400_000) > zeros)
    observer = RangeObserver("mse")
    observer.update(x)

    def error(lo: float, hi: float) -> float:
        return (fake_quantize_act(x, act_params(lo, hi, bits)) - x).double().square().mean().item()

    shrunk = [(observer.lo * s, observer.hi * s) for s in torch.linspace(0.01, 1, 100).tolist()]
    assert error(*observer.range(bits)) <= 1.1 * min(error(*ends) for ends in shrunk)


@pytest.mark.parametrize("zeros", [9_000, 99_999])
def test_zeros_count_in_a_quantile(zeros):
    x = torch.cat([torch.zeros(zeros), torch.linspace(0.1, 1.0, 100_000 - zeros)])
    observer = RangeObserver("percentile")
    for part in x.split(50_000):
        observer.update(part)
    lo, hi = observer.range()
    ends = x.double().quantile(torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64), interpolation="lower")
    assert lo == ends[0] == 0 and hi == pytest.approx(ends[1].item(), abs=2 / 4096)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("values", [[0.0] * 9, [5.0] * 9, [-5.0] * 9, [0.3], [-0.3], [0.0], [-1e-7, 1e-7], [1.0, 2.0]])
def test_a_range_lies_within_its_inputs(method, values):
    """Within them and zero for "mse", which shrinks towards it."""
    observer = RangeObserver(method)
    observer.update(torch.tensor(values))
    ends = observer.lo, observer.hi
    least, most = (min(ends[0], 0.0), max(ends[1], 0.0)) if method == "mse" else ends
    for bits in (4, 8):
        lo, hi = observer.range(bits)
        assert least <= lo <= hi <= most, (lo, hi)
        assert method == "mse" or values != [values[0]] * len(values) or (lo, hi) == ends


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_never_clipped_away(method, value):
    observer = RangeObserver(method)
    observer.update(torch.randn(100_000))
    observer.update(torch.tensor([value]))
    assert max(map(abs, observer.range())) == float("inf")


def test_mse_range_is_the_best_of_a_search():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50_000), torch.tensor([40.0])])
    observer = RangeObserver("mse")
    observer.update(x)

    def error(lo: float, hi: float) -> float:
        step = (hi - lo) / 15
        return (((x.clamp(lo, hi) - lo) / step).round() * step + lo - x).square().mean().item()

    best = error(*observer.range(4))
    assert best <= 1.05 * min(
        error(*(torch.tensor([x.min(), x.max()]) * s).tolist()) for s in torch.linspace(0.01, 1, 100)
    )


def test_a_quantized_model_is_not_calibrated(unet, calibration):
    quantize_(unet, mixdq_config(Plan.uniform(unet, 8, 8).with_calibration(calibration)))
    with pytest.raises(CalibrationError, match="is quantized already; calibrate the original model"):
        calibrate(unet, run=lambda: unet(**unet_inputs()))


def test_layers_of_an_adapter_are_not_calibrated(unet):
    """Their names hide what reads the text and where inputs are concatenated."""
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "conv_shortcut"]))
    with pytest.raises(CalibrationError, match=r"base_layer' is part of an adapter .*pipe.fuse_lora"):
        calibrate(unet, run=lambda: unet(**unet_inputs()))


def test_joint_projections_of_full_precision_are_not_calibrated(unet, calibration):
    unet.fuse_qkv_projections()
    with pytest.raises(CalibrationError, match=r"attention '.*attn1': its projections are fused.*unfuse_qkv_proj"):
        calibrate(unet, run=lambda: unet(**unet_inputs()))
    unet.unfuse_qkv_projections()
    unfuse_projections(unet)
    assert calibrate(unet, run=lambda: unet(**unet_inputs())).layers.keys() == calibration.layers.keys()
