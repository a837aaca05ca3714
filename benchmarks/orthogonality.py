"""What network orthogonality (MPQ-Diff) is worth at equal bytes: python -m benchmarks.orthogonality

On the bundled pipeline, at 1, 4 and 8 denoising steps: pictures of captions it never saw against the full-precision
pictures of the same noise (PSNR, Frechet distance in the scorer's features, agreement with the captions). Average
weight bits 4 and 3, activations 8 bits, plain rounding. Plans:

- uniform: one width for all (none has 3 bits);
- linear, integer, error: theta by the published linear program, over whole bits, and shaped like an error;
- ones: the error form with 1 in place of every theta, which leaves only the sizes of layers;
- decoupled, additive: MixDQ's programs (2, 4 and 8 bits for all layers; the published 4 and 8 for quality layers do not
  reach 3 bits on average), and the least sum of error powers; figures from random probes;
- steps: bits per layer *and* step of 8, whose mean over the run is the budget, theta sampled at 4 of them. Such a model
  holds every width that a layer has at some step, so it takes more bytes than the others;
- probed at each step: errors of the pictures from random probes of every layer at every step (``probe_steps``), their
  sum for bits per layer, or themselves for bits per layer and step;
- + TMPDiff: whole plans of 8, 6, 4, 3 and 2.25 bits, of MixDQ's program or the additive one, in the order that
  ``search_schedule`` finds for this mean;
- 8 bits: as a model that holds several widths could have it for about its bytes.

Also: how theta relates to the measured error, how it depends on the number of sampled steps, and what sampling costs.
Writes benchmarks/results/orthogonality.json and orthogonality.md. Every figure is kept in a store (--store) as soon as
it is measured; a stopped run continues from it.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from mixdq_ao import (
    Calibration,
    Orthogonality,
    Plan,
    Sampling,
    Sensitivity,
    TemporalPlan,
    allocate,
    allocate_orthogonal,
    allocate_steps,
    analyze,
    calibrate,
    mixdq_config,
    orthogonality,
    prepare,
    quantize_,
    search_schedule,
)
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import Exam, held_bytes
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.app.subject import bundled
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.search.orthogonality import sampled_steps
from mixdq_ao.search.orthogonality_allocate import Form
from mixdq_ao.search.orthogonality_gram import Estimator
from mixdq_ao.search.probe_stats import rank_correlation
from mixdq_ao.search.request import Objective
from mixdq_ao.search.store import Store
from mixdq_ao.temporal.measure import GenerationError, draw_reference
from mixdq_ao.temporal.step_probe import over_the_run, probe_steps

RESULTS = Path(__file__).parent / "results"
STEPS, BITS = (1, 4, 8), (4.0, 3.0)
PROFILED, ANALYZED, MEASURED, TEST = 32, 8, 4, 64
LONGEST = max(STEPS)
SAMPLED = (1, 2, 4, LONGEST)
LEVEL_BITS = (8.0, 6.0, 4.0, 3.0, 2.25)
"""Of the plans that TMPDiff's search puts in order."""
ADVICE = """
Which to pick, by these tables and those of `benchmarks.ddpm` and `benchmarks.schedule`:

- Errors can be measured or probed (minutes): the additive program, per layer. Best at equal bytes, at every number of
  steps, for both budgets and both subjects.
- Nothing can be measured but one run in full precision: the error form of network orthogonality. Here the sizes of
  layers alone (ones) do as well, and theta does not relate to the measured errors.
- The published linear form only where uniform bits break down: it is 4 to 7 dB below uniform 4 bits here, and 10 dB
  above them on the DDPM.
- Bits per layer and step, or plans in the order TMPDiff finds: where what is read or multiplied counts, not what is
  held. At equal bits read they gain most where a few late steps make most of the error: over MixDQ's plan alone 8 dB at
  4 bits and 10 dB at 3, over the additive one 0.4 and 3 to 4 dB; on the DDPM with activations. In the bytes that
  several widths of a weight take, more bits at all steps are better.
"""
Saved = TypeVar("Saved", Calibration, Orthogonality, Sensitivity)
Plans = dict[str, Plan | TemporalPlan]
STRONG = 1.0
"""OMPQ's own default of beta; ours is 1 / (layers - 1)."""


