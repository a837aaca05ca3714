"""A precision per denoising step on the bundled pipeline, found and set by hand: python -m benchmarks.schedule

Error is 1 - SSIM of whole generations against full precision, captions the pipeline never saw; cost is the weight bits
a step reads, of 16. Levels: 16 bit (exact), uniform W8A8, and plans allocated for 4, 3 and 2.25 bits a weight; with
--acts 16 the same without quantized activations. Whether errors add up, over 40 random schedules, by 1 - SSIM and by
the squared error of latents; the found schedule beside uniform, first-n, last-n, spread and greedy ones at equal or
less cost; the search beside exhaustive search; found schedules under samplers that they were not searched with.

Every generation is appended to a store in --work. A run ends after --minutes (exit code 3) and the same command
continues it; when all is measured it writes benchmarks/results/schedule_<steps>.json and .md (_a16 with --acts 16).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.schedulers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, LCMScheduler

from benchmarks.schedule_tables import tables
from examples.schedule import Study
from mixdq_ao import Schedule, TemporalPlan, prepare, search_schedule
from mixdq_ao.app.environment import environment
from mixdq_ao.app.measure import rounds_of
from mixdq_ao.app.quiet import silence_loading_bars
from mixdq_ao.models.pipelines import generate_all
from mixdq_ao.search.store import Store
from mixdq_ao.temporal.additivity import check_additivity
from mixdq_ao.temporal.baselines import exhaustive, greedy, hand_set
from mixdq_ao.temporal.collect import results_of
from mixdq_ao.temporal.layer import Storage
from mixdq_ao.temporal.measure import METRICS, MetricName, draw_reference
from mixdq_ao.temporal.results import Additivity
from mixdq_ao.temporal.schedule import evaluation_limit

RESULTS = Path(__file__).parent / "results"
MAX_COSTS = (0.1875, 0.25, 0.4)
WORDS: dict[MetricName, str] = {"ssim": "1 - SSIM of pictures", "mse": "mean squared error of latents"}
FORMS = ("uniform", "first", "last", "spread")
"""Of schedules set by hand."""
ADDED = 4
"""So many levels, from the most precise, in the random schedules."""
SAMPLERS = {
    "DDIM": DDIMScheduler,
    "Euler": EulerDiscreteScheduler,
    "Euler ancestral": EulerAncestralDiscreteScheduler,
    "LCM": LCMScheduler,
}
SMALL = {4: ("16", "W4A8", "W2A8"), 8: ("16", "W4A8")}
"""{steps: levels} where every schedule is measured."""


class Measured:
    """Both metrics of each schedule, from a generation or from the store. Ends the program when its time is over."""

    def __init__(
        self, study: Study, steps: int, storage: Storage, store: Store, deadline: float, sampler: str = ""
    ) -> None:
        """``sampler``: other than the pipeline's own."""
        self.study, self.steps, self.store, self.deadline = study, steps, store, deadline
        self.storage: Storage = storage
        self.sampler = sampler
        self._error: Any = None
        self._latents: Any = None

    def __call__(self, schedule: tuple[str, ...]) -> dict[str, float]:
        key = json.dumps([*filter(None, [self.sampler]), self.steps, self.storage, *schedule])
        if (stored := self.store.get(key)) is None:
            if time.monotonic() > self.deadline:
                print(f"{len(self.store.results)} generations are stored; the same command continues", flush=True)
                sys.exit(3)
            stored = self._measure(schedule)
            self.store.put(key, stored)
        return stored

    def _measure(self, schedule: tuple[str, ...]) -> dict[str, float]:
        if self._error is None:
            study, sampling = self.study, self.study.sampling(self.steps)
            if self.sampler:
                study.pipe.scheduler = SAMPLERS[self.sampler].from_config(study.pipe.scheduler.config)
            self._latents = draw_reference(study.pipe, study.prompts, sampling, metric="mse")
            self._error = study.prepared(self.steps, self.storage)
        latents = self._error.draw(schedule, "latent")  # drawn again from the kept outputs of the denoiser
        return {"ssim": self._error(schedule), "mse": METRICS["mse"][0](latents, self._latents)}

    def by(self, metric: MetricName) -> Callable[[tuple[str, ...]], float]:
        return lambda schedule: self(schedule)[metric]

    @property
    def costs(self) -> dict[str, float]:
        return self.study.costs

    def levels(self, names: Iterable[str]) -> dict[str, float]:
        return {name: self.costs[name] for name in names}


