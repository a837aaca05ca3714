"""The whole method on the bundled pipeline: calibrate, analyze, allocate, quantize, compile, compare."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from ..jsonfile import write_document
from ..models.bos_encoder import bos_aware
from ..models.pipelines import Sampling
from ..plan import Plan
from ..progress import console, progress
from ..search.analyze import analyze
from ..search.calibrate import calibrate
from ..search.metrics import error_power, psnr
from ..search.trial import run
from .environment import environment
from .grid import save_grid
from .latency import latencies
from .measure import Exam, held_bytes
from .quantized import quantized
from .quiet import silence_loading_bars
from .subject import bundled
from .variants import PARETO_BITS, Choice, Judgement, Variants, best, summaries

STEPS = (4, 1)
SHOWN = 8


@dataclass(frozen=True, slots=True)
class Size:
    """How much work a demo does: numbers of prompts, the variants to time, and the time limit in minutes."""

    calibration: int = 32
    analysis: int = 8
    judged: int = 16
    test: int = 256
    latency_batch: int = 32
    timed: tuple[str, ...] = (
        "mixdq_w8a8",
        "mixdq_w4a8",
        "mixdq_w3a8",
        "bos_w8a8",
        "bos_w4a8",
        "naive_w8a8",
        "naive_w4a8",
    )
    always_timed: int = 2
    minutes: float = 11.5


QUICK = Size(calibration=8, analysis=4, judged=8, test=16, timed=())


def run_demo(out: Path, quick: bool = False, full: bool = False) -> Path:
    """Writes plans, sensitivities, pictures, results.json and report.html to ``out``; returns the report's path.

    An interrupted run continues its sensitivity analysis where it stopped. ``quick``: few prompts, no compilation.
    ``full``: compiles and times every variant, however long that takes (a minute or two each on two cores); otherwise
    only mixdq_w8a8, mixdq_w4a8 and as many others as fit into ``Size.minutes``.
    """
    size, out = (QUICK if quick else Size(minutes=math.inf) if full else Size()), Path(out)
    deadline = time.monotonic() + 60 * size.minutes
    out.mkdir(parents=True, exist_ok=True)
    subject = bundled()
    silence_loading_bars()
    pipe, scorer = subject.load_pipeline(), subject.load_scorer()
    variants, choices = search(pipe, subject, size, out)
    plans = {
        "naive_w8a8": variants.naive(8),
        "bos_w8a8": variants.bos(8),
        "mixdq_w8a8": variants.w8a8(),
        "naive_w4a8": variants.naive(4),
        "bos_w4a8": variants.bos(4),
        "mixdq_w4a8": variants.plan(best(choices[4.0])),
        "mixdq_w3a8": variants.plan(best(choices[3.0])),
    }
    for name in ("mixdq_w8a8", "mixdq_w4a8", "mixdq_w3a8"):
        plans[name].save(out / f"plan_{name.removeprefix('mixdq_')}.json")
    ablation = {f"{c.objective}_w4a8": variants.plan(c) for c in choices[4.0]}
    test = subject.prompts(size.test, seed=2026, held_out=True)
    exam = Exam([p.text for p in test], [p.spec for p in test], scorer, Sampling(seed=10_000, batch_size=64))
    results = compare(pipe, plans, ablation, exam, size, out, deadline)
    write_document(out / "results.json", results)

    from .report import build

    report = build(out)
    _print(results, report)
    return report


def search(pipe: Any, subject: Any, size: Size, out: Path) -> tuple[Variants, dict[float, list[Choice]]]:
    """Calibrates, analyzes, and finds the best plan of each objective at each budget. Writes the results to ``out``."""
    texts = [p.text for p in subject.prompts(max(size.calibration, size.analysis, size.judged), seed=55)]
    calibration = calibrate(pipe, texts[: size.calibration], steps=(1, 4))
    calibration.save(out / "calibration.json")
    sensitivity = analyze(
        pipe, texts[: size.analysis], store=out / "analysis.jsonl", calibration=calibration, batch_size=size.analysis
    )
    sensitivity.save(out / "sensitivity.json")
    sampling = Sampling(seed=500, batch_size=32)
    judged = [p.text for p in subject.prompts(size.judged, seed=77)]
    reference = run(pipe, judged, sampling, images=True)

    def judge(plan: Plan) -> Judgement:
        found = run(quantized(pipe, plan), judged, sampling, images=True)
        assert found.images is not None and reference.images is not None
        decibel = psnr(found.images, reference.images).mean().item()
        return Judgement(decibel, error_power(reference.denoised, found.denoised))

    variants = Variants(pipe.unet, calibration, sensitivity, judge)
    choices: dict[float, list[Choice]] = {}
    with progress("allocating", len(PARETO_BITS)) as bar:
        for bits in PARETO_BITS:
            choices[bits] = variants.choices(bits)
            bar.advance(note=f"{bits} bits")
    write_document(out / "pareto.json", {"points": _points(choices)})
    return variants, choices


def _points(choices: dict[float, list[Choice]]) -> list[dict[str, Any]]:
    return [
        {
            "objective": c.objective,
            "weight_bits": bits,
            "weight_bytes": c.allocation.weight_bytes,
            "predicted_error": c.allocation.predicted_error,
            "measured_error": c.judged.error,
            "psnr": c.judged.psnr,
        }
        for bits, found in choices.items()
        for c in found
    ]


def compare(
    pipe: Any, plans: dict[str, Plan], ablation: dict[str, Plan], exam: Exam, size: Size, out: Path, deadline: float
) -> dict[str, Any]:
    """Measures every plan: returns the contents of results.json and writes grid.png. Only the first
    ``size.always_timed`` variants are compiled if that would end after ``deadline``."""
    tables: dict[int, dict[str, Any]] = {steps: {} for steps in STEPS}
    references = {
        steps: replace(exam, sampling=replace(exam.sampling, steps=steps)).draw(pipe, f"fp32, {steps} steps")
        for steps in STEPS
    }
    bits = summaries(plans | ablation, pipe.unet)
    pictures: dict[str, Tensor] = {}
    fp32 = {"weight_bytes": held_bytes(pipe.unet), "average_weight_bits": 32.0, "average_act_bits": 32.0}
    for name, plan in {"fp32": None, **plans, **ablation}.items():
        twin = next((n for n, p in plans.items() if name in ablation and p == plan), None)
        if twin is not None:
            tables[STEPS[0]][name] = dict(tables[STEPS[0]][twin])
            continue
        clone = pipe if plan is None else quantized(pipe, plan)
        held = fp32 if plan is None else {"weight_bytes": held_bytes(clone.unet), **bits[name]}
        if plan is not None and plan.bos_embedding is not None:
            bos_aware(clone)
        for steps in STEPS if name not in ablation else STEPS[:1]:
            drawn = references[steps]
            if plan is not None:
                drawn = replace(exam, sampling=replace(exam.sampling, steps=steps)).draw(
                    clone, f"{name}, {steps} steps"
                )
            tables[steps][name] = {**exam.grade(drawn, references[steps]), **held, "latency_ms": None, "speedup": None}
            if steps == STEPS[0]:
                pictures[name] = drawn[:SHOWN]
    shown = ["fp32", *plans]
    save_grid(out, {n: pictures[n] for n in shown}, list(exam.prompts[:SHOWN]))
    if size.timed:
        batch, timed = list(exam.prompts[: size.latency_batch]), {n: plans[n] for n in size.timed}
        timing = latencies(pipe, timed, batch, least=size.always_timed, deadline=deadline)
        for table in tables.values():
            for name, figures in timing.items():
                table[name].update(figures)
    return {
        "variants": {n: tables[4][n] for n in shown},
        "variants_1_step": {n: tables[1][n] for n in shown},
        "ablation": {n: tables[4][n] for n in ablation},
        "environment": environment() | {"prompts": len(exam.prompts), "latency_batch": size.latency_batch},
    }


COLUMNS = (
    ("agreement", "agree", ".1%"),
    ("ssim", "SSIM", ".4f"),
    ("psnr", "PSNR", ".1f"),
    ("frechet", "Fréchet", ".2f"),
    ("average_weight_bits", "W bits", ".2f"),
    ("speedup", "speed", ".2f"),
)


def _print(results: dict[str, Any], report: Path) -> None:
    table = Table("4 steps", *(title for _, title, _ in COLUMNS), "MiB")
    for name, figures in results["variants"].items():
        cells = ["-" if figures[key] is None else format(figures[key], form) for key, _, form in COLUMNS]
        table.add_row(name, *cells, f"{figures['weight_bytes'] / 2**20:.2f}")
    console.print(table)
    console.print(f"report: {report}")
