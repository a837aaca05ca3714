"""Evaluations per second of the one-at-a-time analysis, with and without reuse of everything before the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixdq_ao import Sampling, calibrate
from mixdq_ao.app.subject import bundled
from mixdq_ao.search.evaluation import Evaluation
from mixdq_ao.search.trial import Trials

from .turns import in_turn

PROMPTS = 8
EVERY = 12
"""Every so many-th layer is evaluated, from first to last: early ones save little, late ones nearly everything."""


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.quick), 4])
def test_evaluations(benchmark: Any, steps: int) -> None:
    """Checks that both ways give the same error, then times them."""
    shapes = bundled()
    pipe, texts = shapes.load_pipeline(), [p.text for p in shapes.prompts(PROMPTS, seed=3)]
    calibration = calibrate(pipe, texts, steps=steps)
    sampling = Sampling(steps=steps, batch_size=PROMPTS)
    trials = {
        name: Trials(pipe, texts, sampling, replay=replay) for name, replay in (("anew", False), ("reused", True))
    }
    evaluations = [Evaluation(name, "weight", 4) for name in trials["reused"].called()[::EVERY]]

    def run(name: str) -> list[float]:
        bos = calibration.bos_embedding
        row = None if bos is None else torch.tensor(bos)
        return [trials[name].measure(e.name, e.layer(calibration), row, images=False)["error"] for e in evaluations]

    with torch.no_grad():
        assert run("reused") == pytest.approx(run("anew"), rel=1e-4)
        found = in_turn(benchmark, {name: lambda n=name: run(n) for name in trials}, rounds=5, warmup=0)
    rates = {name: 1000 * len(evaluations) / row["ms"] for name, row in found.items()}
    benchmark.extra_info.update(evaluations_per_second=rates, prompts=PROMPTS)
    print("  " + ", ".join(f"{name}: {rate:.1f} evaluations/s" for name, rate in rates.items()))
    assert found["reused"]["speedup"] > 1
