"""The joint program against brute force, and its errors."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixdq_ao.errors import AllocationError
from mixdq_ao.plan import LayerPlan
from mixdq_ao.search.additive import additive_errors
from mixdq_ao.search.joint import allocate_jointly
from mixdq_ao.search.limits import Limits
from mixdq_ao.search.sensitivity import LayerSensitivity, Sensitivity

PAIRS = [(4, 8), (4, 16), (8, 8), (8, 16), (16, 16)]
"""There is no integer product of 16-bit weights and 8-bit activations."""


def example(seed: int, layers: int = 4) -> tuple[Sensitivity, dict[tuple[str, int, int], float], dict[str, int]]:
    """Sensitivity, latency table and multiply-accumulates of random layers."""
    rng = np.random.default_rng(seed)
    found: dict[str, LayerSensitivity] = {}
    for i in range(layers):
        size = int(rng.integers(1, 40)) * 8
        found[f"layer{i}"] = LayerSensitivity(
            group="content" if i % 2 else "quality",
            weight_size=size,
            act_size=int(rng.integers(1, 100)),
            weight_errors={4: float(10 ** -rng.uniform(1, 3)), 8: float(10 ** -rng.uniform(3, 6))},
            act_errors={8: float(10 ** -rng.uniform(2, 6))},
            weight_bytes={b: size * b // 8 + int(rng.integers(1, 9)) for b in (4, 8)},
        )
    latency = {(n, w, a): float(rng.uniform(1, 9)) for n in found for w, a in PAIRS}
    return Sensitivity(found), latency, {n: int(rng.integers(1, 50)) for n in found}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tightness=st.floats(0.1, 0.9), which=st.integers(1, 15))
def test_against_brute_force(seed: int, tightness: float, which: int) -> None:
    s, latency, macs = example(seed)
    full = Limits(weight_bytes=1, act_bytes=1, seconds=1, bit_operations=1, latency=latency, macs=macs, batch=2)
    names = [n for i, n in enumerate(("weight_bytes", "act_bytes", "seconds", "bit_operations")) if which >> i & 1]

    def amount(limit: str, plan: dict[str, tuple[int, int]]) -> float:
        amounts = [full.amount(limit, n, s, pair) or 0.0 for n, pair in plan.items()]
        return max(amounts) if limit == "act_bytes" else sum(amounts)

    def error(plan: dict[str, tuple[int, int]]) -> float:
        pairs = ((s.layers[n], pair) for n, pair in plan.items())
        return sum(x.weight_errors.get(w, 0.0) + x.act_errors.get(a, 0.0) for x, (w, a) in pairs)

    plans = [dict(zip(s.layers, choice, strict=True)) for choice in itertools.product(PAIRS, repeat=len(s.layers))]
    bounds = {}
    for name in names:
        amounts = [amount(name, p) for p in plans]
        bounds[name] = min(amounts) + tightness * (max(amounts) - min(amounts))
    limits = Limits(**bounds, latency=latency, macs=macs, batch=2)
    fits = [p for p in plans if all(amount(n, p) <= b * (1 + 1e-12) for n, b in bounds.items())]
    if not fits:
        with pytest.raises(AllocationError, match="no plan keeps all limits"):
            allocate_jointly(s, limits, weight_choices=(4, 8, 16))
        return
    found = allocate_jointly(s, limits, weight_choices=(4, 8, 16))
    assert found.status == "optimal"
    assert found.predicted_error == pytest.approx(min(map(error, fits)), rel=1e-6, abs=1e-10)
    assert all(found.totals[n] <= b * (1 + 1e-8) for n, b in bounds.items())


def test_an_optimum_twelve_decades_below_the_largest_error() -> None:
    """HiGHS' tolerances are absolute: it once stopped at 2.1e-8 here and called it optimal."""

    def layer(size: int, weights: dict[int, float], act: float) -> LayerSensitivity:
        return LayerSensitivity(
            group="content", weight_size=size, act_size=10, weight_errors=weights, act_errors={8: act}
        )

    s = Sensitivity(
        {
            "l0": layer(400, {2: 0.05, 4: 0.003, 8: 4e-05}, 8e-05),
            "l1": layer(100, {2: 5e-09, 4: 7e-11, 8: 2e-12}, 6e-4),
            "l2": layer(200, {2: 2e-08, 4: 4e-10, 8: 7e-13}, 8e-10),
        }
    )
    seconds = {"l0": (1, 9, 6, 8, 9, 5, 7), "l1": (7, 7, 7, 8, 2, 5, 2), "l2": (3, 6, 9, 9, 5, 8, 6)}
    pairs = [(w, a) for w in (2, 4, 8) for a in (8, 16)] + [(16, 16)]
    latency = {(n, *pair): float(x) for n, row in seconds.items() for pair, x in zip(pairs, row, strict=True)}
    limits = Limits(seconds=20.0, bit_operations=1824, latency=latency, macs={"l0": 2, "l1": 5, "l2": 2})

    def fits(plan: tuple[tuple[int, int], ...]) -> bool:
        chosen = list(zip(s.layers, plan, strict=True))
        totals = {m: sum(limits.amount(m, n, s, p) or 0.0 for n, p in chosen) for m in limits.summed()}
        return all(totals[m] <= bound for m, bound in limits.summed().items())

    def error(plan: tuple[tuple[int, int], ...]) -> float:
        chosen = zip(s.layers, plan, strict=True)
        return sum(weights[n].get(w, 0.0) + acts[n].get(a, 0.0) for n, (w, a) in chosen)

    weights, acts = additive_errors(s, "weight")[0], additive_errors(s, "act")[0]
    least = min(error(plan) for plan in itertools.product(pairs, repeat=3) if fits(plan))
    found = allocate_jointly(s, limits)
    assert found.status == "optimal" and found.predicted_error == pytest.approx(least, rel=1e-6, abs=0)