class Subject:
    """The bundled pipeline, what plans are made from, and the exam they sit."""

    def __init__(self, store: Path) -> None:
        self.store, shapes = store, bundled()
        silence_loading_bars()
        self.pipe = shapes.load_pipeline()
        self.texts = [p.text for p in shapes.prompts(PROFILED, seed=55)]
        self.test = shapes.prompts(TEST, seed=2026, held_out=True)
        self.scorer = shapes.load_scorer()

        def make():
            return calibrate(self.pipe, self.texts, steps=STEPS)

        self.calibration = self._saved("calibration", Calibration, make)
        self.exams = {steps: self._exam(steps) for steps in STEPS}
        self._references: dict[int, Tensor] = {}

    def _saved(self, name: str, kind: type[Saved], make: Callable[[], Saved]) -> Saved:
        """What a file beside the store holds, or what ``make`` gives, saved there."""
        path = self.store.with_suffix(f".{name}.json")
        if not path.exists():
            make().save(path)
        return kind.load(path)

    def _exam(self, steps: int) -> Exam:
        sampling = Sampling(steps=steps, seed=10_000, batch_size=TEST)
        return Exam([p.text for p in self.test], [p.spec for p in self.test], self.scorer, sampling)

    def reference(self, steps: int) -> Tensor:
        """Full-precision pictures of the exam, drawn when first asked for."""
        if steps not in self._references:
            self._references[steps] = self.exams[steps].draw(self.pipe, f"{steps} steps")
        return self._references[steps]

    def correlated(self, estimator: Estimator) -> Orthogonality:
        """All steps of the longest run, kept in a file."""

        def make():
            return self.orthogonality(LONGEST, estimator=estimator)

        return self._saved(estimator, Orthogonality, make)

    def orthogonality(self, steps: int, timesteps: int | None = None, **options: Any) -> Orthogonality:
        return orthogonality(
            self.pipe, self.texts, steps=steps, timesteps=timesteps, calibration=self.calibration, **options
        )

    def probed(self) -> Sensitivity:
        """Estimates of every layer's error and score at one denoising step, weights at 2, 4 and 8 bits."""
        options: dict[str, Any] = {"calibration": self.calibration, "batch_size": ANALYZED, "act_bits": (8,)}

        def make():
            return analyze(self.pipe, self.texts[:ANALYZED], method="probe", **options)

        return self._saved("probed", Sensitivity, make)

    def measured(self) -> Sensitivity:
        """Every layer alone at 4 bits; a stopped analysis continues from its own store."""
        options: dict[str, Any] = {"calibration": self.calibration, "weight_bits": (4,), "act_bits": ()}
        return analyze(self.pipe, self.texts[:MEASURED], store=self.store.with_suffix(".errors.jsonl"), **options)

    def probed_steps(self) -> dict[int, Sensitivity]:
        """Errors of the pictures, of every layer at every step of the longest run; probes are kept in a store."""
        options: dict[str, Any] = {"calibration": self.calibration, "batch_size": ANALYZED, "act_bits": (8,)}
        store = self.store.with_suffix(".steps.jsonl")
        return probe_steps(self.pipe, self.texts[:ANALYZED], steps=LONGEST, store=store, **options)

    def searched(self, sensitivity: Sensitivity, objective: Objective, bits: float) -> TemporalPlan:
        """Plans per layer in the order TMPDiff finds for a mean of ``bits``, on captions that plans are made from."""
        options: dict[str, Any] = {"objective": objective, "weight_choices": (2, 4, 8), "act_bits": 8}
        plans = {f"W{b:g}": allocate(sensitivity, weight_bits=b, **options).plan for b in LEVEL_BITS}
        costs = {f"W{b:g}": b / 16 for b in LEVEL_BITS}
        plan = TemporalPlan(plans, ("W8",) * LONGEST, costs).with_calibration(self.calibration)
        texts, sampling = self.texts[:ANALYZED], Sampling(steps=LONGEST, seed=77, batch_size=ANALYZED)
        reference, pipe = draw_reference(self.pipe, texts, sampling), self.clone()
        error = GenerationError(pipe, prepare(pipe.unet, plan, storage="own"), texts, sampling, reference)
        shared: dict[str, Any] = {"steps": LONGEST, "levels": costs, "max_cost": bits / 16}
        store = self.store.with_suffix(f".{objective}_{bits:g}.jsonl")
        found = search_schedule(error, store=store, subject=_content(plan), **shared)
        kept = [n for n in plans if n in found.levels]
        figures = {"evaluations": found.evaluations, "levels": " ".join(found.levels)}
        return TemporalPlan({n: plan.levels[n] for n in kept}, found.levels, {n: costs[n] for n in kept}, figures)

    def clone(self) -> Any:
        pipe = copy.copy(self.pipe)
        object.__setattr__(pipe, "unet", copy.deepcopy(self.pipe.unet))
        return pipe

    def judge(self, plan: Plan | TemporalPlan) -> dict[str, float]:
        """Quantizes a copy in real mode and grades its pictures, at every number of steps or at the plan's."""
        pipe = self.clone()
        if isinstance(plan, TemporalPlan):
            return self._judge_steps(pipe, plan)
        quantize_(pipe.unet, mixdq_config(plan.with_calibration(self.calibration)))
        grades = [self._grade(pipe, steps) for steps in STEPS]
        return {"bytes": held_bytes(pipe.unet)} | {k: v for grade in grades for k, v in grade.items()}

    def _judge_steps(self, pipe: Any, plan: TemporalPlan) -> dict[str, float]:
        """A level per step, each width's codes its own."""
        steps = len(plan.steps)
        runtime = prepare(pipe.unet, plan.with_calibration(self.calibration), storage="own")
        runtime.follow(pipe)
        return {"bytes": runtime.bytes()} | self._grade(pipe, steps)

    def _grade(self, pipe: Any, steps: int) -> dict[str, float]:
        exam = self.exams[steps]
        grades = exam.grade(exam.draw(pipe, f"{steps} steps"), self.reference(steps))
        return {f"{name} at {steps}": float(value) for name, value in grades.items() if value is not None}


