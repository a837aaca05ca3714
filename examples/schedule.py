"""A precision for every denoising step of the bundled pipeline, against schedules set by hand and uniform ones.

    python -m examples.schedule --out out/schedule
    mixdq report out/schedule

Writes the schedules (schedule_*.json), all measurements (schedule_results.json), and a store from which a stopped run
continues.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.shapes import subject
from mixdq_ao import Calibration, Plan, Sensitivity, TemporalPlan, allocate, analyze, calibrate, search_schedule
from mixdq_ao.app.inputs import at_least
from mixdq_ao.app.output import show_table
from mixdq_ao.models.pipelines import Sampling
from mixdq_ao.search.fingerprint import fingerprint
from mixdq_ao.temporal.additivity import check_additivity, check_count
from mixdq_ao.temporal.baselines import hand_set
from mixdq_ao.temporal.collect import results_of
from mixdq_ao.temporal.layer import Storage
from mixdq_ao.temporal.measure import GenerationError, draw_reference
from mixdq_ao.temporal.runtime import prepare
from mixdq_ao.temporal.schedule import Schedule, evaluation_limit

WEIGHT_BITS = {"W8": 8.0, "W4": 4.0, "W3": 3.0, "W2": 2.25}
"""Average weight bits of the levels below 16 bit."""


def level_costs(act_bits: int = 8) -> dict[str, float]:
    """{level: relative cost of a step}: the average weight bits that it reads, divided by 16."""
    return {"16": 1.0} | {f"{name}A{act_bits}": bits / 16 for name, bits in WEIGHT_BITS.items()}


COSTS = level_costs()
MEASURED = 40
"""The number of random schedules that show whether errors of steps add up."""


class Study:
    """Levels of the bundled UNet, and error functions of their schedules. A folder keeps calibration and sensitivities.

    Attributes:
        levels: 16 bit, uniform 8 bit, and plans allocated for 4, 3 and 2.25 bits a weight on average; all but the
            first with ``act_bits`` (8, or 16: weights only).
        costs: of the levels. key: fingerprint of model, levels and prompts.
    """

    def __init__(self, folder: Path, prompts: int, act_bits: int = 8) -> None:
        self.pipe, texts = subject.load_pipeline(), [p.text for p in subject.prompts(16, seed=55)]
        calibration_file, sensitivity_file = folder / "calibration.json", folder / "sensitivity.json"
        if not sensitivity_file.exists():
            calibration = calibrate(self.pipe, texts, steps=(1, 8))
            calibration.save(calibration_file)
            analyze(self.pipe, texts[:8], calibration=calibration, method="probe").save(sensitivity_file)
        calibration, sensitivity = Calibration.load(calibration_file), Sensitivity.load(sensitivity_file)
        self.costs = level_costs(act_bits)
        _, eight, *others = self.costs
        self.levels: dict[str, Plan | None] = {"16": None}
        self.levels[eight] = Plan.uniform(self.pipe.unet, 8, act_bits).with_calibration(calibration)
        for name in others:
            found = allocate(sensitivity, weight_bits=16 * self.costs[name], act_bits=act_bits, objective="additive")
            self.levels[name] = found.plan.with_calibration(calibration)
        self.prompts = [p.text for p in subject.prompts(prompts, seed=2024, held_out=True)]
        plans = {n: p and p.to_json() for n, p in self.levels.items()}
        self.key = fingerprint(self.pipe, {"prompts": self.prompts, "levels": plans})

    def sampling(self, steps: int) -> Sampling:
        return Sampling(steps=steps, seed=3, batch_size=len(self.prompts))

    def prepared(self, steps: int, storage: Storage, *, keep_full: bool = True) -> GenerationError:
        """1 - SSIM of whole generations, with a prepared copy of the UNet; 16 bit is exact if ``keep_full``."""
        reference = draw_reference(self.pipe, self.prompts, self.sampling(steps))
        pipe = copy.copy(self.pipe)
        object.__setattr__(pipe, "unet", copy.deepcopy(self.pipe.unet))
        plan = TemporalPlan(self.levels, ("16",) * steps, self.costs)
        runtime = prepare(pipe.unet, plan, storage=storage, keep_full=keep_full)
        return GenerationError(pipe, runtime, self.prompts, self.sampling(steps), reference)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/schedule"))
    parser.add_argument("--steps", type=at_least(3), default=8)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--costs", type=float, nargs="+", default=[0.2, 0.25, 0.4])
    args = parser.parse_args()
    check_count(MEASURED, args.steps, len(COSTS))
    args.out.mkdir(parents=True, exist_ok=True)
    study = Study(args.out, args.prompts)
    error = study.prepared(args.steps, "own")
    shared: dict[str, Any] = {"steps": args.steps, "levels": COSTS, "subject": study.key}
    shared["store"] = args.out / f"store_{args.steps}.jsonl"
    found: list[Schedule] = []
    by_hand: list[Schedule] = []
    for cost in args.costs:
        found.append(search_schedule(error, **shared, max_cost=cost))
        by_hand += compare(found[-1], hand_set(error, **shared, max_cost=cost), cost)
        plan = TemporalPlan(study.levels, found[-1].levels, COSTS, {"metric": "ssim", "error": found[-1].error})
        plan.save(args.out / f"schedule_{cost:g}.json")
    added = check_additivity(error, **shared, schedules=MEASURED)
    print(
        f"random schedules: R2 of logs {added.r_squared:.3f}, measured {added.ratio:.2f} times the sum of their steps"
    )
    words, made = "1 - SSIM of pictures", {"prompts": args.prompts}
    results_of(found, COSTS, words, also=by_hand, added=added, metadata=made).save(args.out / "schedule_results.json")
    print(f"denoiser calls: {error.computed}, reused {error.reused}")


def compare(found: Schedule, by_hand: Mapping[str, Schedule], cost: float) -> list[Schedule]:
    """Prints the found schedule above those one would set by hand at the same cost, best first; returns the latter."""
    ranked = sorted(by_hand.items(), key=lambda item: item[1].error)
    limit = evaluation_limit(len(found.levels), len(COSTS))
    rows = [
        (name, f"{s.error:.2e}", f"{s.cost:.3f}", " ".join(s.levels))
        for name, s in [("found", found), *ranked[:6], *(r for r in ranked[6:] if r[0].startswith("uniform"))]
    ]
    title = f"cost <= {cost}: {found.evaluations} of at most {limit} evaluations"
    show_table(title, ("schedule", "1 - SSIM", "cost", "levels"), rows)
    return list(by_hand.values())


if __name__ == "__main__":
    main()