def test_protected_and_tied_layers() -> None:
    s, latency, macs = example(5)
    limits = Limits(weight_bytes=10**6, seconds=100, latency=latency, bit_operations=1e9, macs=macs, act_bytes=10**6)
    found = allocate_jointly(
        s, limits, weight_choices=(4, 8), act_choices=(8,), protect=["layer0"], tie=[["layer1", "layer2"]]
    )
    assert found.plan.layers["layer0"] == LayerPlan()
    assert found.plan.layers["layer1"] == found.plan.layers["layer2"] == LayerPlan(weight_bits=8, act_bits=8)
    expected = 2 * s.layers["layer0"].weight_size + sum(s.layers[f"layer{i}"].weight_bytes[8] for i in (1, 2, 3))
    assert found.totals["weight_bytes"] == found.weight_bytes == expected


def test_pairs_that_were_not_measured_are_not_offered() -> None:
    s, latency, _ = example(6)
    fast = {key: seconds for key, seconds in latency.items() if key[1] != 4}
    found = allocate_jointly(s, Limits(seconds=1000, latency=fast), weight_choices=(4, 8), act_choices=(8,))
    assert {p.weight_bits for p in found.plan.layers.values()} == {8}
    with pytest.raises(AllocationError, match="layer 'layer0': none of the choices"):
        allocate_jointly(s, Limits(seconds=1000, latency=fast), weight_choices=(4,))


def test_impossible_requests() -> None:
    s, latency, macs = example(7)
    for arguments, message in (
        ({}, "at least one limit"),
        ({"seconds": 3.0}, "latency is not given"),
        ({"bit_operations": 3.0}, "macs is not given"),
        ({"weight_bytes": -1}, "weight_bytes is -1"),
        ({"seconds": math.nan, "latency": latency}, "seconds is nan"),
        ({"act_bytes": 5, "batch": 0}, "batch is 0"),
    ):
        with pytest.raises(AllocationError, match=message):
            Limits(**arguments)
    for limits, options, message in (
        (
            Limits(weight_bytes=3),
            {"weight_choices": (4, 8)},
            "no plan keeps all limits: weight_bytes 3 .least reachable",
        ),
        (Limits(weight_bytes=10**6), {}, "no weight_bytes at 2 bits"),
        (Limits(act_bytes=10**6), {}, "no weight_errors at 2 bits"),
        (Limits(weight_bytes=10**6), {"weight_choices": (3,)}, "weight_choices is"),
        (Limits(act_bytes=1), {"weight_choices": (4,)}, "none of the choices"),
        (Limits(act_bytes=1), {"weight_choices": (4,), "protect": list(s.layers)[:1]}, "layer 'layer"),
        (Limits(bit_operations=1e9, macs={"layer0": 1}), {"weight_choices": (4,)}, "layer 'layer1': not in macs"),
        (Limits(seconds=9, latency={("x", 4, 8): 1.0}), {"weight_choices": (4,)}, "none of the choices"),
    ):
        with pytest.raises(AllocationError, match=message):
            allocate_jointly(s, limits, **options)
