"""Sensitivities of the bundled pipeline from random probes against one layer at a time: time and rank correlation."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from mixdq_ao import Sampling, Sensitivity, analyze, calibrate
from mixdq_ao.app.subject import bundled
from mixdq_ao.search.probe_baseline import gradient_scores

PROMPTS = 8
CHOICES = (("weight", 2), ("weight", 4), ("weight", 8), ("act", 4), ("act", 8))


@pytest.fixture(scope="module")
def subject() -> SimpleNamespace:
    """The pipeline, and its one-at-a-time analysis as reference: 175 layers x 5 choices, with replay."""
    shapes = bundled()
    pipe, prompts = shapes.load_pipeline(), [p.text for p in shapes.prompts(PROMPTS, seed=3)]
    calibration = calibrate(pipe, prompts)
    start = time.perf_counter()
    one = analyze(pipe, prompts, calibration=calibration)
    seconds = time.perf_counter() - start
    print(f"\none layer at a time: {seconds:.1f} s for {len(one.layers)} layers x {len(CHOICES)}, {PROMPTS} prompts")
    return SimpleNamespace(pipe=pipe, prompts=prompts, calibration=calibration, one=one, seconds=seconds)


def ranks(one: Sensitivity, tables: dict[str, dict[str, dict[int, float]]]) -> dict[str, float]:
    """Spearman correlation over layers with the measured error powers; ``tables``: {kind: {layer: {bits: value}}}."""
    return {
        f"{kind[0].upper()}{bits}": float(
            spearmanr(
                [layer.errors(kind)[bits] for layer in one.layers.values()],  # type: ignore[arg-type]
                [tables[kind][name][bits] for name in one.layers],
            ).statistic
        )
        for kind, bits in CHOICES
    }


def show(title: str, seconds: float, s: SimpleNamespace, correlations: dict[str, float]) -> None:
    line = "  ".join(f"{name} {r:.3f}" for name, r in correlations.items())
    print(f"\n{title}: {seconds:.2f} s, {s.seconds / seconds:.0f}x faster; rank correlation {line}")


@pytest.mark.parametrize("probes", [1, 4, 16])
def test_probe(benchmark: Any, subject: SimpleNamespace, probes: int) -> None:
    s = subject

    def run():
        return analyze(s.pipe, s.prompts, method="probe", probes=probes, calibration=s.calibration)

    result = benchmark.pedantic(run, rounds=3 if probes < 16 else 1, warmup_rounds=1)
    tables = {k: {n: dict(v.errors(k)) for n, v in result.layers.items()} for k in ("weight", "act")}
    correlations = ranks(s.one, tables)
    show(f"{probes} probes", benchmark.stats.stats.median, s, correlations)
    ratio = [result.layers[n].weight_errors[8] / v.weight_errors[8] for n, v in s.one.layers.items()]
    benchmark.extra_info.update(correlations, speedup=s.seconds / benchmark.stats.stats.median)
    print(f"median estimated / measured at W8: {np.median(ratio):.2f}")
    assert min(correlations.values()) > 0.93


def test_published_gradient_score(benchmark: Any, subject: SimpleNamespace) -> None:
    """The baseline: squares summed instead of sums squared."""
    s = subject

    def run():
        return gradient_scores(s.pipe, s.prompts, s.calibration, sampling=Sampling(), probes=4)

    scores = benchmark.pedantic(run, rounds=1)
    correlations = ranks(s.one, scores)
    show("sum of (g dY)^2, 4 probes", benchmark.stats.stats.median, s, correlations)
    benchmark.extra_info.update(correlations)
