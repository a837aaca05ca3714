"""A precision for every denoising step of the bundled pipeline: found, set by hand, and uniform at the same cost.

    python -m examples.schedule --out out/schedule

Writes schedules, ``results.json`` and the measurements (a stopped run continues from them).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.shapes import subject
from mixdq_ao import Plan, TemporalPlan, allocate, analyze, calibrate, prepare, search_schedule
from mixdq_ao.app.output import show_table
from mixdq_ao.jsonfile import write_document
from mixdq_ao.models.pipelines import Sampling
from mixdq_ao.search.store import fingerprint
from mixdq_ao.temporal.additivity import check_additivity
from mixdq_ao.temporal.baselines import exhaustive, hand_set
from mixdq_ao.temporal.layer import Storage
from mixdq_ao.temporal.measure import GenerationError, draw_reference
from mixdq_ao.temporal.schedule import evaluation_limit

COSTS = {"16": 1.0, "W8A8": 8 / 16, "W4A8": 4 / 16, "W3A8": 3 / 16, "W2A8": 2.25 / 16}
"""Relative cost of a step: weight bits that it reads, on average, of 16."""
BITS = {"W4A8": 4.0, "W3A8": 3.0, "W2A8": 2.25}


class Study:
    """Levels of the bundled UNet, and error functions of their schedules."""

    def __init__(self, out: Path, prompts: int) -> None:
        self.out, self.pipe = out, subject.load_pipeline()
        texts = [p.text for p in subject.prompts(16, seed=55)]
        calibration = calibrate(self.pipe, texts, steps=(1, 8))
        sensitivity = analyze(self.pipe, texts[:8], calibration=calibration, method="probe")
        self.levels: dict[str, Plan | None] = {"16": None}
        self.levels["W8A8"] = Plan.uniform(self.pipe.unet, 8, 8).with_calibration(calibration)
        for name, bits in BITS.items():
            found = allocate(sensitivity, weight_bits=bits, act_bits=8, objective="additive")
            self.levels[name] = found.plan.with_calibration(calibration)
        self.prompts = [p.text for p in subject.prompts(prompts, seed=2024, held_out=True)]
        plans = {n: p and p.to_json() for n, p in self.levels.items()}
        self.key = fingerprint(self.pipe.unet, {"prompts": self.prompts, "levels": plans})

    def error(self, steps: int, storage: Storage) -> GenerationError:
        """1 - SSIM of whole generations; 16 bit is exact."""
        sampling = Sampling(steps=steps, seed=3, batch_size=len(self.prompts))
        reference = draw_reference(self.pipe, self.prompts, sampling)
        pipe = copy.copy(self.pipe)
        object.__setattr__(pipe, "unet", copy.deepcopy(self.pipe.unet))
        plan = TemporalPlan(self.levels, ("16",) * steps, COSTS)
        runtime = prepare(pipe.unet, plan, storage=storage, keep_full=True)
        return GenerationError(pipe, runtime, self.prompts, sampling, reference)

    def settings(self, steps: int, storage: str, levels: Mapping[str, float] = COSTS) -> dict[str, Any]:
        """What all searches at one number of steps share; they read each other's measurements."""
        store = self.out / f"store_{steps}_{len(levels)}_{storage}.jsonl"
        return {"steps": steps, "levels": dict(levels), "store": store, "subject": self.key}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/schedule"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--costs", type=float, nargs="+", default=[0.2, 0.25, 0.3, 0.4, 0.5])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out, args.prompts)
    own = study.error(args.steps, "own")
    settings = study.settings(args.steps, "own")
    additivity = check_additivity(own, **settings)
    results: dict[str, Any] = {
        "additivity": {"r_squared": additivity.r_squared, "ratio": additivity.ratio, "singles": additivity.singles},
        "costs": {str(c): at_cost(study, own, settings, c) for c in args.costs},
        "storage": compare_storage(study, own, settings, args.costs),
        "small": small(study),
        "calls": {"computed": own.computed, "reused": own.reused},
    }
    write_document(args.out / "results.json", results)
    report(results, args.steps)


