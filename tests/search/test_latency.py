"""A table of layers' seconds, measured; plans and fronts that use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixdq_ao import AllocationError, CalibrationError, LayerPlan, Plan, calibrate, pareto
from mixdq_ao.layers import find_layers
from mixdq_ao.search.joint import allocate_jointly
from mixdq_ao.search.latency import _quantized, layer_latencies
from mixdq_ao.search.limits import Limits
from mixdq_ao.search.pareto import pareto_jointly, seconds, undominated
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity
from tests.conftest import unet_inputs
from tests.default_dtype import default_dtype


class Repeated(nn.Module):
    """A small layer called three times, a large one, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) + self.small(self.small(self.small(x)))


def test_every_called_layer_at_every_precision(unet, calibration, monkeypatch):
    ticks = iter(range(10**9))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    before = {n: p.clone() for n, p in unet.named_parameters()}
    table = layer_latencies(unet, calibration, lambda: unet(**unet_inputs()), weight_bits=(4, 8), rounds=1)
    pairs = [(16, 16), (4, 8), (8, 8)]
    assert set(table) == {(n, *p) for n in calibration.layers for p in pairs}
    assert set(calibration.layers) <= set(find_layers(unet))
    assert min(table.values()) > 0
    assert all(torch.equal(before[n], p) for n, p in unet.named_parameters())


def test_calls_add_up_and_equal_ones_are_measured_once():
    model, x = Repeated(), torch.randn(4, 8)
    calibration = calibrate(model, run=lambda: model(x))
    timed: list[nn.Module] = []

    def wrap(layer: nn.Module):
        timed.append(layer)
        return layer

    table = layer_latencies(model, calibration, lambda: model(x), weight_bits=(8,), rounds=3, wrap=wrap)
    assert len(timed) == 2 and not any(layer is model.small for layer in timed)
    assert {n for n, *_ in table} == {"small", "large"}
    for pair in ((16, 16), (8, 8)):
        assert table["small", *pair] == pytest.approx(3 * table["large", *pair])
    with pytest.raises(CalibrationError, match="no calibrated linear"):
        layer_latencies(model, calibration, lambda: None)


def test_rows_are_compared_in_float32_whatever_the_default_type(unet, calibration):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    with default_dtype(torch.bfloat16):
        layer = _quantized(unet.get_submodule(name), name, calibration, (4, 8))
    assert torch.equal(layer.weight.bos_embedding, torch.tensor(calibration.bos_embedding))


def example() -> tuple[Sensitivity, dict[tuple[str, int, int], float]]:
    """Fewer bits: smaller, worse; and slower for layer b."""
    layer = LayerSensitivity(
        group="quality",
        weight_size=64,
        act_size=8,
        weight_errors={2: 1e-1, 4: 1e-2, 8: 1e-4},
        act_errors={8: 1e-6},
        weight_bytes={2: 16, 4: 32, 8: 64},
    )
    latency = {(n, w, 8): (1.0 if n == "a" else 10.0 / w) for n in "ab" for w in (2, 4, 8)}
    return Sensitivity({"a": layer, "b": layer}), latency


def test_fronts_know_their_seconds():
    s, latency = example()
    front = pareto(s, weight_bits=(2, 3, 4, 5, 6, 8), act_bits=8, objective="additive", latency=latency)
    for a in front:
        assert a.totals["seconds"] == pytest.approx(seconds(a.plan, latency))
    assert [a.weight_bytes for a in front] == sorted(a.weight_bytes for a in front)
    joint = pareto_jointly(
        s,
        [Limits(weight_bytes=b, latency=latency) for b in (10, 32, 64, 96, 128)],
        weight_choices=(2, 4, 8),
        act_choices=(8,),
    )
    assert [a.weight_bytes for a in joint] == [32, 64, 96, 128]
    assert all(a.totals["seconds"] == pytest.approx(seconds(a.plan, latency)) for a in joint)
    fast = allocate_jointly(s, Limits(seconds=2.3, latency=latency), weight_choices=(2, 4, 8), act_choices=(8,))
    both = undominated([*joint, fast])
    assert all(any(b.totals["seconds"] <= a.totals["seconds"] for b in both) for a in joint)
    with pytest.raises(AllocationError, match="no plan keeps all limits"):
        pareto_jointly(s, [Limits(weight_bytes=1)], weight_choices=(2,), act_choices=(8,))
    with pytest.raises(AllocationError, match="layer 'a': the latency table has no W4A16"):
        seconds(Plan({"a": LayerPlan(weight_bits=4)}), latency)


def test_a_faster_plan_stays_in_the_front():
    s, latency = example()
    small = allocate_jointly(s, Limits(weight_bytes=64), weight_choices=(2, 4, 8), act_choices=(8,))
    slow, fast = (
        [type(small)(**{f: getattr(small, f) for f in small.__slots__} | {"totals": {"seconds": t}})]
        for t in (2.0, 1.0)
    )
    assert undominated([*slow, *fast])[0].totals["seconds"] == 1.0 and len(undominated([*slow, *fast])) == 1
