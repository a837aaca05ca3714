"""Ratios within rounds and their intervals."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import turns
from mixdq_ao.app import measure


class Pedantic:
    """The parts of pytest-benchmark's ``benchmark`` fixture that are used."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, fn, *, args, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            fn(*args)


def test_drift_of_the_machine_does_not_move_the_ratio():
    drift = np.linspace(1, 5, 15)
    found = turns.speedup(list(3 * drift), list(2 * drift))
    assert found == pytest.approx({"speedup": 1.5, "low": 1.5, "high": 1.5})


def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says():
    rng, held = np.random.default_rng(1), 0
    for _ in range(200):
        noise = rng.lognormal(0, 0.2, (2, 15))
        found = turns.speedup(list(2 * noise[0]), list(noise[1]))
        held += found["low"] <= 2 <= found["high"]
    assert 0.88 <= held / 200 <= 1.0


def test_warm_up_is_not_counted(monkeypatch):
    clock = itertools.accumulate([0, 100, 0, 100, 0, 2, 0, 1, 0, 2, 0, 1])  # the first round is slow
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    benchmark, order = Pedantic(), []
    calls = {"reference": lambda: order.append("reference"), "fast": lambda: order.append("fast")}
    found = turns.in_turn(benchmark, calls, rounds=2, warmup=1)
    assert order == ["reference", "fast"] * 3
    assert found["reference"]["ms"] == 2000 and found["fast"]["ms"] == 1000 and found["fast"]["speedup"] == 2
    assert benchmark.extra_info["contenders"] == found
