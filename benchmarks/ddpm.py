"""Bits per layer and step on a many-step unconditional DDPM, at equal bytes read: python -m benchmarks.ddpm

The DDPM of examples/ddpm, 20 deterministic steps (DDIM). Pictures of 128 seeds against the full-precision pictures of
the same noise: PSNR, SSIM, Frechet distance in the features of the shapes example's scorer. Average weight bits 4 or 8,
average activation bits 8 or 6; "read" is the mean over the steps, "held" what the layers hold in memory, where a layer
that changes its width has codes of each. Plans:

- uniform: one width for all;
- linear, error: theta of network orthogonality (MPQ-Diff) by the published linear program, and shaped like an error;
- ones: the error form with 1 in place of every theta;
- measured: the least sum of measured errors (one layer, one step at a time; see examples/ddpm/step_errors.py);
- per layer: the same bits at all steps; per layer and step: each pair of steps has its own;
- as many bytes held: per layer, with the memory that "per layer and step" takes;
- per step: levels of measured per-layer plans, their order found by search_schedule (TMPDiff);
- own ranges: activation ranges of each pair of steps instead of one for the run.

Also how theta depends on the number of sampled steps, and how it relates to the measured errors. Every figure is stored
(--store) as soon as it is measured; a stopped run continues. Writes benchmarks/results/ddpm.json and ddpm.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline

from examples.ddpm.data import pictures
from examples.ddpm.step_errors import Trajectory, output_errors, record, step_sensitivities
from examples.ddpm.subject import Prompted, draw, features, likeness, load_pipeline, load_scorer
from mixdq_ao import (
    Orthogonality,
    Plan,
    Sampling,
    Sensitivity,
    TemporalPlan,
    allocate,
    allocate_orthogonal,
    allocate_steps,
    calibrate,
    orthogonality,
    prepare,
    search_schedule,
)
from mixdq_ao.app.environment import environment
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.jsonfile import write_document
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.metrics import frechet_distance, psnr, ssim
from mixdq_ao.search.orthogonality import sampled_steps
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.store import Store
from mixdq_ao.temporal.measure import GenerationError, draw_reference
from mixdq_ao.temporal.step_probe import over_the_run

RESULTS = Path(__file__).parent / "results"
STEPS, SAMPLED = 20, 10
PROFILED, ANALYZED, TEST = 32, 8, 128
FIRST_TEST = 10_000
LEVEL_BITS = (6.0, 4.0, 3.0)
"""Average weight bits of the per-layer plans that ``search_schedule`` puts in order."""
OWN = ", own ranges"
KINDS, BY = ("per layer", "per layer and step"), ("linear", "error", "measured")
Row = dict[str, float]
Made = Callable[[], Plan | TemporalPlan]


class Subject:
    """The pipeline, what plans are made from, and the pictures they are judged by."""

    def __init__(self, store: Store) -> None:
        silence_loading_bars()
        self.store, self.pipe, self.scorer = store, load_pipeline(), load_scorer()
        self.unet: Any = self.pipe.unet
        self.sampled = sampled_steps(STEPS, SAMPLED)
        self.calls = record(self.unet, lambda: draw(self.pipe, range(PROFILED), steps=STEPS))
        self.calibration = calibrate(self.unet, run=lambda: self.calls.again(self.unet))
        self.seeds = range(FIRST_TEST, FIRST_TEST + TEST)
        self.reference = draw(self.pipe, self.seeds, steps=STEPS)
        self.real = features(self.scorer, pictures(4 * TEST, random.Random(0)))

    def stored(self, key: str, measure: Callable[[], Mapping[str, float]]) -> Row:
        """A measurement from the store, or measured and stored."""
        if (known := self.store.get(key)) is None:
            known = dict(measure())
            self.store.put(key, known)
            print(f"{key}: " + ", ".join(f"{n} {v:.5g}" for n, v in list(known.items())[:8]), flush=True)
        return known

    def orthogonality(self) -> Orthogonality:
        prompts = [str(i) for i in range(PROFILED)]
        return orthogonality(Prompted(self.pipe), prompts, steps=STEPS, calibration=self.calibration)

    def clone(self) -> DDIMPipeline:
        pipe = DDIMPipeline(unet=copy.deepcopy(self.unet), scheduler=copy.deepcopy(self.pipe.scheduler))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def schedule_error(self, plan: TemporalPlan) -> GenerationError:
        """Mean squared error of the final pictures of a few seeds, by schedule of ``plan``'s levels."""
        prompts, sampling = [str(i) for i in range(ANALYZED)], Sampling(steps=STEPS, batch_size=ANALYZED)
        reference = draw_reference(Prompted(self.pipe), prompts, sampling, metric="mse")
        pipe = Prompted(self.clone())
        runtime = prepare(pipe.unet, plan, self.calibration, storage="own", keep_full=True)
        return GenerationError(pipe, runtime, prompts, sampling, reference, metric="mse")

    def sensitivities(self, theta: Orthogonality) -> dict[int, Sensitivity]:
        """Of each sampled step: errors of the output with one layer rounded, times what the step does to pictures."""
        levels = {"16": None, "W4A8": Plan.uniform(self.unet, 4, 8)}
        plan = TemporalPlan(levels, ("16",) * STEPS).with_calibration(self.calibration)
        calls = self.calls.at(self.sampled)
        few = Trajectory(calls.timesteps, calls.inputs[:, :ANALYZED], calls.outputs[:, :ANALYZED])
        factors = self.stored("factors", lambda: self._factors(plan, few))
        found = self.stored("errors", lambda: _flat(output_errors(self.unet, few, self.calibration)))
        by_step = {s: factors[str(s)] for s in self.sampled}
        return step_sensitivities(theta.layers, _unflat(found, SAMPLED), by_step)

    def _factors(self, plan: TemporalPlan, few: Trajectory) -> Row:
        """{step: squared error of the pictures with this step alone at W4A8, by the output's relative error there}."""
        error, clone = self.schedule_error(plan), self.clone()
        prepare(clone.unet, plan.with_steps(("W4A8",) * STEPS), storage="own", keep_full=True)
        output = few.again(clone.unet)
        alone = [tuple("W4A8" if t == s else "16" for t in range(STEPS)) for s in self.sampled]
        return {str(s): error(a) / output[i].item() for i, (s, a) in enumerate(zip(self.sampled, alone, strict=True))}

    def judge(self, make: Made, *, own_ranges: bool = False) -> Row:
        """Rounds a copy for real and compares its pictures."""
        plan = make()
        if isinstance(plan, Plan):
            plan = TemporalPlan({"all": plan}, ("all",) * STEPS)
        ranged = self._own_ranges(plan) if own_ranges else plan.with_calibration(self.calibration)
        clone = self.clone()
        runtime = prepare(clone.unet, ranged, storage="own")
        runtime.follow(clone)
        images = draw(clone, self.seeds, steps=STEPS)
        mine, theirs = features(self.scorer, images), features(self.scorer, self.reference)
        summaries = {n: p.summary(self.unet) for n, p in ranged.levels.items() if p is not None}
        read = [summaries[n] for n in ranged.steps]
        return {
            "psnr": psnr(images, self.reference).mean().item(),
            "ssim": ssim(images, self.reference).mean().item(),
            "frechet": frechet_distance(mine, theirs),
            "frechet_drawn": frechet_distance(mine, self.real),
            "likeness": likeness(images).mean().item(),
            "weight_bits_read": float(np.mean([s.average_weight_bits for s in read])),
            "act_bits": float(np.mean([s.average_act_bits for s in read])),
            "bytes_held": runtime.bytes(),
        }

    def _own_ranges(self, plan: TemporalPlan) -> TemporalPlan:
        """Every level with the ranges of the inputs at its own steps."""
        levels = {}
        for name, level in plan.levels.items():
            calls = self.calls.at([t for t, used in enumerate(plan.steps) if used == name])
            own = calibrate(self.unet, run=lambda calls=calls: calls.again(self.unet))
            levels[name] = level and level.with_calibration(own)
        return TemporalPlan(levels, plan.steps, plan.costs, plan.metadata)