def additivity(measured: Measured, steps: int) -> dict[MetricName, Additivity]:
    levels = measured.levels(list(measured.costs)[:ADDED])
    return {m: check_additivity(measured.by(m), steps=steps, levels=levels) for m in WORDS}


def by_precision_of_last(added: Additivity, precise: str) -> dict[str, dict[str, float]]:
    """R squared of logs among the schedules whose last step, which most depends on, is precise, and among others."""
    found = {}
    for kind, wanted in (("precise last step", True), ("others", False)):
        chosen = [i for i, s in enumerate(added.schedules) if (s[-1] == precise) == wanted]
        logs = np.log([[a[i] for i in chosen] for a in (added.predicted, added.measured)])
        found[kind] = {"schedules": len(chosen), "r_squared": float(np.corrcoef(logs)[0, 1] ** 2)}
    return found


def at_cost(measured: Measured, steps: int, cost: float, walk: bool) -> tuple[dict[str, Any], list[Schedule]]:
    """The found schedule with its rivals at one cost, as a row of the table, and all of them."""
    error, shared = measured.by("ssim"), {"steps": steps, "levels": measured.costs, "max_cost": cost}
    found = search_schedule(error, **shared)
    rivals = hand_set(error, **shared)
    row: dict[str, Any] = {
        "max_cost": cost,
        "found": _figures(found)
        | {"evaluations": found.evaluations, "limit": evaluation_limit(steps, len(measured.costs))},
    }
    for form in FORMS:
        own = {n: s for n, s in rivals.items() if n.startswith(form)}
        if own:
            name = min(own, key=lambda n: own[n].error)
            row[form] = {"name": name, **_figures(own[name])}
    if walk:
        walked = greedy(error, **shared)
        row["greedy"] = _figures(walked) | {"evaluations": walked.evaluations}
    best = min(rivals.values(), key=lambda s: s.error)
    row["found_over_best_by_hand"] = found.error / best.error
    row["found_over_uniform"] = found.error / row["uniform"]["error"]
    return row, [found, *rivals.values()]


def _figures(schedule: Schedule) -> dict[str, Any]:
    return {"error": schedule.error, "cost": schedule.cost, "levels": " ".join(schedule.levels)}