def _content(plan: Plan | TemporalPlan) -> str:
    """Tells plans apart."""
    return hashlib.blake2b(json.dumps(plan.to_json()).encode(), digest_size=6).hexdigest()


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def profiling(subject: Subject, found: Mapping[str, Orthogonality], store: Store) -> dict[str, Any]:
    """How theta of few sampled steps of the longest run agrees with that of all, and what sampling them takes."""
    figures: dict[str, Any] = {"cpu_seconds": {"0": kept(store, "profiling|0", lambda: _run_alone(subject))["seconds"]}}
    for count in SAMPLED:

        def look(c=count):
            return {"seconds": cpu_seconds(lambda: subject.orthogonality(LONGEST, c))}

        figures["cpu_seconds"][str(count)] = kept(store, f"profiling|{count}", look)["seconds"]
    for estimator, full in found.items():
        every = list(full.importance().values())
        few = {c: full.subset(sampled_steps(LONGEST, c)).importance().values() for c in SAMPLED}
        upper = full.matrices[(slice(None), *np.triu_indices(len(full.layers), 1))]
        figures[estimator] = {
            "rank_correlation_with_all": {str(c): rank_correlation(list(v), every) for c, v in few.items()},
            "correlation_quartiles": np.percentile(upper, (25, 50, 75)).tolist(),
        }
    return figures


def _run_alone(subject: Subject) -> dict[str, float]:
    sampling = Sampling(steps=LONGEST, batch_size=PROFILED)
    return {"seconds": cpu_seconds(lambda: generate_all(subject.pipe, subject.texts, sampling, "latent"))}