def _flat(errors: Mapping[str, Mapping[str, Mapping[int, torch.Tensor]]]) -> Row:
    """One flat table, as the store wants it: "layer kind bits place"."""
    return {
        f"{layer} {kind} {bits} {i}": value
        for layer, kinds in errors.items()
        for kind, table in kinds.items()
        for bits, values in table.items()
        for i, value in enumerate(values.tolist())
    }


def _unflat(table: Row, places: int) -> dict[str, dict[str, dict[int, torch.Tensor]]]:
    errors: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for key, value in table.items():
        layer, kind, bits, place = key.split(" ")
        row = errors.setdefault(layer, {}).setdefault(kind, {})
        row.setdefault(int(bits), torch.zeros(places, dtype=torch.float64))[int(place)] = value
    return errors


def uniform_by_step(unet: Any, weight_bits: int, act_bits: int) -> TemporalPlan:
    """One width, but a level for every pair of steps, so that each can have ranges of its own."""
    names = [f"{2 * (t // 2)}-{2 * (t // 2) + 1}" for t in range(STEPS)]
    return TemporalPlan({n: Plan.uniform(unet, weight_bits, act_bits) for n in names}, tuple(names))


def plans(subject: Subject, theta: Orthogonality, errors: Mapping[int, Sensitivity]) -> dict[str, Made]:
    """{row: what makes its plan}; a row's name says average bits, how they were chosen, and by what."""
    unet, run, few = subject.unet, over_the_run(errors), theta.subset(subject.sampled)
    ones = dict.fromkeys(theta.layers, 1.0)
    made: dict[str, Made] = {}
    for w, a in ((8, 8), (4, 8), (8, 4)):
        made[f"W{w}A{a} | uniform | "] = partial(Plan.uniform, unet, w, a)
    for w, a in ((4, 8), (8, 6), (4, 6)):
        budget: dict[str, Any] = {"weight_bits": float(w), "act_bits": float(a)}
        key, step = f"W{w}A{a} | per layer | ", f"W{w}A{a} | per layer and step | "
        for form in ("linear", "error"):
            made[key + form] = partial(by_theta, theta, form=form, **budget)
            made[step + form] = partial(allocate_steps, few, form=form, storage="own", **budget)
        made[key + "ones"] = partial(by_theta, theta, form="error", importance=ones, **budget)
        made[key + "measured"] = partial(by_errors, run, **budget)
        made[step + "measured"] = partial(allocate_steps, errors, steps=STEPS, storage="own", **budget)
    made["W4A8 | per step | measured"] = partial(searched, subject, run)
    for bits in ("W4A8", "W4A6"):
        name = f"{bits} | per layer, as many bytes held as per layer and step | measured"
        made[name] = partial(as_many_bytes, subject, run, bits)
    made[f"W4A8 | uniform{OWN} | "] = partial(uniform_by_step, unet, 4, 8)
    made[f"W8A4 | uniform{OWN} | "] = partial(uniform_by_step, unet, 8, 4)
    for bits in ("W4A8", "W8A6", "W4A6"):
        made[f"{bits} | per layer and step{OWN} | measured"] = made[f"{bits} | per layer and step | measured"]
    return made