def at_cost(study: Study, error: GenerationError, settings: dict[str, Any], cost: float) -> dict[str, Any]:
    """The found schedule and every one a person would set, at one cost."""
    found = search_schedule(error, **settings, max_cost=cost)
    name = study.out / f"schedule_{cost:g}.json"
    TemporalPlan(study.levels, found.levels, COSTS, {"metric": "ssim", "error": found.error}).save(name)
    by_hand = hand_set(error, **settings, max_cost=cost)
    row = lambda s: {"levels": list(s.levels), "error": s.error, "cost": s.cost}  # noqa: E731
    hand = {n: row(s) for n, s in sorted(by_hand.items(), key=lambda item: item[1].error)}
    return {"found": row(found) | {"evaluations": found.evaluations}, "by_hand": hand}


def compare_storage(study: Study, own: GenerationError, settings: dict[str, Any], costs: list[float]) -> dict[str, Any]:
    """Uniform levels and found schedules with codes of their own and nested: errors, and bytes without full weights."""
    steps = settings["steps"]
    nested = study.error(steps, "nested")
    schedules = {n: (n,) * steps for n in list(COSTS)[1:]}
    schedules |= {f"found {c:g}": search_schedule(own, **settings, max_cost=c).levels for c in costs}
    errors = {n: {"own": own(s), "nested": nested(s)} for n, s in schedules.items()}
    plan = TemporalPlan(study.levels, ("16",) * steps, COSTS)
    storages: tuple[Storage, ...] = ("own", "nested")
    held = {s: prepare(copy.deepcopy(study.pipe.unet), plan, storage=s).bytes() for s in storages}
    w8a8 = study.levels["W8A8"]
    assert w8a8 is not None
    return {"errors": errors, "bytes": held | {"W8A8": w8a8.summary(study.pipe.unet).bytes}}


def small(study: Study) -> dict[str, Any]:
    """4 steps of 3 levels, where every schedule can be measured: the search against the optimum."""
    costs = {n: COSTS[n] for n in ("16", "W4A8", "W2A8")}
    error, settings = study.error(4, "own"), study.settings(4, "own", costs)
    cases = {}
    for cost in (0.3, 0.5, 0.7):
        found = search_schedule(error, **settings, max_cost=cost)
        best = exhaustive(error, **settings, max_cost=cost)
        cases[str(cost)] = {"found": found.error, "optimum": best.error, "evaluations": found.evaluations}
    return cases


def report(results: dict[str, Any], steps: int) -> None:
    print(
        f"additivity: R2 of logs {results['additivity']['r_squared']:.3f}, ratio {results['additivity']['ratio']:.2f}"
    )
    for cost, table in results["costs"].items():
        found = table["found"]
        rows = [("found", *_row(found)), *((n, *_row(s)) for n, s in list(table["by_hand"].items())[:6])]
        uniform = [(n, *_row(s)) for n, s in table["by_hand"].items() if n.startswith("uniform")]
        limit = evaluation_limit(steps, len(COSTS))
        show_table(
            f"cost <= {cost}: {found['evaluations']} of {limit} evaluations",
            ("schedule", "1 - SSIM", "cost", "levels"),
            [*rows, *(r for r in uniform if r not in rows)],
        )
    errors = results["storage"]["errors"]
    rows = [(n, f"{e['own']:.2e}", f"{e['nested']:.2e}") for n, e in errors.items()]
    show_table(f"storage, bytes {results['storage']['bytes']}", ("levels", "own", "nested"), rows)
    print("4 steps of 3 levels:", results["small"])
    print("denoiser calls:", results["calls"])


def _row(schedule: dict[str, Any]) -> tuple[str, str, str]:
    return f"{schedule['error']:.2e}", f"{schedule['cost']:.3f}", " ".join(schedule["levels"])


if __name__ == "__main__":
    main()