def kept(store: Store, key: str, call: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What the store has, else what ``call`` gives, stored."""
    if store.get(key) is None:
        store.put(key, call())
        print(key, store.results[key], flush=True)
    return store.results[key]


def against_errors(found: Mapping[str, Orthogonality], sensitivity: Sensitivity) -> dict[str, float]:
    """Rank correlation over layers of the measured 4-bit error with theta, and with the size of layers."""
    names = list(sensitivity.layers)
    errors = [sensitivity.layers[n].weight_errors[4] for n in names]
    figures = {}
    for estimator, measured in found.items():
        theta = measured.importance()
        figures[f"theta, {estimator}"] = rank_correlation([theta[n] for n in names], errors)
    figures["number of weights"] = rank_correlation([sensitivity.layers[n].weight_size for n in names], errors)
    return figures


def published(subject: Subject, found: Mapping[str, Orthogonality], probed: Sensitivity, bits: float) -> Plans:
    """What the goals are about."""
    budget: dict[str, Any] = {"weight_bits": bits, "act_bits": 8}
    result: Plans = {"uniform": Plan.uniform(subject.pipe.unet, int(bits), 8)} if bits in (2.0, 4.0, 8.0) else {}
    for form in ("error", "linear"):
        result[f"{form}, biased"] = allocate_orthogonal(found["biased"], form=form, **budget).plan
    ones = dict.fromkeys(found["biased"].layers, 1.0)
    result["ones"] = allocate_orthogonal(found["biased"], importance=ones, **budget).plan
    for objective in ("additive", "decoupled"):
        options: dict[str, Any] = {"objective": objective, "weight_choices": (2, 4, 8), **budget}
        result[objective] = allocate(probed, **options).plan
    return result


def variants(subject: Subject, found: Mapping[str, Orthogonality], probed: Sensitivity, bits: float) -> Plans:
    """The unbiased estimate, another beta, whole bits; and bits per layer and step, 4 steps sampled of 8."""
    budget: dict[str, Any] = {"weight_bits": bits, "act_bits": 8}
    result: Plans = {}
    for form in ("error", "linear"):
        result[f"{form}, unbiased"] = allocate_orthogonal(found["unbiased"], form=form, **budget).plan
        strong = allocate_orthogonal(found["biased"], form=form, beta=STRONG, **budget)
        result[f"{form}, biased, beta {STRONG:g}"] = strong.plan
    result["integer, biased"] = allocate_orthogonal(found["biased"], form="integer", **budget).plan
    sampled = found["biased"].subset(sampled_steps(LONGEST, 4))
    tried: tuple[tuple[Form, float], ...] = (("error", 0.0), ("error", 2.0), ("linear", 0.0))
    for form, decay in tried:
        plan = allocate_steps(sampled, weight_bits=bits, form=form, decay=decay, storage="own")
        result[f"steps, {form}, decay {decay:g}"] = plan
    return result


def by_step(subject: Subject, probed: Sensitivity, bits: float) -> Plans:
    """From errors probed at each step, and in the order that TMPDiff finds."""
    budget: dict[str, Any] = {"weight_bits": bits, "act_bits": 8}
    errors = subject.probed_steps()
    options: dict[str, Any] = {"objective": "additive", "weight_choices": (2, 4, 8), **budget}
    result: Plans = {"additive, probed at each step": allocate(over_the_run(errors), **options).plan}
    result["steps, additive, probed at each step"] = allocate_steps(errors, steps=LONGEST, storage="own", **budget)
    result["MixDQ + TMPDiff"] = subject.searched(probed, "decoupled", bits)
    result["additive + TMPDiff"] = subject.searched(probed, "additive", bits)
    result["8 bits"] = Plan.uniform(subject.pipe.unet, 8, 8)
    return result


def measure(subject: Subject, store: Store) -> Iterator[dict[str, Any]]:
    """The results so far, after each plan."""
    estimators: tuple[Estimator, ...] = ("biased", "unbiased")
    found: dict[str, Orthogonality] = {e: subject.correlated(e) for e in estimators}
    probed = subject.probed()
    result: dict[str, Any] = {"rows": []}
    result["rank_correlation_with_4_bit_error, probed"] = against_errors(found, probed)
    makers: dict[str, Callable[[float], Plans]] = {
        "published": lambda bits: published(subject, found, probed, bits),
        "variants": lambda bits: variants(subject, found, probed, bits),
        "by step": lambda bits: by_step(subject, probed, bits),
    }
    for kind, make in makers.items():
        for bits in BITS:
            for name, plan in make(bits).items():
                grades = kept(store, f"row|{bits:g}|{name}|{_content(plan)}", lambda p=plan: subject.judge(p))
                searched = {n: plan.metadata[n] for n in ("evaluations", "levels") if n in plan.metadata}
                result["rows"].append({"plan": name, "weight_bits": bits, **grades, **searched})
                yield result
        if kind == "published":
            result["profiling"] = profiling(subject, found, store)
            result["rank_correlation_with_4_bit_error"] = against_errors(found, subject.measured())


def _cells(row: Mapping[str, Any]) -> list[str]:
    known = [s for s in STEPS if f"ssim at {s}" in row]
    words = {
        s: f"{row[f'psnr at {s}']:.1f} dB, {row[f'frechet at {s}']:.3g}, {row[f'agreement at {s}']:.2f}" for s in known
    }
    return [words.get(s, "") for s in STEPS]


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a table of plans for each number of bits, then what profiling tells and costs."""
    lines = []
    for bits in BITS:
        lines += [f"Average weight bits {bits:g}: PSNR, Frechet distance, agreement with the caption", ""]
        lines.append("| plan | bytes | " + " | ".join(f"{s} step{'s' * (s > 1)}" for s in STEPS) + " |")
        lines.append("|---" * (len(STEPS) + 2) + "|")
        chosen = [r for r in result["rows"] if r["weight_bits"] == bits]
        lines += [f"| {r['plan']} | {r['bytes']:.0f} | " + " | ".join(_cells(r)) + " |" for r in chosen] + [""]
    return "\n".join(lines + _profile(result)) + "\n"


def _profile(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "profiling" in result:
        figures = result["profiling"]
        lines += [_row(["", *(f"{c} of {LONGEST} steps sampled" for c in figures["cpu_seconds"])])]
        lines += ["|---" * (len(figures["cpu_seconds"]) + 1) + "|"]
        lines += [_row(["seconds of one core", *(f"{v:.1f}" for v in figures["cpu_seconds"].values())])]
        for estimator in ("biased", "unbiased"):
            ranks = figures[estimator]["rank_correlation_with_all"]
            lines += [_row([f"rank correlation with all, {estimator}", "", *(f"{v:.3f}" for v in ranks.values())])]
    for key in ("rank_correlation_with_4_bit_error", "rank_correlation_with_4_bit_error, probed"):
        words = ", ".join(f"{n} {v:.2f}" for n, v in result.get(key, {}).items())
        lines += ["", f"{key.replace('_', ' ')}: {words or 'not measured yet'}"]
    return lines


def _row(cells: Sequence[str] | Mapping[str, Any]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="directory for orthogonality.json and orthogonality.md"
    )
    parser.add_argument("--store", type=Path, default=Path("out/orthogonality.jsonl"), help="measurements so far")
    args = parser.parse_args()
    settings = {
        "profiled": PROFILED,
        "analyzed": ANALYZED,
        "measured": MEASURED,
        "test": TEST,
        "steps": list(STEPS),
        "act_bits": 8,
    }
    header = {"command": "python -m benchmarks.orthogonality", "prompts": settings, "environment": environment()}
    subject = Subject(args.store)
    with Store(args.store, fingerprint(subject.pipe, {"prompts": settings})) as store:
        for result in measure(subject, store):
            write_document(args.out / "orthogonality.json", {**header, **result})
            text = f"`{header['command']}`: {TEST} captions, activations 8 bits.\n\n{table(result)}{ADVICE}"
            (args.out / "orthogonality.md").write_text(text)


if __name__ == "__main__":
    main()