def by_theta(theta: Orthogonality, **options: Any) -> Plan:
    """Bits per layer from network orthogonality."""
    return allocate_orthogonal(theta, **options).plan


def by_errors(run: Sensitivity, **options: Any) -> Plan:
    """Bits per layer with the least sum of measured errors."""
    return allocate(run, objective="additive", **options).plan


def as_many_bytes(subject: Subject, run: Sensitivity, bits: str) -> Plan:
    """Bits per layer in the memory that bits per layer and step hold."""
    other = subject.store.get(f"{bits} | per layer and step | measured")
    assert other is not None, "measured before this row"
    return by_errors(run, weight_bytes=int(other["bytes_held"]), act_bits=float(bits[-1]))


def searched(subject: Subject, run: Sensitivity) -> TemporalPlan:
    """Whole per-layer plans in the order that TMPDiff's search finds, at 4 weight bits on average."""
    levels = {f"W{b:g}": by_errors(run, weight_bits=b, act_bits=8) for b in LEVEL_BITS}
    costs = {f"W{b:g}": b / 16 for b in LEVEL_BITS}
    plan = TemporalPlan(levels, (next(iter(levels)),) * STEPS, costs)
    shared: dict[str, Any] = {"steps": STEPS, "levels": costs, "subject": json.dumps(plan.to_json())}
    store = None if subject.store.path is None else subject.store.path.with_suffix(".search.jsonl")
    found = search_schedule(subject.schedule_error(plan), max_cost=4 / 16, store=store, **shared)
    print(f"searched schedule: {found.evaluations} evaluations, {' '.join(found.levels)}", flush=True)
    return plan.with_steps(found.levels)


