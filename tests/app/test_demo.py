"""The demo end to end with very few prompts."""

from __future__ import annotations

import json

import pytest
import torch

from mixdq_ao import Plan, Sensitivity
from mixdq_ao.app import demo

FIGURES = {
    "agreement",
    "ssim",
    "psnr",
    "frechet",
    "weight_bytes",
    "average_weight_bits",
    "average_act_bits",
    "latency_ms",
    "speedup",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "QUICK", demo.Size(calibration=8, analysis=2, judged=2, test=8, timed=()))
    demo.run_demo(directory, quick=True)
    patch.undo()
    return directory


def test_results(out):
    results = json.loads((out / "results.json").read_text())
    names = [f"{k}_{b}" for b in ("w8a8", "w4a8") for k in ("naive", "bos", "mixdq")]
    for table in ("variants", "variants_1_step"):
        variants = results[table]
        assert set(variants) == {"fp32", "mixdq_w3a8", *names}
        assert all(set(v) == FIGURES for v in variants.values())
        assert variants["fp32"]["agreement"] >= 0.97
        assert variants["naive_w8a8"]["agreement"] <= 0.5 < variants["bos_w8a8"]["agreement"]
        assert variants["mixdq_w8a8"]["psnr"] > 45
        assert variants["mixdq_w4a8"]["psnr"] > variants["bos_w4a8"]["psnr"] + 5
        assert variants["mixdq_w4a8"]["weight_bytes"] <= variants["bos_w4a8"]["weight_bytes"]
    assert torch.__version__.startswith(results["environment"]["packages"]["torch"])


def test_files(out):
    for name in ("grid.png", "report.html", "pareto.json", "calibration.json"):
        assert (out / name).stat().st_size > 1000
    assert len(Sensitivity.load(out / "sensitivity.json").layers) == 175
    for name in ("plan_w8a8.json", "plan_w4a8.json", "plan_w3a8.json"):
        assert len(Plan.load(out / name).layers) == 175