def against_exhaustive(measured: Measured, steps: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for cost in (0.3, 0.4, 0.5, 0.7):
        shared = {"steps": steps, "levels": measured.levels(names), "max_cost": cost}
        found = search_schedule(measured.by("ssim"), **shared)
        best = exhaustive(measured.by("ssim"), **shared)
        walked = greedy(measured.by("ssim"), **shared)
        rows.append(
            {
                "steps": steps,
                "levels": " ".join(names),
                "max_cost": cost,
                "found": found.error,
                "optimum": best.error,
                "optimum_over_found": best.error / found.error if found.error else 1.0,
                "evaluations": found.evaluations,
                "limit": evaluation_limit(steps, len(names)),
                "exhaustive_evaluations": best.evaluations,
                "greedy": walked.error,
                "greedy_evaluations": walked.evaluations,
            }
        )
    return rows


def seconds(
    study: Study, steps: int, schedules: Mapping[str, tuple[str, ...]], store: Store, measure: bool
) -> dict[str, dict[str, float]]:
    """{name: {"seconds", "original"}} of those in the store; with ``measure`` of all: the median wall time of a
    generation, uncompiled, and of the original pipeline's in the same turns."""

    def key(n):
        return json.dumps(["seconds", steps, *schedules[n]])

    if new := [n for n in schedules if store.get(key(n)) is None] if measure else []:
        timed = _timed(study, steps, {n: schedules[n] for n in new})
        original = timed.pop("original")
        for name, value in timed.items():
            store.put(key(name), {"seconds": value, "original": original})
    known = {n: store.get(key(n)) for n in schedules}
    return {n: v for n, v in known.items() if v is not None}


def _timed(study: Study, steps: int, schedules: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
    sampling, error = study.sampling(steps), study.prepared(steps, "own", keep_full=False)

    def draw(schedule: tuple[str, ...]) -> Callable[[], object]:
        def call() -> object:
            error.runtime.plan = error.runtime.plan.with_steps(schedule)
            error.runtime.follow(error.pipe)
            return generate_all(error.pipe, study.prompts, sampling)

        return call

    calls = {n: draw(s) for n, s in schedules.items()}
    calls["original"] = lambda: generate_all(study.pipe, study.prompts, sampling)
    return {n: float(np.median(ms)) / 1e3 for n, ms in rounds_of(calls, rounds=3, warmup=1).items()}


def held(study: Study, steps: int) -> dict[str, int]:
    """Bytes of the layers of a prepared UNet without full weights, and of the uniform 8-bit plan alone."""
    plan = TemporalPlan(study.levels, ("16",) * steps, study.costs)
    storages: tuple[Storage, ...] = ("own", "nested")
    found = {s: prepare(copy.deepcopy(study.pipe.unet), plan, storage=s).bytes() for s in storages}
    name = list(study.levels)[1]
    eight = study.levels[name]
    assert eight is not None
    return found | {name: eight.summary(study.pipe.unet).bytes}


def across_samplers(
    options: argparse.Namespace, rows: Iterable[Mapping[str, Any]], deadline: float
) -> list[dict[str, Any]]:
    """Schedules found with the pipeline's own sampler under others, beside those of each form that were best there."""
    study, found = Study(options.work, options.samplers, options.acts), []
    with Store(options.work / f"store_{options.steps}_samplers{suffix(options)}.jsonl", study.key) as store:
        for sampler in SAMPLERS:
            error = Measured(study, options.steps, "own", store, deadline, sampler).by("ssim")
            for row in rows:
                errors = {n: error(tuple(row[n]["levels"].split(" "))) for n in ("found", *FORMS) if n in row}
                best = min((n for n in errors if n != "found"), key=lambda n: errors[n])
                figures: dict[str, Any] = {"sampler": sampler, "cost": row["found"]["cost"], "found": errors["found"]}
                figures |= {
                    k: {"name": row[n]["name"], "error": errors[n]}
                    for k, n in (("uniform", "uniform"), ("best by hand", best))
                }
                found.append(figures)
    return found


def by_last_step(costs: Mapping[str, float], schedules: Iterable[Schedule], max_cost: float) -> dict[str, float]:
    """{level of the last step: least error of all that was measured for these schedules within the cost}."""
    least: dict[str, float] = {}
    for steps, error in (item for s in schedules for item in {**s.history, s.levels: s.error}.items()):
        if sum(costs[n] for n in steps) <= max_cost * len(steps) * (1 + 1e-9):
            least[steps[-1]] = min(error, least.get(steps[-1], error))
    return {n: least[n] for n in costs if n in least}


def suffix(options: argparse.Namespace) -> str:
    return "" if options.acts == 8 else f"_a{options.acts}"


def measure(study: Study, options: argparse.Namespace, store: Store, deadline: float) -> None:
    steps: int = options.steps
    own, nested = (Measured(study, steps, s, store, deadline) for s in ("own", "nested"))
    added = additivity(own, steps)
    for metric, found in added.items():
        print(f"{metric}: R2 {found.r_squared:.3f}, measured / predicted {found.ratio:.2f}", flush=True)
    rows, drawn = [], []
    for cost in options.costs:
        row, schedules = at_cost(own, steps, cost, options.greedy)
        print(f"cost {cost:.4g}: {json.dumps(row)}", flush=True)
        rows.append(row)
        drawn.append(schedules)
    shown = {n: (n,) * steps for n in list(study.costs)[1:]}
    shown = shown | {f"found at {s[0].cost:.3g}": s[0].levels for s in drawn} if drawn else {}
    storage = {n: {"own": own(s)["ssim"], "nested": nested(s)["ssim"]} for n, s in shown.items()}
    small = []
    for count in options.exhaustive:
        small += against_exhaustive(Measured(study, count, "own", store, deadline), count, SMALL[count])
    others = across_samplers(options, rows, deadline) if options.samplers else []
    timed = {n: s for n, s in shown.items() if not n.startswith(("W3", "W2"))}
    timed = seconds(study, steps, timed, store, options.seconds)

    def summary(a):
        return {m: {"r_squared": v.r_squared, "measured_over_predicted": v.ratio} for m, v in a.items()}

    metadata = {
        "command": command(options),
        "steps": steps,
        "prompts": options.prompts,
        "additivity": {" ".join(list(study.costs)[:ADDED]): summary(added)},
        "additivity_by_last_step": {m: by_precision_of_last(a, "16") for m, a in added.items()},
        "single_step_errors": {n: list(e) for n, e in added["ssim"].singles.items()},
        "levels": study.costs,
        "at_cost": rows,
        "best_by_last_step": {
            f"{r['max_cost']:.4g}": by_last_step(study.costs, d, r["max_cost"])
            for r, d in zip(rows, drawn, strict=True)
        },
        "exhaustive": small,
        "samplers": others,
        "samplers_prompts": options.samplers,
        "storage": storage,
        "bytes": held(study, steps),
        "seconds_uncompiled": timed,
        "generations": sum(not key.startswith('["seconds"') for key in store.results),
        "environment": environment(),
    }
    searched, by_hand = [s[0] for s in drawn], [s for group in drawn for s in group[1:]]
    results = results_of(searched, study.costs, WORDS["ssim"], also=by_hand, added=added["ssim"], metadata=metadata)
    results = replace(results, additivity={WORDS[m]: a for m, a in added.items()})
    results.save(RESULTS / f"schedule_{steps}{suffix(options)}.json")
    (RESULTS / f"schedule_{steps}{suffix(options)}.md").write_text(tables(metadata, WORDS))


def command(options: argparse.Namespace) -> str:
    """What measures the same again."""
    words = ["python -m benchmarks.schedule --steps", options.steps, "--prompts", options.prompts]
    words += ["--costs", *(f"{cost:g}" for cost in options.costs)]
    words += ["--acts", options.acts] if options.acts != 8 else []
    words += ["--samplers", options.samplers] if options.samplers else []
    words += ["--exhaustive", *options.exhaustive] if options.exhaustive else []
    words += [f"--{name}" for name in ("greedy", "seconds") if getattr(options, name)]
    return " ".join(map(str, words))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--costs", type=float, nargs="*", default=MAX_COSTS, help="none: additivity alone")
    parser.add_argument("--acts", type=int, default=8, choices=(8, 16), help="bits of all levels' activations")
    parser.add_argument("--samplers", type=int, default=0, metavar="N", help="also other samplers, on N prompts")
    parser.add_argument("--greedy", action="store_true", help="beside it, which takes hundreds of schedules")
    parser.add_argument("--exhaustive", type=int, nargs="*", default=[], choices=SMALL, help="steps: 4, 8")
    parser.add_argument("--seconds", action="store_true", help="also time generations, uncompiled")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--work", type=Path, default=Path("out/bench_schedule"))
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    silence_loading_bars()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.exhaustive and args.acts != 8:
        parser.error("--exhaustive is of levels with 8-bit activations")
    study = Study(args.work, args.prompts, args.acts)
    with Store(args.work / f"store_{args.steps}{suffix(args)}.jsonl", study.key) as store:
        measure(study, args, store, deadline)


if __name__ == "__main__":
    main()