def stability(theta: Orthogonality, errors: Mapping[int, Sensitivity]) -> dict[str, Any]:
    """Rank correlations of theta: fewer sampled steps with all, between single steps, and with measured errors."""
    every, run, ranks = theta.importance(), over_the_run(errors), rank_correlation
    values = np.array(list(every.values()))
    fewer = {n: theta.subset(sampled_steps(STEPS, n)) for n in (1, 2, 4, SAMPLED)}
    single, places = theta.step_importance(), list(errors)
    kinds = {
        "weight": [run.layers[n].weight_errors[4] for n in every],
        "act": [run.layers[n].act_errors[4] for n in every],
    }
    steps = {s: ([e.layers[n].weight_errors[4] for n in every]) for s, e in errors.items()}
    return {
        "sampled_steps": {n: ranks(np.array(list(o.importance().values())), values) for n, o in fewer.items()},
        "first_and_last_step": ranks(single[0], single[-1]),
        "least_between_steps": min(ranks(a, b) for a in single for b in single),
        "with_error_at_4_bits": {kind: ranks(values, np.array(e)) for kind, e in kinds.items()},
        "with_error_of_the_same_step": [ranks(single[s], np.array(steps[s])) for s in places],
        "errors_first_and_last_step": ranks(np.array(steps[places[0]]), np.array(steps[places[-1]])),
    }


def table(rows: Mapping[str, Row]) -> str:
    """Markdown, a line a plan."""
    lines = [
        "| bits | chosen | by | PSNR, dB | SSIM | Frechet | read, bits a weight | held, kB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        figures = f"{r['psnr']:.2f} | {r['ssim']:.4f} | {r['frechet']:.2f} | {r['weight_bits_read']:.2f}"
        lines.append(f"| {name} | {figures} | {r['bytes_held'] / 1000:.0f} |")
    return "\n".join(lines) + "\n"


def words(rows: Mapping[str, Row], stable: Mapping[str, Any]) -> str:
    """What the rows say of per-layer bits against uniform ones, and of theta."""

    def gained(a, b):
        return f"{rows[a]['psnr'] - rows[b]['psnr']:+.1f} dB"

    lines = []
    for bits, base in (("W4A8", "W4A8 | uniform | "), ("W8A6", "W8A6 | per layer | ones")):
        of = "uniform bits" if "uniform" in base else "importances of 1"
        per = [f"{k} by {by} {gained(f'{bits} | {k} | {by}', base)}" for k in KINDS for by in BY]
        lines.append(f"- {bits} against {of}: {', '.join(per)}.")
    fewer = ", ".join(f"{n} steps {r:.3f}" for n, r in stable["sampled_steps"].items())
    errors = ", ".join(f"{kind} {r:.2f}" for kind, r in stable["with_error_at_4_bits"].items())
    lines.append(f"- Rank correlation of theta with that of all {STEPS} steps, from {fewer}.")
    lines.append(f"- Rank correlation of theta with the measured errors of layers at 4 bits: {errors}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("out/ddpm/benchmark.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory for ddpm.json and ddpm.md")
    options = parser.parse_args()
    settings = {"steps": STEPS, "sampled": SAMPLED, "profiled": PROFILED, "analyzed": ANALYZED, "test": TEST}
    with Store(options.store, fingerprint(load_pipeline(), settings)) as store:
        subject = Subject(store)
        theta = subject.orthogonality()
        errors = subject.sensitivities(theta)
        made = plans(subject, theta, errors)
        rows = {n: subject.stored(n, partial(subject.judge, make, own_ranges=OWN in n)) for n, make in made.items()}
        full = features(subject.scorer, subject.reference)
        reference = {
            "likeness": likeness(subject.reference).mean().item(),
            "frechet_drawn": frechet_distance(full, subject.real),
        }
        stable = stability(theta, errors)
    figures = {"rows": rows, "full_precision": reference, "stability": stable}
    write_document(options.out / "ddpm.json", {**figures, "settings": settings, "environment": environment()})
    intro = " ".join((__doc__ or "").split("\n\n")[1].split()).removesuffix(" Plans:")
    (options.out / "ddpm.md").write_text(
        f"`python -m benchmarks.ddpm`. {intro}\n\n{table(rows)}\n{words(rows, stable)}"
    )


if __name__ == "__main__":
    main()
